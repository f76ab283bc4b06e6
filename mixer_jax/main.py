"""Train or fine-tune a Mixer from a config file: `python -m mixer_jax.main --config=FILE`."""

import argparse
import signal
from collections.abc import Sequence

from mixer_jax import command_line
from mixer_jax.config import describe, validate
from mixer_jax.training import workdir as workdirs


def main(arguments: Sequence[str]) -> int:
    """Trains as the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mixer_jax.main",
        description="Train a Mixer, or resume the training in WORKDIR.",
        epilog=f"configuration keys, with their defaults:\n{describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="e.g. configs/digits.py"
    )
    parser.add_argument("--workdir", help="folder or gs:// URL; default: runs/CONFIG_NAME")
    parser.add_argument(
        "--config.KEY",
        metavar="VALUE",
        dest="unused",
        help="change a key, e.g. --config.optimizer.learning_rate=3e-3",
    )
    known, overrides = parser.parse_known_args(arguments)
    config = command_line.read_config(known.config, overrides)
    validate(config)
    default = f"runs/{command_line.experiment_name(known.config)}"
    workdir = workdirs.absolute(known.workdir or default)
    for change in workdirs.check(workdir, config):
        print(f"changed since this run was last started: {change}")

    # From here on the heavy libraries are needed.
    command_line.set_up_libraries(config.compilation_cache)
    from mixer_jax.training.loop import Result, train_and_evaluate

    def summarize(result: Result) -> None:
        shown = known.workdir or default
        if result.stopped_by:
            print(f"stopped at step {result.step:,} of {result.num_steps:,} and saved")
            print("the same command goes on from there")
            return
        for name, scores in result.scores.items():
            print(
                f"{name}: top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%}, calibration error "
                f"{scores.calibration_error:.2%}, {scores.num_examples:,} images"
            )

    result = train_and_evaluate(config, workdir)
    summarize(result)
    return command_line.INTERRUPTED if result.stopped_by == signal.SIGINT else 0


if __name__ == "__main__":
    command_line.run(main)
