"""`--mode=hbm_traffic`: bytes that each step moves to and from a TPU's memory, without a TPU.

The TPU compiler compiles the step; bytes and FLOPs are counted in the compiled program and
attributed to regions of the model, next to lower bounds by formula. Bytes show where time goes that
is not spent on matmuls, before there is a chip to measure on. Does not import JAX.
"""

import argparse
import importlib.metadata
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mixer_jax.benchmarks.args import (
    add_baselines_arg,
    add_workload_args,
    parse_candidates,
    parse_workload,
)
from mixer_jax.benchmarks.candidates import FAMILY, REFERENCE, Candidate, Workload
from mixer_jax.benchmarks.compile import compile_step, open_tpu_device, parse_tpu_topology
from mixer_jax.benchmarks.report import (
    Column,
    add_output_args,
    check_outputs,
    print_table,
    write_report,
)
from mixer_jax.errors import RunError
from mixer_jax.planning.hlo_costs import iter_hbm_bytes, iter_matmul_flops, sum_by_region
from mixer_jax.planning.roofline import estimate_traffic, roofline_bound
from mixer_jax.planning.topology import GIB, Topology

if TYPE_CHECKING:
    from mixer_jax.planning.aot_compile import Compiled, OutOfMemory

DESCRIPTION = (
    "Compile a Mixer's step for a TPU that is not attached, and count the bytes that it moves to "
    "and from memory."
)

_MB, _GIGA, _MICRO = 1e6, 1e9, 1e-6
_NOTE = (
    "MB, GFLOP and µs are per image on one device at its peak rates: lower bounds, not forecasts.\n"
    "By formula, every matmul reads and writes its arrays once (unfused), or hidden activations\n"
    "never leave the chip (fused)."
)
_ITEMSIZES = {"bfloat16": 2, "float32": 4}


