"""Tests of what a compiled program moves and executes, part by part: by hand, and by a compiler."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import pytest

from mixer_jax.benchmarks.candidates import MIXER_JAX, REFERENCE, Candidate, Workload
from mixer_jax.benchmarks.compile import compile_step
from mixer_jax.models.mixer_config import VARIANTS, MixerConfig
from mixer_jax.planning.aot_compile import Compiled
from mixer_jax.planning.hlo.attribution import (
    REGIONS,
    RegionAttribution,
    region_of_op,
    sum_by_region,
)
from mixer_jax.planning.hlo.flops import iter_matmul_flops
from mixer_jax.planning.hlo.program import read_program
from mixer_jax.planning.hlo.traffic import iter_hbm_bytes, traffic
from mixer_jax.planning.traffic_model import StepSpec, estimate_traffic
from tests.helpers.hlo_programs import PARTED
from tests.helpers.tpu_compiler import tpu_device

TINY = MixerConfig(2, 16, 128, 64, 256)
WORKLOAD = Workload("train", "tiny", 64, 10, "bfloat16", 8)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jit(step)/transpose(jvp(ReferenceMixer))/block_3/token_mixing/Dense_0/dot_general", 1),
        ("jit(train_step)/jvp(MlpMixer)/while/body/blocks/vmap(channel_mixing)/Dense_1/add", 2),
        ("jit(step)/jvp(ReferenceMixer)/block_11/transpose", 1),
        ("jit(train_step)/jvp(MlpMixer)/pre_head_layer_norm/mul", 3),
        ("jit(train_step)/jvp(MlpMixer)/stem/conv_general_dilated", 0),
        ("batch[\\'image\\']", 0),
        ("jit(train_step)/transpose(jvp(MlpMixer))/head/dot_general", 4),
        ("jit(train_step)/jvp(jit(log_sigmoid))/jit(softplus)/exp", 4),
        (
            "state.opt_state[1].nu[\\'block_2\\'][\\'token_mixing\\'][\\'Dense_1\\'][\\'kernel\\']",
            5,
        ),
        ("state.params[\\'blocks\\'][\\'LayerNorm_1\\'][\\'scale\\']", 3),
        ("jit(train_step)/reduce_sum", 5),
        ("jit(classify)/div", 6),
        ("jit(step)/jvp(ReferenceMixer)/block_3/add", 6),
        ("", 6),
    ],
)
def test_names(name: str, part: int) -> None:
    assert region_of_op(name) == REGIONS[part]


def test_parts_by_hand() -> None:
    program = read_program(PARTED)
    parts = RegionAttribution(program)
    found = {run.instruction.name: parts.of(run) for run in program.runs()}
    assert {name: part for name, part in found.items() if name in FOUND} == FOUND
    x, kernel, hidden = 64 * 256 * 2, 256 * 512 * 2, 64 * 512 * 2
    sums = sum_by_region(program, iter_hbm_bytes(program))
    assert sums == {
        "stem": 2 * hidden,
        # What the kernel by hand reads and writes in one place, its third operand and its result,
        # but not what lies on the chip; and its second operand, brought there in pieces.
        "token mixing": 2 * x + kernel,
        # A kernel brought on the chip, what goes into the product with it, and what comes out,
        # which is made on the chip and copied off it.
        "channel mixing": kernel + x + 64 * 4 + hidden,
        "LayerNorm": x + (256 + 64) * 4,
        # Gathered from the chip, twice as much as each device has.
        "head and loss": 2 * x,
        "optimizer": 2 * 512 * 256 * 4,
        "other": 2 * x,
    }
    assert sum(sums.values()) == traffic(program).total()
    flops = sum_by_region(program, iter_matmul_flops(program))
    assert flops["channel mixing"] == 2 * 64 * 256 * 512
    assert flops["token mixing"] == 16_777_216  # As the kernel by hand says itself.
    assert sum(flops.values()) == 2 * 16_777_216


def test_a_kernel_by_hand_may_read_something_again() -> None:
    once, again = PARTED, PARTED.replace('"bytes_accessed":"100"', '"bytes_accessed":"1000000"')
    # Hidden units and the second kernel lie on the chip.
    arrays = 2 * (64 * 512 + 512 * 256 + 2 * 64 * 256)
    more = traffic(read_program(again)).total() - traffic(read_program(once)).total()
    assert more == 1_000_000 - arrays


@pytest.mark.parametrize(
    ("shapes", "text", "flops"),
    [
        # A product as TPUs write it, and one over a batch axis, whose window meets each element
        # once: 8 products of (16, 32) and (32, 64).
        (
            ("bf16[16,32]", "bf16[32,64]"),
            "bf16[16,64] convolution(%a, %b), dim_labels=bf_io->bf",
            2 * 16 * 32 * 64,
        ),
        (
            ("bf16[8,16,32]", "bf16[8,32,64]"),
            "bf16[8,16,64] convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, "
            "dim_labels=0bf_0io->0bf",
            2 * 8 * 16 * 32 * 64,
        ),
        (
            ("bf16[2,64,64,3]", "bf16[16,16,3,128]"),
            "bf16[2,4,4,128] convolution(%a, %b), window={size=16x16 stride=16x16}, "
            "dim_labels=b01f_01io->b01f",
            2 * 2 * 16 * 768 * 128,
        ),
        # Of a window of 3 over 5 numbers, 2 of its 15 places are padding.
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
)
def test_flops_of_products(shapes: tuple[str, str], text: str, flops: int) -> None:
    lines = [
        f"  %{name} = {shape} parameter({n})"
        for n, (name, shape) in enumerate(zip("ab", shapes, strict=True))
    ]
    program = read_program("\n".join(["ENTRY %main () -> x {", *lines, f"  ROOT %c = {text}", "}"]))
    assert sum(number for _, number in iter_matmul_flops(program)) == flops


FOUND = {
    "sums.1": "LayerNorm",
    "copy-start.1": "channel mixing",
    "hidden": "channel mixing",
    "slice-start.1": "token mixing",
    "kernel_by_hand": "token mixing",
    "residual": "other",
    "copy-start.2": "channel mixing",
    "all-gather-start.1": "head and loss",
    "decayed": "optimizer",
    "result": "stem",
}


class Made(NamedTuple):
    """A step of a tiny Mixer, and the bytes that it accesses as the compiler counts them."""

    compiled: Compiled
    accessed: float


@pytest.fixture(scope="module")
def made() -> Iterator[dict[str, Made]]:
    """The reference, and ours as a loop over two blocks, compiled for a chip that is not here."""
    accessed = []
    compile_it = jax.stages.Lowered.compile

    def compile_and_ask(lowered: Any) -> Any:
        compiled = compile_it(lowered)
        cost: Any = compiled.cost_analysis()
        accessed.append(cost["bytes accessed"])
        return compiled

    with tpu_device("v6e:2x2") as device, pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "tiny", TINY)
        patch.setattr(jax.stages.Lowered, "compile", compile_and_ask)
        steps = {}
        for candidate in (
            Candidate("reference", REFERENCE),
            Candidate("ours", MIXER_JAX, {"scan_unroll": 1, "remat": "dots"}),
        ):
            compiled = compile_step(candidate, WORKLOAD, device, fast_compile=True)
            assert isinstance(compiled, Compiled)
            steps[candidate.name] = Made(compiled, accessed[-1])
        yield steps


@pytest.mark.parametrize("name", ["reference", "ours"])
def test_parts_of_a_real_step(made: dict[str, Made], name: str) -> None:
    program = made[name].compiled.program
    assert not program.uncounted()
    sums = sum_by_region(program, iter_hbm_bytes(program))
    assert sum(sums.values()) == traffic(program).total()
    assert all(sums[part] > 0 for part in REGIONS if part != "other")
    assert sums["other"] < 0.03 * sum(sums.values())
    # Products are those of the formula, whatever the compiler makes of them.
    needs = estimate_traffic(
        StepSpec(TINY, WORKLOAD.image_size, WORKLOAD.num_classes, WORKLOAD.batch_size)
    )
    flops = sum_by_region(program, iter_matmul_flops(program))
    assert flops == {part: WORKLOAD.batch_size * need.flops for part, need in needs.items()}


def test_the_reader_counts_what_the_compiler_counts(made: dict[str, Made]) -> None:
    compiled, accessed = made["reference"]
    # The compiler counts memory on the chip, too, and copies that go on in the background as read
    # and written twice; it knows nothing of loops, of which the reference has none.
    everywhere = read_program(re.sub(r"S\(\d+\)", "", compiled.text))
    counted = traffic(everywhere)
    copies = sum(
        n for run, n in iter_hbm_bytes(everywhere) if run.instruction.opcode == "copy-start"
    )
    assert counted.total() + copies == pytest.approx(accessed, rel=0.01)
