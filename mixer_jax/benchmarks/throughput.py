"""`--mode=train,infer`: images/s, latency, MFU and memory, with baselines. Does not import JAX."""

import argparse
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from mixer_jax.benchmarks.candidates import (
    JAX,
    TORCH,
    Candidate,
    Workload,
    add_workload_args,
    missing_timm_package,
    parse_baselines,
    parse_candidates,
    parse_workload,
)
from mixer_jax.benchmarks.compare import compare, query_environment
from mixer_jax.benchmarks.report import (
    Column,
    add_output_args,
    check_outputs,
    format_environment,
    format_workload,
    log,
    print_table,
)
from mixer_jax.benchmarks.workers import Worker, WorkerError
from mixer_jax.cli.common import check_positive
from mixer_jax.errors import RunError
from mixer_jax.planning.batch_size import Trial, search_batch_size

DESCRIPTION = "Measure training and inference on this machine, with baselines."
_COLUMNS = [
    Column("images/s", "images_per_second"),
    Column("ms/step", "step_seconds", ".1f", 1000),
    Column("latency ms", "latency_seconds", ".2f", 1000),
    Column("MFU %", "mfu", ".1f", 100),
    Column("memory GiB", "memory_bytes", ".2f", 2**-30),
    Column("compile s", "compile_seconds", ".1f"),
    Column("first step s", "first_step_seconds", ".1f"),
    Column("relative time", "relative_time"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of these modes."""
    add_workload_args(parser)
    parser.add_argument(
        "--batch_size",
        default="auto",
        help="images per step; default: auto, doubled until mixer_jax gains no more than 2 %%",
    )
    parser.add_argument(
        "--baselines", help="none, or a list of reference and timm; default: all installed ones"
    )
    parser.add_argument(
        "--no_torch_compile", action="store_true", help="leave out timm with torch.compile"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; default: 5")
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="write a profile of mixer_jax for each mode"
    )
    add_output_args(parser, plot=True)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all candidates.

    Raises:
        UserError: An argument is out of range.
        RunError: mixer_jax cannot be measured.
    """
    workloads = [parse_workload(args, mode) for mode in args.mode.split(",")]
    check_positive(args, "rounds")
    candidates = {w.mode: parse_candidates(args, w) for w in workloads}
    baselines = parse_baselines(args, workloads[0], with_timm=True)
    check_outputs(args)

    # All modes have the same backends.
    environment = query_environment(workloads[0], candidates[workloads[0].mode])
    platform = environment["platform"]
    # Printed only now, so that a usage error is one line.
    if args.baselines is None and (missing := missing_timm_package()):
        print(f"{missing} is not installed: timm is skipped", file=sys.stderr)
    if platform not in ("cpu", "gpu") and any(b.framework == TORCH for b in baselines):
        print(f"timm does not run on {platform}: it is skipped", file=sys.stderr)
        baselines = [baseline for baseline in baselines if baseline.framework == JAX]
    if any(baseline.framework == TORCH for baseline in baselines):
        environment |= {name: metadata.version(name) for name in ("torch", "timm")}

    modes = []
    for workload in workloads:
        ours = candidates[workload.mode]
        trials: list[Trial] = []
        workload = workload._replace(dtype=environment["dtype"])
        if not workload.batch_size:
            batch_size, trials = find_batch_size(workload, ours[0], platform)
            workload = workload._replace(batch_size=batch_size)
        profile_dir = str(args.profile / workload.mode) if args.profile else ""
        result = compare(workload, [*ours, *baselines], args.rounds, platform, profile_dir)
        modes.append(
            {
                **workload._asdict(),
                "batch_size_trials": [trial._asdict() for trial in trials] or None,
                "matmul_flops_per_second": result.matmul_flops_per_second,
                "isolated": result.isolated,
                "candidates": [row._asdict() for row in result.results],
            }
        )
    return {**environment, "rounds": args.rounds, "modes": modes}


def print_report(report: dict[str, Any]) -> None:
    """Prints a table for each mode."""
    print(format_environment(report))
    for mode in report["modes"]:
        rates = [
            f"{name} {rate / 1e9:,.0f}" for name, rate in mode["matmul_flops_per_second"].items()
        ]
        print(f"\n{mode['mode']}: {format_workload(mode)}")
        print(f"GFLOP/s of a large matmul: {', '.join(rates)}")
        if mode["isolated"]:
            print("JAX and PyTorch ran one at a time, because both do not fit into memory")
        print_table(mode["candidates"], _COLUMNS)


def find_batch_size(
    workload: Workload, candidate: Candidate, platform: str
) -> tuple[int, list[Trial]]:
    """Searches for a good batch size; returns it, and all trials in order.

    Raises:
        RunError: The candidate fails, or batch size 1 does not fit into memory.
    """
    with Worker(JAX, workload) as worker:

        def try_batch_size(batch_size: int) -> float | None:
            log(f"{workload.mode}: trying {batch_size} images per step")
            for _ in range(2):
                try:
                    rate: float = worker.call(
                        "images_per_second", candidate=candidate, batch_size=batch_size
                    )
                except WorkerError as error:
                    if not error.out_of_memory:
                        raise RunError(f"{candidate.name} failed: {error}") from error
                    # The second try is in a new process, whose memory is not fragmented.
                    worker.stop()
                else:
                    return rate
            return None

        batch_size, trials = search_batch_size(try_batch_size, 8 if platform == "cpu" else 64)
    if not batch_size:
        raise RunError("batch size 1 does not fit into the device's memory.")
    return batch_size, trials
