"""`--mode=train,infer`: images/s, latency, MFU and memory, with baselines. Does not import JAX."""

import argparse
import sys
from importlib import metadata
from pathlib import Path

from mixer_jax.benchmarks.args import (
    add_workload_args,
    missing_timm_package,
    parse_baselines,
    parse_candidates,
    parse_workload,
)
from mixer_jax.benchmarks.candidates import JAX, TORCH
from mixer_jax.benchmarks.compare import Trial, compare, find_batch_size, query_environment
from mixer_jax.benchmarks.report import (
    add_output_args,
    check_outputs,
    print_throughput,
    write_report,
)
from mixer_jax.cli.common import check_positive

DESCRIPTION = "Measure training and inference of a Mixer on this machine, with baselines."


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


def run(args: argparse.Namespace) -> None:
    """Measures all candidates and prints the result.

    Raises:
        UserError: An argument is out of range.
        RunError: mixer_jax cannot be measured.
    """
    workloads = [parse_workload(args, mode) for mode in args.mode.split(",")]
    check_positive(args, "rounds")
    candidates = {w.mode: parse_candidates(args, w.mode) for w in workloads}
    baselines = parse_baselines(args)
    check_outputs(args)

    every_candidate = [c for mode_candidates in candidates.values() for c in mode_candidates]
    environment = query_environment(workloads[0], every_candidate)
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
            workload, trials = find_batch_size(workload, ours[0], platform)
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
    report = {**environment, "rounds": args.rounds, "modes": modes}
    write_report(args, report)
    if not args.json:
        print_throughput(report)
