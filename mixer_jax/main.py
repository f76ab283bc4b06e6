"""Train or fine-tune a model from a config file: `python -m mixer_jax.main --config=FILE`."""

import argparse
import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from mixer_jax.checkpoints.best import BEST, format_metric
from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR, list_saved_steps, resolve_checkpoint
from mixer_jax.cli import common
from mixer_jax.config.config import format_help, parse
from mixer_jax.config.loading import (
    apply_overrides,
    default_run_name,
    load_config,
    load_config_with_overrides,
    parse_overrides,
)
from mixer_jax.config.schema import RunConfig
from mixer_jax.distributed.hardware import joins_hosts
from mixer_jax.errors import UserError
from mixer_jax.training import workdir as workdirs
from mixer_jax.training.metrics import CURVES_FILE, EVENTS_FOLDER, METRICS_FILE
from mixer_jax.training.tracking import check_wandb_installed

if TYPE_CHECKING:
    from mixer_jax.training.loop import TrainResult

_EPILOG = """\
exit codes:
  0        finished
  1        failed, or another host was lost (JAX may abort with 134 instead)
  2        usage error, in one line; do not retry
  130, 143, 129
           stopped by Ctrl-C, SIGTERM or SIGHUP after saving a checkpoint; the same command resumes

configuration keys, for --config.KEY=VALUE
(Boolean keys also accept --config.KEY and --noconfig.KEY):
"""


def main(argv: Sequence[str]) -> int:
    """Trains a model; returns the exit code."""
    parser = common.ArgumentParser(
        prog="python -m mixer_jax.main",
        description="Train or fine-tune a model, or resume the run in WORKDIR.",
        epilog=_EPILOG + format_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARG]",
        help="config file, or the name of one in configs/, e.g. digits or configs/digits.py:low",
    )
    common.add_workdir_arg(parser, "runs/CONFIG_NAME")
    parser.add_argument(
        "--seeds",
        metavar="SEED,SEED,…",
        help="train with each of these seeds, e.g. 0,1,2, one after the other in WORKDIR/seed0, "
        "WORKDIR/seed1, …, and print mean and standard deviation of the metrics of all finished "
        "seeds in WORKDIR; finished runs are skipped",
    )
    common.add_override_arg(parser, "override a key, e.g. --config.optimizer.learning_rate=3e-3")
    args, overrides = parser.parse_known_args(argv)
    config = parse(load_config_with_overrides(args.config, overrides, vars(args)))
    workdir = args.workdir or f"runs/{default_run_name(args.config)}"
    resolved_workdir = workdirs.resolve_workdir(workdir)
    if args.seeds is not None:
        for key, value in parse_overrides(overrides, vars(args)):
            if key == "seed":
                raise UserError(
                    f"--config.seed must be left out with --seeds, got {value}. --seeds sets it."
                )
        seeds = common.parse_seeds(args.seeds)
        return _train_seeds(config, workdir, resolved_workdir, seeds)
    check_wandb_installed(config.wandb)
    with contextlib.ExitStack() as stack:
        if not joins_hosts(config.distributed):
            # Before importing JAX, which takes seconds. Of several hosts, one locks the workdir.
            stack.enter_context(workdirs.lock_workdir(resolved_workdir))
        _prepare(config, resolved_workdir)
        from mixer_jax.distributed.multihost import is_primary_process, propagate_failure

        with propagate_failure():
            result = _train(config, resolved_workdir)
            if is_primary_process():
                print(format_summary(result, workdir, config), flush=True)
            result.raise_failures()
        return result.exit_code


def _train_seeds(
    config: RunConfig, workdir: str, resolved_workdir: str, seeds: Sequence[int]
) -> int:
    """Trains with several seeds and prints their metrics; returns the exit code."""
    if not config.evals:
        raise UserError(
            "config.evals must have an evaluation with --seeds, got none. Declare one in the "
            "config file."
        )
    check_wandb_installed(config.wandb)
    workdirs.check_seeds_workdir(resolved_workdir)
    for seed in seeds:
        run_config = dataclasses.replace(config, seed=seed)
        _check_run(run_config, workdirs.seed_workdir(resolved_workdir, seed))
    common.configure_jax(config.compilation_cache)
    from mixer_jax.distributed.multihost import is_primary_process, propagate_failure
    from mixer_jax.suites.seeds import format_table, run_seeds

    def log(text: str) -> None:
        if is_primary_process():
            print(text, flush=True)

    with propagate_failure():
        outcome = run_seeds(config, resolved_workdir, seeds, log)
    if outcome.results:
        log(f"\n{format_table(outcome.results)}\n")
        note = ", std: sample standard deviation" if len(outcome.results) > 1 else ""
        log(f"written to {workdir}/{workdirs.SEEDS_FILE}{note}")
    if outcome.stopped_by is None:
        return 0
    log("\nstopped; the same command resumes")
    return 128 + outcome.stopped_by


