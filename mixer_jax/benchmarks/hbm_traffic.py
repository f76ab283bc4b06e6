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
from typing import TYPE_CHECKING, Any

from mixer_jax.benchmarks.candidates import (
    Workload,
    add_baselines_arg,
    add_workload_args,
    parse_baselines,
    parse_candidates,
    parse_workload,
)
from mixer_jax.benchmarks.compile import compile_step, open_tpu_device, parse_tpu_topology
from mixer_jax.benchmarks.report import (
    Column,
    add_output_args,
    check_outputs,
    format_workload,
    print_table,
)
from mixer_jax.errors import RunError
from mixer_jax.planning.hlo_costs import iter_hbm_bytes, iter_matmul_flops, sum_by_region
from mixer_jax.planning.roofline import estimate_traffic, roofline_bound
from mixer_jax.planning.topology import GIB, Topology

if TYPE_CHECKING:
    from mixer_jax.planning.aot_compile import Compiled, OutOfMemory

DESCRIPTION = (
    "Compile a step for a TPU that is not attached, and count the bytes that it moves to "
    "and from memory."
)

_NOTE = (
    "MB, GFLOP and µs are per image on one device at its peak rates: lower bounds, not forecasts.\n"
    "By formula, every matmul and convolution reads and writes its arrays once (unfused), or the\n"
    "hidden activations of a residual branch never leave the chip (fused)."
)
_ITEMSIZES = {"bfloat16": 2, "float32": 4}


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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles all candidates and counts what their steps move.

    Raises:
        UserError: An argument is out of range, or the compiler is missing.
        RunError: A program cannot be written.
    """
    topology = parse_tpu_topology(args.topology)
    workload = parse_workload(args, args.step)
    candidates = [*parse_baselines(args, workload), *parse_candidates(args, workload)]
    check_outputs(args)
    device, workload = open_tpu_device(topology, workload, candidates)
    from mixer_jax.planning.aot_compile import Compiled

    steps = []
    for candidate in candidates:
        print(f"compiling {candidate.name}", file=sys.stderr, flush=True)
        compiled = compile_step(candidate, workload, device, fast_compile=args.quick)
        if args.dump and isinstance(compiled, Compiled):
            _write_program(args.dump, candidate.name, compiled.text)
        steps.append(measure_traffic(candidate.name, compiled, workload, topology))
    steps += lower_bounds(workload, topology)
    add_ratios(steps)
    return {
        **workload._asdict(),
        "topology": topology.name,
        "jax": importlib.metadata.version("jax"),
        "libtpu": importlib.metadata.version("libtpu"),
        "fast_compile": args.quick,
        "steps": steps,
    }


def _write_program(folder: Path, name: str, text: str) -> None:
    path = folder / f"{re.sub('[^a-z0-9]+', '_', name)}.hlo"
    try:
        path.write_text(text)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}).") from error


def measure_traffic(
    name: str, compiled: "Compiled | OutOfMemory", workload: Workload, topology: Topology
) -> dict[str, Any]:
    """Counts the bytes and FLOPs of a compiled step; returns a row as `lower_bounds` does.

    Steps that do not fit into memory have `name`, `failed` and `compile_seconds` only.
    """
    from mixer_jax.planning.aot_compile import OutOfMemory

    if isinstance(compiled, OutOfMemory):
        failed = f"too large, {_format_memory(compiled, topology)}"
        return {"name": name, "failed": failed, "compile_seconds": compiled.compile_seconds}
    program = compiled.program
    row = _traffic_per_image(
        name,
        sum_by_region(iter_hbm_bytes(program), workload.family.regions),
        sum_by_region(iter_matmul_flops(program), workload.family.regions),
        workload.batch_size,
        topology,
    )
    return row | {
        "temporary_bytes": compiled.temporary_bytes,
        "compile_seconds": compiled.compile_seconds,
        # Loops with matmuls that are counted as if they ran once.
        "unknown_trip_count_loops": len(program.unknown_trip_count_loops()),
    }


def _format_memory(step: "OutOfMemory", topology: Topology) -> str:
    if step.needed_bytes is None:
        return step.message
    available = (step.available_bytes or topology.hbm_bytes) / GIB
    note = ", without state and batch" if step.excludes_arguments else ""
    return f"{step.needed_bytes / GIB:.2f} GiB of {available:.2f}{note}"


def lower_bounds(workload: Workload, topology: Topology) -> list[dict[str, Any]]:
    """Computes lower bounds per step by formula, with and without fused residual branches.

    Returns:
        Rows with bytes, FLOPs and seconds per image: bytes and FLOPs by region of the model and
        bytes in total, the time of all FLOPs and of all bytes at the peak rates of the chip, and
        the longer of the two. Memory and compilation are those of the whole batch, and None here.
    """
    traffic = estimate_traffic(
        workload.family,
        workload.config,
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
        _traffic_per_image("formula: fused branches", fused, flops_fused, 1, topology),
    ]


def _traffic_per_image(
    name: str,
    bytes_by_region: dict[str, float],
    flops_by_region: dict[str, float],
    num_images: int,
    topology: Topology,
) -> dict[str, Any]:
    num_bytes = {region: value / num_images for region, value in bytes_by_region.items()}
    flops = {region: value / num_images for region, value in flops_by_region.items()}
    bound = roofline_bound(topology, [], sum(flops.values()), sum(num_bytes.values()), [])
    return {
        "name": name,
        "failed": None,
        "bytes_by_region": num_bytes,
        "flops_by_region": flops,
        "arithmetic_seconds": bound.arithmetic,
        "memory_seconds": bound.memory,
        "temporary_bytes": None,
        "compile_seconds": None,
        "unknown_trip_count_loops": 0,
        "num_bytes": sum(num_bytes.values()),
        "bound_seconds": max(bound.arithmetic, bound.memory),
    }


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Adds the ratios to the first step that fits into memory."""
    fitting = [row for row in rows if not row["failed"]]
    for row in fitting:
        row["bytes_ratio"] = row["num_bytes"] / fitting[0]["num_bytes"]
        row["bound_ratio"] = row["bound_seconds"] / fitting[0]["bound_seconds"]


def print_report(report: dict[str, Any]) -> None:
    """Prints two tables: bytes by region, and the rest."""
    step = "training step" if report["mode"] == "train" else "inference"
    print(
        f"{step}: {format_workload(report)}\n"
        f"compiled for one device of {report['topology']}, not run; jax {report['jax']}, "
        f"libtpu {report['libtpu']}\n"
    )
    print_traffic(report["steps"])


def print_traffic(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the rows of a report."""
    fitting = [row for row in rows if not row["failed"]]
    regions = [
        Column("MB in total", "num_bytes", ".1f", 1e-6),
        *(Column(name.split()[0], name, ".1f", 1e-6) for name in fitting[0]["bytes_by_region"]),
    ]
    print_table([row | row.get("bytes_by_region", {}) for row in rows], regions)
    print()
    costs = [
        Column("GFLOP", "flops", ".1f", 1e-9),
        Column("arithmetic µs", "arithmetic_seconds", ".1f", 1e6),
        Column("memory µs", "memory_seconds", ".1f", 1e6),
        Column("relative bound", "bound_ratio"),
        Column("temporaries GiB", "temporary_bytes", ".2f", 1 / GIB),
        Column("compile s", "compile_seconds", ".0f"),
    ]
    print_table([row | {"flops": sum(row["flops_by_region"].values())} for row in fitting], costs)
    for row in fitting:
        if row["unknown_trip_count_loops"]:
            print(f"{row['name']}: the trip count of a loop is unknown; it counts as one")
    print(f"\n{_NOTE}")
