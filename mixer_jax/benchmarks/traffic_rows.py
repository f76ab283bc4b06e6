"""What steps move to and from memory, as compiled and by formula: rows of a table, and as JSON."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mixer_jax.benchmarks.contestants import Setting
from mixer_jax.benchmarks.table import Column, print_rows
from mixer_jax.models.mixer_config import get_config
from mixer_jax.planning.hlo.attribution import OPTIMIZER, OTHER
from mixer_jax.planning.mixer_costs import REGIONS
from mixer_jax.planning.roofline import roofline_bound
from mixer_jax.planning.topology import GIB, Topology
from mixer_jax.planning.traffic_model import StepSpec, estimate_traffic

_MB, _GIGA, _MICRO = 1e6, 1e9, 1e-6
_NOTE = (
    "MB, GFLOP and µs are of an image, on one device at its peak rates: floors, not forecasts. By\n"
    "formula: every product reads and writes its arrays once, or hidden units never leave the chip."
)
_ITEMSIZES = {"bfloat16": 2, "float32": 4}


class Step(NamedTuple):
    """What a step takes on one device; bytes, FLOPs and seconds are those of an image.

    Attributes:
        name: of the contestant, or of the floor.
        failed: why the step does not fit into the memory; None: it does.
        bytes_by_part: moved to and from memory, by part of the model; none where it does not fit.
        flops_by_part: of the products that are executed, likewise.
        arithmetic_seconds: that all FLOPs take at the peak of the chip.
        memory_seconds: that all bytes take at the peak of its memory.
        temporary_bytes: of the whole batch: activations, gradients and the like; of a floor None.
        compile_seconds: of a floor None.
        uncounted_loops: with products in them, that count as if they ran once, because it is not
            known how often they run.
    """

    name: str
    failed: str | None
    bytes_by_part: dict[str, float]
    flops_by_part: dict[str, float]
    arithmetic_seconds: float
    memory_seconds: float
    temporary_bytes: int | None = None
    compile_seconds: float | None = None
    uncounted_loops: int = 0

    @property
    def num_bytes(self) -> float:
        """Bytes of all parts."""
        return sum(self.bytes_by_part.values())

    @property
    def bound_seconds(self) -> float:
        """The longer of arithmetic and memory."""
        return max(self.arithmetic_seconds, self.memory_seconds)


def make_step(
    name: str,
    bytes_by_part: dict[str, float],
    flops_by_part: dict[str, float],
    images: int,
    topology: Topology,
) -> Step:
    """Returns a step of one image from what one of several images takes.

    Args:
        name: of the contestant.
        bytes_by_part: of all images.
        flops_by_part: of all images.
        images: how many these are.
        topology: it is for.
    """
    num_bytes = {part: number / images for part, number in bytes_by_part.items()}
    flops = {part: number / images for part, number in flops_by_part.items()}
    least = roofline_bound(topology, [], sum(flops.values()), sum(num_bytes.values()), [])
    return Step(name, None, num_bytes, flops, least.arithmetic, least.memory)


def floors(setting: Setting, topology: Topology) -> list[Step]:
    """Returns what a step takes at the least, by formula."""
    work = StepSpec(
        get_config(setting.variant),
        setting.image_size,
        setting.num_classes,
        setting.batch_size,
        _ITEMSIZES[setting.dtype],
        setting.mode == "train",
    )
    needs = estimate_traffic(work)
    apart = {part: need.unfused_bytes for part, need in needs.items()}
    flops = {part: need.flops for part, need in needs.items()}
    fused = {part: need.fused_bytes for part, need in needs.items()}
    flops_fused = {part: need.fused_flops for part, need in needs.items()}
    return [
        make_step("formula: products apart", apart, flops, 1, topology),
        make_step("formula: MLPs fused", fused, flops_fused, 1, topology),
    ]


def as_json(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Returns steps as what JSON can hold, with their ratios to the first that fits."""
    first = next(step for step in steps if not step.failed)

    def row_of(step: Step) -> dict[str, Any]:
        if step.failed:
            known = ("name", "failed", "compile_seconds")
            return {name: value for name, value in step._asdict().items() if name in known}
        return step._asdict() | {
            "num_bytes": step.num_bytes,
            "bytes_ratio": step.num_bytes / first.num_bytes,
            "bound_seconds": step.bound_seconds,
            "bound_ratio": step.bound_seconds / first.bound_seconds,
        }

    return [row_of(step) for step in steps]


def print_steps(rows: list[dict[str, Any]]) -> None:
    """Prints steps, as `as_json` returns them, in two tables: bytes by part, and all else."""
    parts: list[Column] = [
        ("MB in all", "num_bytes", lambda v: f"{v / _MB:.1f}"),
        *[
            (part.split()[0], part, lambda v: f"{v / _MB:.1f}")
            for part in [*REGIONS, OPTIMIZER, OTHER]
        ],
    ]
    print_rows([row | row.get("bytes_by_part", {}) for row in rows], parts)
    print()
    costs: list[Column] = [
        ("GFLOP", "flops", lambda v: f"{v / _GIGA:.1f}"),
        ("arithmetic µs", "arithmetic_seconds", lambda v: f"{v / _MICRO:.1f}"),
        ("memory µs", "memory_seconds", lambda v: f"{v / _MICRO:.1f}"),
        ("to first", "bound_ratio", lambda v: f"{v:.2f}"),
        ("temporary GiB", "temporary_bytes", lambda v: f"{v / GIB:.2f}"),
        ("compile s", "compile_seconds", lambda v: f"{v:.0f}"),
    ]
    fitting = [row for row in rows if not row["failed"]]
    print_rows([row | {"flops": sum(row["flops_by_part"].values())} for row in fitting], costs)
    for row in fitting:
        if row["uncounted_loops"]:
            print(f"{row['name']}: how often a loop runs is not known; it counts as once")
    print(f"\n{_NOTE}")