def train(
    config: str | os.PathLike | ConfigDict,
    workdir: str | os.PathLike,
    overrides: Mapping[str, Any] | None = None,
) -> "TrainResult":
    """Trains a model, or resumes the run in `workdir`, like the command `train`.

    The first Ctrl-C, or "Interrupt" in a notebook, stops the run after saving a checkpoint. Scripts
    need a guard, because processes that load images import them again:

        if __name__ == "__main__":
            mixer_jax.train(config, "runs/mine")

    On several hosts, call it before other JAX code, and within
    `mixer_jax.distributed.multihost.propagate_failure()`, so that an error on one host ends all.

    Args:
        config: Name of a config, such as "digits" or "digits:low"; path of a config file; or config
            from `load_config` or `mixer_jax.config.get_default`, which is not changed.
        workdir: Folder or URL for checkpoints, metrics and curves.
        overrides: Values by dotted key that replace those of the config, such as
            `{"optimizer.learning_rate": 3e-3}`.

    Returns:
        The result. `metrics` has the final metrics of all evaluations by name, such as
        "test/top1". `step` is less than `num_steps` if the run was interrupted.

    Raises:
        UserError: The config is invalid, data is missing, the workdir belongs to another
            experiment, a script has no guard, or an evaluation failed and a retry would fail, too.
        RunError: Training diverged, the disk is full or fails, another process is training in
            `workdir`, or an evaluation failed for a reason that may pass.
    """
    # Set while Python imports the script of the parent process. See `multiprocessing.spawn`.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "mixer_jax.train must not be called while a process that loads images imports the "
            'script. Put the call below `if __name__ == "__main__":`.'
        )
    if isinstance(config, ConfigDict):
        config = config.copy_and_resolve_references()
        apply_overrides(config, overrides or {})
    elif isinstance(config, str | os.PathLike):
        config = load_config(config, overrides)
    else:
        raise UserError(f"config must be the name or path of a config, or one, got {config!r}.")
    if not isinstance(workdir, str | os.PathLike):
        raise UserError(f"workdir must be a folder or a URL, got {workdir!r}.")
    run_config = parse(config)
    resolved_workdir = workdirs.resolve_workdir(os.fspath(workdir))
    _prepare(run_config, resolved_workdir)
    result = _train(run_config, resolved_workdir)
    result.raise_failures()
    return result


def _prepare(config: RunConfig, workdir: str) -> None:
    """Checks what can be checked before JAX is imported, and configures JAX."""
    for change in _check_run(config, workdir):
        print(f"changed since this run was last started: {change}")
    common.configure_jax(config.compilation_cache)


def _check_run(config: RunConfig, workdir: str) -> list[str]:
    """Checks workdir and weights; returns a line per key that has changed."""
    changes = workdirs.check_workdir(workdir, config)
    if config.init_from and not list_saved_steps(workdir):
        resolve_checkpoint(config.init_from)
    return changes


def _train(config: RunConfig, workdir: str) -> "TrainResult":
    from mixer_jax.training.loop import train_and_evaluate
    from mixer_jax.visualization.curves import save_curves

    return train_and_evaluate(config, workdir, plot=save_curves)


def format_summary(result: "TrainResult", workdir: str, config: RunConfig) -> str:
    """Formats what a run ends with: metrics, files, and the commands to run next."""
    checkpoint = f"{workdir}/{CHECKPOINT_DIR}/{result.step}"
    if not result.is_finished:
        return (
            f"\nstopped at step {result.step:,} of {result.num_steps:,}, saved as {checkpoint}; "
            "the same command resumes"
        )
    classified = [entry for entry in config.evals.values() if entry.type == "classify"]
    evaluate = [_program("python"), "-m", "mixer_jax.evaluate", f"--checkpoint={workdir}"]
    evaluate += [f"--step={BEST}"] if result.best else []
    for entry in classified[:1]:
        evaluate += [f"--dataset={entry.dataset or config.dataset.name}", f"--split={entry.split}"]
        if config.dataset.data_dir:
            evaluate += [f"--data_dir={config.dataset.data_dir}"]
    events = f"{workdir}/{EVENTS_FOLDER}"
    lines = ["", *(f"{name}: {scores.format_summary()}" for name, scores in result.scores.items())]
    lines += [f"checkpoint  {checkpoint}"]
    if best := result.best:
        metric = format_metric(best.metric, best.value)
        lines += [f"best        {workdir}/{CHECKPOINT_DIR}/{best.step}, {metric}"]
    lines += [f"curves      {workdir}/{CURVES_FILE}"] if result.has_curves else []
    lines += [f"metrics     {workdir}/{METRICS_FILE}"]
    lines += [f"events      {events}"] if config.tensorboard else []
    lines += ["", "next:"]
    lines += [f"  {shlex.join(evaluate)}"] if classified else []
    if config.tensorboard:
        if importlib.util.find_spec("tensorboard") is None:
            lines += [f"  {_program('python')} -m pip install tensorboard"]
        lines += [f"  {_program('tensorboard')} --logdir={events}"]
    return "\n".join(lines)


def _program(name: str) -> str:
    """Returns the command for a program of this Python: its path if that is in a .venv here."""
    folder = Path(sys.executable).parent
    if "VIRTUAL_ENV" in os.environ or not folder.is_relative_to(Path.cwd()):
        return name
    return str(folder.relative_to(Path.cwd()) / name)


if __name__ == "__main__":
    common.run_cli(main, needs_output=False)
