"""Measure this machine: the training step, the input pipeline, or weights, beside their peers.

    python -m mixer_jax.benchmark --variant=B/16 --batch_size=8 --unroll=1,12
    python -m mixer_jax.benchmark --mode=input
    python -m mixer_jax.benchmark --mode=weights

What is compared is timed in turn, round by round, so that a machine that slows down slows all of
it.
"""

from collections.abc import Sequence

from mixer_jax import command_line
from mixer_jax.benchmarks import input as input_pipeline
from mixer_jax.benchmarks import step as training_step
from mixer_jax.benchmarks import weights

MODES = {"step": training_step, "input": input_pipeline, "weights": weights}


def main(arguments: Sequence[str]) -> int:
    """Measures as the command line says; returns the exit code."""
    common = command_line.Parser(add_help=False)
    common.add_argument(
        "--mode",
        default="step",
        choices=list(MODES),
        help="what to measure; default: step; --mode=input --help tells what that takes",
    )
    common.add_argument("--json", action="store_true", help="print one JSON object, no table")
    mode = MODES[common.parse_known_args(arguments)[0].mode]
    parser = command_line.Parser(
        prog="python -m mixer_jax.benchmark",
        description=mode.DESCRIPTION,
        parents=[common],
    )
    mode.add_arguments(parser)
    mode.run(parser.parse_args(arguments))
    return 0


if __name__ == "__main__":
    command_line.run(main)
