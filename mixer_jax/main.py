"""Train or fine-tune a Mixer from a config file: `python -m mixer_jax.main --config=FILE`."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from mixer_jax.checkpoints.resolve import list_steps, resolve_checkpoint
from mixer_jax.cli import common
from mixer_jax.config.config import format_help, validate
from mixer_jax.config.loading import default_run_name, load_config_with_overrides
from mixer_jax.training import workdir as workdirs
from mixer_jax.training.metrics import EVENTS_FOLDER, METRICS_FILE

if TYPE_CHECKING:
    from mixer_jax.training.loop import TrainResult

_EXIT_CODES = """\
exit codes: 0 finished; 143 stopped by SIGTERM and 130 by Ctrl-C, both saved, to go on by the same
command; 1 failed, or another host is gone; 2 a mistake, told in one line"""


def main(arguments: Sequence[str]) -> int:
    """Trains as the command line says; returns the exit code."""
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.main",
        description="Train a Mixer, or resume the training in WORKDIR.",
        epilog=f"{_EXIT_CODES}\n\nconfiguration keys, with their defaults:\n{format_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    config = load_config_with_overrides(known.config, overrides)
    validate(config)
    default = f"runs/{default_run_name(known.config)}"
    workdir = workdirs.resolve_workdir(known.workdir or default)
    for change in workdirs.check_workdir(workdir, config):
        print(f"changed since this run was last started: {change}")
    if config.init_from and not list_steps(workdir):
        resolve_checkpoint(config.init_from)

    # From here on the heavy libraries are needed.
    common.configure_jax(config.compilation_cache)
    from mixer_jax.distributed.multihost import is_primary_process, propagate_failure
    from mixer_jax.training.loop import train_and_evaluate
    from mixer_jax.visualization.curves import plot_curves

    with propagate_failure():
        result = train_and_evaluate(config, workdir)
        if is_primary_process():
            plot_curves(workdir)
            print(format_summary(result, known.workdir or default, config), flush=True)
    if result.stopped_by is not None and result.step < result.num_steps:
        return 128 + result.stopped_by
    return 0


def format_summary(result: "TrainResult", workdir: str, config: ConfigDict) -> str:
    """Returns what a run ends with: its scores, where things lie, and what to do next."""
    place = f"{workdir}/checkpoints/{result.step}"
    score = [_program("python"), "-m", "mixer_jax.evaluate", f"--checkpoint={workdir}"]
    by_head = [entry for entry in config.evals.values() if entry.type == "classify"]
    for entry in by_head[:1]:
        score += [f"--dataset={entry.dataset or config.dataset.name}", f"--split={entry.split}"]
        score += [f"--data_dir={config.dataset.data_dir}"] if config.dataset.data_dir else []
    if result.step < result.num_steps:
        return (
            f"\nstopped at step {result.step:,} of {result.num_steps:,}, saved as {place}; "
            "the same command goes on from there"
        )
    board = f"{_program('tensorboard')} --logdir={workdir}/{EVENTS_FOLDER}"
    lines = [f"{name}: {scores.format_summary()}" for name, scores in result.scores.items()]
    return "\n".join(
        [
            "",
            *lines,
            f"checkpoint  {place}",
            f"curves      {workdir}/curves.png",
            f"metrics     {workdir}/{METRICS_FILE}",
            *([f"events      {workdir}/{EVENTS_FOLDER}"] if config.tensorboard else []),
            "",
            "next:",
            *([f"  {shlex.join(score)}"] if by_head else []),
            *([f"  {board}"] if config.tensorboard else []),
        ]
    )


def _program(name: str) -> str:
    """Returns how the user would call a program of this Python: from a .venv here, by its path."""
    folder = Path(sys.executable).parent
    if "VIRTUAL_ENV" in os.environ or not folder.is_relative_to(Path.cwd()):
        return name
    return str(folder.relative_to(Path.cwd()) / name)


if __name__ == "__main__":
    common.run_cli(main, needs_output=False)
