"""Benchmark training, inference, compilation, input and checkpoint I/O on this machine.

    python -m mixer_jax.benchmark --mode=train,infer --model=B/16 --baselines=timm,reference
    python -m mixer_jax.benchmark --mode=compile --model=L/16
    python -m mixer_jax.benchmark --mode=hbm_traffic --model=B/16 --topology=v6e:2x2
    python -m mixer_jax.benchmark --mode=input
    python -m mixer_jax.benchmark --mode=input --formats
    python -m mixer_jax.benchmark --mode=weights
    python -m mixer_jax.benchmark --mode=checkpoints
    python -m mixer_jax.benchmark --mode=resume
    python -m mixer_jax.benchmark --mode=loop

Candidates are timed in interleaved rounds, so that a machine that slows down slows all of them.
"""

import importlib
from collections.abc import Sequence

from mixer_jax.benchmarks.report import write_report
from mixer_jax.cli import common
from mixer_jax.errors import UserError

# Module of each mode, imported on demand; modes of one module can be measured in one run.
MODES = {
    "train": "throughput",
    "infer": "throughput",
    "compile": "compile",
    "hbm_traffic": "hbm_traffic",
    "input": "input",
    "weights": "checkpoint_io",
    "checkpoints": "checkpoint_save",
    "resume": "resume",
    "loop": "loop",
}


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark and returns the exit code."""
    shared = common.ArgumentParser(add_help=False)
    shared.add_argument(
        "--mode",
        default="train",
        help=f"one of {', '.join(MODES)}; train and infer can be combined: train,infer; default: "
        "train. --mode=MODE --help lists the arguments of a mode",
    )
    shared.add_argument("--json", action="store_true", help="print JSON instead of tables")
    module_name = _module_of(shared.parse_known_args(argv)[0].mode)
    mode = importlib.import_module(f"mixer_jax.benchmarks.{module_name}")
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.benchmark",
        description=mode.DESCRIPTION,
        parents=[shared],
    )
    mode.add_arguments(parser)
    args = parser.parse_args(argv)
    report = mode.measure(args)
    write_report(args, report)
    if not args.json:
        mode.print_report(report)
    return 0


def _module_of(modes: str) -> str:
    """Returns the module of a comma-separated list of modes."""
    names = modes.split(",")
    for name in names:
        if name not in MODES:
            raise UserError(f"--mode must be one of {', '.join(MODES)}, got {name!r}.")
    modules = {MODES[name] for name in names}
    if len(modules) > 1 or len(set(names)) < len(names):
        raise UserError(f"--mode must be a single mode or train,infer, got {modes}.")
    return modules.pop()


if __name__ == "__main__":
    common.run_cli(main)
