"""Measure this machine: training, inference, compilation, input and weights, beside their peers.

    python -m mixer_jax.benchmark --mode=train,infer --variant=B/16 --peers=timm,reference
    python -m mixer_jax.benchmark --mode=compile --variant=L/16
    python -m mixer_jax.benchmark --mode=hbm_traffic --variant=B/16 --topology=v6e:2x2
    python -m mixer_jax.benchmark --mode=input
    python -m mixer_jax.benchmark --mode=weights

What is compared is timed in turn, round by round, so that a machine that slows down slows all of
it.
"""

import importlib
from collections.abc import Sequence

from mixer_jax.cli import common
from mixer_jax.errors import UserError

# Imported when asked for; those of the same file can be measured in one run.
MODES = {
    "train": "speed",
    "infer": "speed",
    "compile": "compiling",
    "hbm_traffic": "tpu_traffic",
    "input": "input",
    "weights": "weights",
}


def main(arguments: Sequence[str]) -> int:
    """Measures as the command line says; returns the exit code."""
    shared = common.ArgumentParser(add_help=False)
    shared.add_argument(
        "--mode",
        default="train",
        help=f"what to measure: {', '.join(MODES)}, or train,infer; default: train; "
        "--mode=input --help tells what that takes",
    )
    shared.add_argument("--json", action="store_true", help="print one JSON object, no table")
    file = _file_of(shared.parse_known_args(arguments)[0].mode)
    mode = importlib.import_module(f"mixer_jax.benchmarks.{file}")
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.benchmark",
        description=mode.DESCRIPTION,
        parents=[shared],
    )
    mode.add_arguments(parser)
    mode.run(parser.parse_args(arguments))
    return 0


def _file_of(text: str) -> str:
    """Returns the file of the modes in a list."""
    names = text.split(",")
    for name in names:
        if name not in MODES:
            raise UserError(f"--mode={text}: {name!r} is unknown; choose of {', '.join(MODES)}")
    files = {MODES[name] for name in names}
    if len(files) > 1 or len(set(names)) < len(names):
        raise UserError(f"--mode={text} cannot be measured in one run; pass one, or train,infer")
    return files.pop()


if __name__ == "__main__":
    common.run_cli(main)
