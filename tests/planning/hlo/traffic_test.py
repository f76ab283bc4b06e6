"""Memory traffic of hand-written programs."""

import pytest

from mixer_jax.planning.hlo.program import parse_program
from mixer_jax.planning.hlo.traffic import hbm_bytes_by_opcode
from tests.helpers.hlo_programs import COLLECTIVES, LOOP, MULTI_SLICE, TRAIN_STEP


def test_traffic_of_loop() -> None:
    traffic = hbm_bytes_by_opcode(parse_program(LOOP))
    kernel, residual = 256 * 512 * 2, 32 * 512 * 2
    # The matmul's input and output are in on-chip memory. Six kernels are read, six residuals are
    # written, and both fusions read the loop index, which has four bytes.
    assert traffic["fusion"] == 6 * (kernel + residual + 2 * 4)
    # Float32 images are read; the converted ones are in on-chip memory.
    assert traffic["convert"] == 32 * 256 * 4
    assert traffic.total() - traffic["fusion"] - traffic["convert"] < 200


@pytest.mark.parametrize(
    ("instruction", "num_bytes"),
    [
        # Both read 4 bytes per number. One writes 2; the result of the other is its operand.
        ("bf16[8,64] convert(%x)", 8 * 64 * (4 + 2)),
        ("f32[512] bitcast(%x)", 8 * 64 * 4),
        # One of eight rows is read, and written in place.
        ("f32[8,64] dynamic-update-slice(%x, %row, %zero, %zero)", 2 * 64 * 4),
    ],
)
def test_fusion_writes_changed_bytes(instruction: str, num_bytes: int) -> None:
    output_type = instruction.split(" ", 1)[0]
    text = f"""
%fused (x: f32[8,64], row: f32[1,64]) -> {output_type} {{
  %x = f32[8,64] parameter(0)
  %row = f32[1,64] parameter(1)
  %zero = s32[] constant(0)
  ROOT %y = {instruction}
}}

ENTRY %main (x: f32[8,64], row: f32[1,64]) -> {output_type} {{
  %x = f32[8,64] parameter(0)
  %row = f32[1,64] parameter(1)
  ROOT %fusion = {output_type} fusion(%x, %row), kind=kLoop, calls=%fused
}}
"""
    assert hbm_bytes_by_opcode(parse_program(text)).total() == num_bytes


def test_traffic_of_collectives() -> None:
    traffic = hbm_bytes_by_opcode(parse_program(COLLECTIVES))
    full, shard, tokens, head = 4 * 256 * 512, 4 * 64 * 512, 32 * 196 * 512, 512 * 10
    # A reduce-scatter from bfloat16 to float32, and an all-gather, counted where it starts.
    assert traffic["fusion"] == (2 * full + 4 * shard) + (2 * shard + 2 * full)
    assert traffic["all-to-all"] == 2 * 2 * tokens
    # Three times in a loop, and once more together with the loss.
    assert traffic["all-reduce"] == 2 * 4 * (4 * head + 1)
    # One image, and two semaphores.
    assert traffic["collective-permute"] == 2 * 3 * 224 * 224 + 2 * 4


def test_send_is_read_once() -> None:
    traffic = hbm_bytes_by_opcode(parse_program(MULTI_SLICE))
    assert traffic["send"] == traffic["recv"] - 4 == 4 * 128 * 8 * 128


def test_custom_kernel_counts_rereads_of_its_estimate() -> None:
    assert '"bytes_accessed":"100"' in TRAIN_STEP
    rereads = TRAIN_STEP.replace('"bytes_accessed":"100"', '"bytes_accessed":"1000000"')
    # Three operands and the result.
    arrays = 2 * (64 * 512 + 512 * 256 + 2 * 64 * 256)
    before, after = (
        hbm_bytes_by_opcode(parse_program(text)).total() for text in (TRAIN_STEP, rereads)
    )
    assert after - before == 1_000_000 - arrays
