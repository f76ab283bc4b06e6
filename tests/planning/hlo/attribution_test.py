"""Attribution of traffic and FLOPs to regions, of a hand-written and of compiled programs."""

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
from mixer_jax.planning.hlo.attribution import (
    OTHER,
    RegionAttribution,
    region_of_op,
    sum_by_region,
)
from mixer_jax.planning.hlo.flops import iter_matmul_flops
from mixer_jax.planning.hlo.program import parse_program
from mixer_jax.planning.hlo.traffic import hbm_bytes_by_opcode, iter_hbm_bytes
from mixer_jax.planning.traffic_model import StepSpec, estimate_traffic
from tests.helpers.hlo_programs import TRAIN_STEP
from tests.helpers.tpu_compiler import tpu_device

TINY = MixerConfig(2, 16, 128, 64, 256)
WORKLOAD = Workload("train", "tiny", 64, 10, "bfloat16", 8)


@pytest.mark.parametrize(
    ("op_name", "region"),
    [
        ("jit(train_step)/jvp(MlpMixer)/stem/conv_general_dilated", "stem"),
        ("batch[\\'image\\']", "stem"),
        (
            "jit(step)/transpose(jvp(ReferenceMixer))/block_3/token_mixing/Dense_0/dot_general",
            "token mixing",
        ),
        ("jit(step)/jvp(ReferenceMixer)/block_11/transpose", "token mixing"),
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
        ("jit(step)/jvp(ReferenceMixer)/block_3/add", "other"),
        ("", "other"),
    ],
)
def test_region_of_op(op_name: str, region: str) -> None:
    assert region_of_op(op_name, REGIONS) == region


def test_region_of_instructions() -> None:
    program = parse_program(TRAIN_STEP)
    attribution = RegionAttribution(program, REGIONS)
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
        e.instruction.name: attribution.region_of(e) for e in program.executed_instructions()
    }
    assert {name: regions[name] for name in expected} == expected


def test_sum_by_region() -> None:
    program = parse_program(TRAIN_STEP)
    x, kernel, hidden = 64 * 256 * 2, 256 * 512 * 2, 64 * 512 * 2
    traffic = sum_by_region(program, iter_hbm_bytes(program), REGIONS)
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
    flops = sum_by_region(program, iter_matmul_flops(program), REGIONS)
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
    traffic = sum_by_region(program, iter_hbm_bytes(program), REGIONS)
    assert sum(traffic.values()) == hbm_bytes_by_opcode(program).total()
    assert all(traffic[region] > 0 for region in traffic if region != OTHER)
    assert traffic[OTHER] < 0.03 * sum(traffic.values())
    # The compiler may transform matmuls, but not add or remove any.
    step = StepSpec(
        get_family("mixer"), TINY, WORKLOAD.image_size, WORKLOAD.num_classes, WORKLOAD.batch_size
    )
    flops = sum_by_region(program, iter_matmul_flops(program), REGIONS)
    assert flops == {
        region: WORKLOAD.batch_size * estimate.flops
        for region, estimate in estimate_traffic(step).items()
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
        for executed, num_bytes in iter_hbm_bytes(without_spaces)
        if executed.instruction.opcode == "copy-start"
    )
    assert traffic.total() + copies == pytest.approx(bytes_accessed, rel=0.01)