class StepTraffic(NamedTuple):
    """Costs of one step on one device; bytes, FLOPs and seconds are per image.

    Attributes:
        name: Name of the candidate or of the lower bound.
        failed: Reason why the step does not fit into memory; None if it does.
        bytes_by_region: Bytes moved to and from memory, by region of the model.
        flops_by_region: FLOPs of the matmuls that are executed, by region of the model.
        arithmetic_seconds: Time of all FLOPs at the peak rate of the chip.
        memory_seconds: Time of all bytes at the peak bandwidth of its memory.
        temporary_bytes: Activations, gradients and the like of the whole batch; None for a bound.
        compile_seconds: Compilation time; None for a bound.
        unknown_trip_count_loops: Loops with matmuls whose trip count is unknown; they are counted
            as if they ran once.
    """

    name: str
    failed: str | None
    bytes_by_region: dict[str, float]
    flops_by_region: dict[str, float]
    arithmetic_seconds: float
    memory_seconds: float
    temporary_bytes: int | None = None
    compile_seconds: float | None = None
    unknown_trip_count_loops: int = 0

    @property
    def num_bytes(self) -> float:
        """Bytes of all regions."""
        return sum(self.bytes_by_region.values())

    @property
    def bound_seconds(self) -> float:
        """The longer of arithmetic and memory time."""
        return max(self.arithmetic_seconds, self.memory_seconds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this mode."""
    add_workload_args(parser)
    parser.add_argument(
        "--topology", default="v6e:2x2", metavar="CHIP:SIZE", help="TPUs; default: v6e:2x2"
    )
    parser.add_argument(
        "--batch_size", type=int, default=128, help="images per step and device; default: 128"
    )
    parser.add_argument(
        "--step", default="train", choices=["train", "infer"], help="default: train"
    )
    add_baselines_arg(parser)
    parser.add_argument("--quick", action="store_true", help="compile faster, to slower programs")
    parser.add_argument(
        "--dump", type=Path, metavar="FOLDER", help="write the compiled programs to a folder"
    )
    add_output_args(parser)


def run(args: argparse.Namespace) -> None:
    """Compiles all candidates and prints the result.

    Raises:
        UserError: An argument is out of range, or the compiler is missing.
        RunError: A program cannot be written.
    """
    topology = parse_tpu_topology(args.topology)
    workload = parse_workload(args, args.step)
    candidates = [Candidate(REFERENCE, REFERENCE)] if args.baselines == REFERENCE else []
    candidates += parse_candidates(args, args.step)
    check_outputs(args)
    dtype = "bfloat16" if workload.dtype == "auto" else workload.dtype
    workload = workload._replace(dtype=dtype)

    device = open_tpu_device(topology, candidates)
    from mixer_jax.planning.aot_compile import Compiled

    steps = []
    for candidate in candidates:
        print(f"compiling {candidate.name}", file=sys.stderr, flush=True)
        compiled = compile_step(candidate, workload, device, fast_compile=args.quick)
        if args.dump and isinstance(compiled, Compiled):
            _write_program(args.dump, candidate.name, compiled.text)
        steps.append(measure_traffic(candidate.name, compiled, workload, topology))
    steps += lower_bounds(workload, topology)
    report = {
        **workload._asdict(),
        "topology": topology.name,
        "jax": importlib.metadata.version("jax"),
        "libtpu": importlib.metadata.version("libtpu"),
        "fast_compile": args.quick,
        "steps": traffic_to_dicts(steps),
    }
    write_report(args, report)
    if not args.json:
        step = "training step" if args.step == "train" else "inference"
        print(
            f"{step}: {workload.format()}\n"
            f"compiled for one device of {topology.name}, not run; jax {report['jax']}, "
            f"libtpu {report['libtpu']}\n"
        )
        print_traffic(report["steps"])


def _write_program(folder: Path, name: str, text: str) -> None:
    path = folder / f"{re.sub('[^a-z0-9]+', '_', name)}.hlo"
    try:
        path.write_text(text)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}).") from error


def measure_traffic(
    name: str, compiled: "Compiled | OutOfMemory", workload: Workload, topology: Topology
) -> StepTraffic:
    """Counts the bytes and FLOPs of a compiled step."""
    from mixer_jax.planning.aot_compile import OutOfMemory

    if isinstance(compiled, OutOfMemory):
        failed = f"too large, {_format_memory(compiled, topology)}"
        return StepTraffic(name, failed, {}, {}, 0.0, 0.0, compile_seconds=compiled.compile_seconds)
    program = compiled.program
    regions = FAMILY.regions
    num_bytes = sum_by_region(iter_hbm_bytes(program), regions)
    flops = sum_by_region(iter_matmul_flops(program), regions)
    step = _traffic_per_image(name, num_bytes, flops, workload.batch_size, topology)
    return step._replace(
        temporary_bytes=compiled.temporary_bytes,
        compile_seconds=compiled.compile_seconds,
        unknown_trip_count_loops=len(program.unknown_trip_count_loops()),
    )


def _format_memory(step: "OutOfMemory", topology: Topology) -> str:
    if step.needed_bytes is None:
        return step.message
    available = (step.available_bytes or topology.hbm_bytes) / GIB
    note = ", without state and batch" if step.excludes_arguments else ""
    return f"{step.needed_bytes / GIB:.2f} GiB of {available:.2f}{note}"


def _traffic_per_image(
    name: str,
    bytes_by_region: dict[str, float],
    flops_by_region: dict[str, float],
    num_images: int,
    topology: Topology,
) -> StepTraffic:
    num_bytes = {region: value / num_images for region, value in bytes_by_region.items()}
    flops = {region: value / num_images for region, value in flops_by_region.items()}
    bound = roofline_bound(topology, [], sum(flops.values()), sum(num_bytes.values()), [])
    return StepTraffic(name, None, num_bytes, flops, bound.arithmetic, bound.memory)


def lower_bounds(workload: Workload, topology: Topology) -> list[StepTraffic]:
    """Computes lower bounds per step by formula, with and without fused MLPs."""
    traffic = estimate_traffic(
        FAMILY,
        FAMILY.get_config(workload.variant),
        workload.image_size,
        workload.num_classes,
        batch_size=workload.batch_size,
        itemsize=_ITEMSIZES[workload.dtype],
        train=workload.mode == "train",
    )
    unfused = {region: value.unfused_bytes for region, value in traffic.items()}
    flops = {region: value.flops for region, value in traffic.items()}
    fused = {region: value.fused_bytes for region, value in traffic.items()}
    flops_fused = {region: value.fused_flops for region, value in traffic.items()}
    return [
        _traffic_per_image("formula: unfused", unfused, flops, 1, topology),
        _traffic_per_image("formula: fused MLPs", fused, flops_fused, 1, topology),
    ]


def traffic_to_dicts(steps: Sequence[StepTraffic]) -> list[dict[str, Any]]:
    """Converts steps for JSON, with their ratios to the first that fits into memory."""
    first = next(step for step in steps if not step.failed)

    def to_dict(step: StepTraffic) -> dict[str, Any]:
        if step.failed:
            known = ("name", "failed", "compile_seconds")
            return {name: value for name, value in step._asdict().items() if name in known}
        return step._asdict() | {
            "num_bytes": step.num_bytes,
            "bytes_ratio": step.num_bytes / first.num_bytes,
            "bound_seconds": step.bound_seconds,
            "bound_ratio": step.bound_seconds / first.bound_seconds,
        }

    return [to_dict(step) for step in steps]


def print_traffic(rows: list[dict[str, Any]]) -> None:
    """Prints two tables from the result of `traffic_to_dicts`: bytes by region, and the rest."""
    regions: list[Column] = [
        ("MB in total", "num_bytes", lambda v: f"{v / _MB:.1f}"),
        *[
            (region.split()[0], region, lambda v: f"{v / _MB:.1f}")
            for region in next(row["bytes_by_region"] for row in rows if not row["failed"])
        ],
    ]
    print_table([row | row.get("bytes_by_region", {}) for row in rows], regions)
    print()
    costs: list[Column] = [
        ("GFLOP", "flops", lambda v: f"{v / _GIGA:.1f}"),
        ("arithmetic µs", "arithmetic_seconds", lambda v: f"{v / _MICRO:.1f}"),
        ("memory µs", "memory_seconds", lambda v: f"{v / _MICRO:.1f}"),
        ("relative bound", "bound_ratio", lambda v: f"{v:.2f}"),
        ("temporaries GiB", "temporary_bytes", lambda v: f"{v / GIB:.2f}"),
        ("compile s", "compile_seconds", lambda v: f"{v:.0f}"),
    ]
    fitting = [row for row in rows if not row["failed"]]
    print_table([row | {"flops": sum(row["flops_by_region"].values())} for row in fitting], costs)
    for row in fitting:
        if row["unknown_trip_count_loops"]:
            print(f"{row['name']}: the trip count of a loop is unknown; it counts as one")
    print(f"\n{_NOTE}")
