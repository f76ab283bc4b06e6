"""FLOPs and memory traffic by region, of hand-written and of compiled programs."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import pytest

from mixer_jax.benchmarks.candidates import MIXER_JAX, REFERENCE, Candidate, Workload
from mixer_jax.benchmarks.compile import compile_step
from mixer_jax.models.mixer_config import VARIANTS, MixerConfig
from mixer_jax.models.mixer_costs import REGIONS
from mixer_jax.models.registry import get_family
from mixer_jax.planning.aot_compile import Compiled
from mixer_jax.planning.hlo import parse_program
from mixer_jax.planning.hlo_costs import (
    OTHER,
    hbm_bytes_by_opcode,
    iter_hbm_bytes,
    iter_matmul_flops,
    region_of,
    region_of_op,
    sum_by_region,
)
from mixer_jax.planning.roofline import estimate_traffic
from tests.helpers.hlo_programs import COLLECTIVES, LOOP, MULTI_SLICE, TRAIN_STEP
from tests.helpers.tpu_compiler import tpu_device

TINY = MixerConfig(2, 16, 128, 64, 256)
WORKLOAD = Workload("train", "Mixer-tiny", 64, 10, "bfloat16", 8)


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


@pytest.mark.parametrize(
    ("op_name", "region"),
    [
        ("jit(train_step)/jvp(MlpMixer)/stem/conv_general_dilated", "stem"),
        ("batch[\\'image\\']", "stem"),
        (
            "jit(step)/transpose(jvp(Reference))/block_3/token_mixing/Dense_0/dot_general",
            "token mixing",
        ),
        ("jit(step)/jvp(Reference)/block_11/transpose", "token mixing"),
        (
            "jit(train_step)/jvp(MlpMixer)/while/body/blocks/vmap(channel_mixing)/Dense_1/add",
            "channel mixing",
        ),
        ("jit(train_step)/jvp(MlpMixer)/pre_head_layer_norm/mul", "LayerNorm"),
        ("state.params[\\'blocks\\'][\\'LayerNorm_1\\'][\\'scale\\']", "LayerNorm"),
        ("jit(train_step)/transpose(jvp(MlpMixer))/head/dot_general", "head and loss"),
        ("jit(train_step)/jvp(jit(log_sigmoid))/jit(softplus)/exp", "head and loss"),
        (
            "state.opt_state[1].nu[\\'block_2\\'][\\'token_mixing\\'][\\'Dense_1\\'][\\'kernel\\']",
            "optimizer",
        ),
        ("jit(train_step)/reduce_sum", "optimizer"),
        ("jit(classify)/div", "other"),
        ("jit(step)/jvp(Reference)/block_3/add", "other"),
        ("", "other"),
    ],
)
def test_region_of_op(op_name: str, region: str) -> None:
    assert region_of_op(op_name, REGIONS) == region


def test_region_of_instructions() -> None:
    program = parse_program(TRAIN_STEP)
    expected = {
        "sums.1": "LayerNorm",
        "copy-start.1": "channel mixing",
        "hidden": "channel mixing",
        "slice-start.1": "token mixing",
        "custom_kernel": "token mixing",
        "residual": "other",
        "copy-start.2": "channel mixing",
        "all-gather-start.1": "head and loss",
        "decayed": "optimizer",
        "result": "stem",
    }
    regions = {
        instruction.name: region_of(instruction, REGIONS)
        for instruction, _ in program.executed_instructions()
    }
    assert {name: regions[name] for name in expected} == expected


def test_sum_by_region() -> None:
    program = parse_program(TRAIN_STEP)
    x, kernel, hidden = 64 * 256 * 2, 256 * 512 * 2, 64 * 512 * 2
    traffic = sum_by_region(iter_hbm_bytes(program), REGIONS)
    assert traffic == {
        "stem": 2 * hidden,
        # The custom kernel's third operand and result, which alias, but not its first operand,
        # which is in on-chip memory; and the load of its second operand.
        "token mixing": 2 * x + kernel,
        # The load of a kernel into on-chip memory, the input of the matmul, and the copy of its
        # output from on-chip memory.
        "channel mixing": kernel + x + 64 * 4 + hidden,
        "LayerNorm": x + (256 + 64) * 4,
        # An all-gather from on-chip memory doubles the array.
        "head and loss": 2 * x,
        "optimizer": 2 * 512 * 256 * 4,
        "other": 2 * x,
    }
    assert sum(traffic.values()) == hbm_bytes_by_opcode(program).total()
    flops = sum_by_region(iter_matmul_flops(program), REGIONS)
    assert flops["channel mixing"] == 2 * 64 * 256 * 512
    assert flops["token mixing"] == 16_777_216  # The custom kernel's estimate.
    assert sum(flops.values()) == 2 * 16_777_216


class CompiledStep(NamedTuple):
    """A compiled step, and the bytes that it accesses according to the compiler."""

    compiled: Compiled
    bytes_accessed: float


@pytest.fixture(scope="module")
def steps() -> Iterator[dict[str, CompiledStep]]:
    """Training steps of a tiny Mixer, compiled for a TPU: the reference, and ours as a scan."""
    bytes_accessed = []
    compile_lowered = jax.stages.Lowered.compile

    def compile_and_record(lowered: Any) -> Any:
        compiled = compile_lowered(lowered)
        cost: Any = compiled.cost_analysis()
        bytes_accessed.append(cost["bytes accessed"])
        return compiled

    with tpu_device("v6e:2x2") as device, pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "tiny", TINY)
        patch.setattr(jax.stages.Lowered, "compile", compile_and_record)
        compiled_steps = {}
        for candidate in (
            Candidate("reference", REFERENCE),
            Candidate("ours", MIXER_JAX, {"scan_unroll": 1, "remat": "dots"}),
        ):
            compiled = compile_step(candidate, WORKLOAD, device, fast_compile=True)
            assert isinstance(compiled, Compiled)
            compiled_steps[candidate.name] = CompiledStep(compiled, bytes_accessed[-1])
        yield compiled_steps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference", "ours"])
def test_regions_of_compiled_step(steps: dict[str, CompiledStep], name: str) -> None:
    program = steps[name].compiled.program
    assert not program.unknown_trip_count_loops()
    traffic = sum_by_region(iter_hbm_bytes(program), REGIONS)
    assert sum(traffic.values()) == hbm_bytes_by_opcode(program).total()
    assert all(traffic[region] > 0 for region in traffic if region != OTHER)
    assert traffic[OTHER] < 0.03 * sum(traffic.values())
    # The compiler may transform matmuls, but not add or remove any.
    estimates = estimate_traffic(
        get_family("mixer"),
        TINY,
        WORKLOAD.image_size,
        WORKLOAD.num_classes,
        batch_size=WORKLOAD.batch_size,
    )
    flops = sum_by_region(iter_matmul_flops(program), REGIONS)
    assert flops == {
        region: WORKLOAD.batch_size * estimate.flops for region, estimate in estimates.items()
    }


@pytest.mark.slow
def test_traffic_matches_compiler(steps: dict[str, CompiledStep]) -> None:
    # Not for a scan: the compiler counts its body once.
    compiled, bytes_accessed = steps["reference"]
    # The compiler also counts on-chip memory, and reads and writes of asynchronous copies twice.
    without_spaces = parse_program(re.sub(r"S\(\d+\)", "", compiled.text))
    traffic = hbm_bytes_by_opcode(without_spaces)
    copies = sum(
        num_bytes
        for instruction, num_bytes in iter_hbm_bytes(without_spaces)
        if instruction.opcode == "copy-start"
    )
    assert traffic.total() + copies == pytest.approx(bytes_accessed, rel=0.01)
