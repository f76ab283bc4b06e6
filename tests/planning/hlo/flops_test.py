"""FLOPs of matmuls in hand-written programs."""

import pytest

from mixer_jax.planning.hlo.flops import iter_matmul_flops
from mixer_jax.planning.hlo.program import parse_program


@pytest.mark.parametrize(
    ("shapes", "instruction", "flops"),
    [
        # A matmul as the TPU compiler writes it.
        (
            ("bf16[16,32]", "bf16[32,64]"),
            "bf16[16,64] convolution(%a, %b), dim_labels=bf_io->bf",
            2 * 16 * 32 * 64,
        ),
        # A batch of 8 matmuls, as a dilated window that meets each of 8 elements once.
        (
            ("bf16[8,16,32]", "bf16[8,32,64]"),
            "bf16[8,16,64] convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, "
            "dim_labels=0bf_0io->0bf",
            2 * 8 * 16 * 32 * 64,
        ),
        # A patch embedding.
        (
            ("bf16[2,64,64,3]", "bf16[16,16,3,128]"),
            "bf16[2,4,4,128] convolution(%a, %b), window={size=16x16 stride=16x16}, "
            "dim_labels=b01f_01io->b01f",
            2 * 2 * 16 * 768 * 128,
        ),
        # 2 of the 15 positions of a window of 3 over 5 numbers are padding.
        (
            ("f32[1,5,1]", "f32[3,1,1]"),
            "f32[1,5,1] convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            2 * 13,
        ),
        (
            ("f32[4,16,32]", "f32[4,32,8]"),
            "f32[4,16,8] dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
            "rhs_batch_dims={0}, rhs_contracting_dims={1}",
            2 * 4 * 16 * 32 * 8,
        ),
    ],
    ids=["matmul", "batched", "patches", "padding", "dot"],
)
def test_matmul_flops(shapes: tuple[str, str], instruction: str, flops: int) -> None:
    text = f"""
ENTRY %main (a: {shapes[0]}, b: {shapes[1]}) -> x {{
  %a = {shapes[0]} parameter(0)
  %b = {shapes[1]} parameter(1)
  ROOT %c = {instruction}
}}
"""
    assert sum(number for _, number in iter_matmul_flops(parse_program(text))) == flops
