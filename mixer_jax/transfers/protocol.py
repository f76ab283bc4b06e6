"""The protocol: choose a learning rate, train with every seed, score; probe; one after the other.

What has ended lies in the suite's folder as a small file and is not done again, so a suite that was
killed goes on where it was.
"""

import signal
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

from etils import epath

from mixer_jax.errors import DivergedError, RunFailedError, UserError, one_line
from mixer_jax.evaluation.tasks import FineTune, Task
from mixer_jax.parallel.hosts import is_leader
from mixer_jax.training import workdir as workdirs
from mixer_jax.training.loop import train_and_evaluate
from mixer_jax.training.metrics import read_metrics
from mixer_jax.transfers.cost import training_seconds
from mixer_jax.transfers.plan import Plan
from mixer_jax.transfers.probing import probe_task
from mixer_jax.transfers.results import (
    RunResult,
    choose,
    forget_failure,
    read_result,
    save_failure,
    save_result,
)
from mixer_jax.transfers.runs import Run
from mixer_jax.weights.load import Weights
from mixer_jax.weights.steps import FOLDER


class StoppedError(Exception):
    """A signal has stopped the run under way, which was saved."""

    def __init__(self, received: signal.Signals | None):
        super().__init__(received)
        self.received = received


class Doing(NamedTuple):
    """What tasks are done with.

    Attributes:
        plan: of the suite.
        workdir: absolute path or URL of the suite.
        weights: to judge.
        keep_checkpoints: of runs that have ended.
        say: tells people something.
    """

    plan: Plan
    workdir: str
    weights: Weights
    keep_checkpoints: bool
    say: Callable[[str], None]


def do_tasks(doing: Doing, tasks: Sequence[Task]) -> dict[str, str]:
    """Does tasks, one after the other; returns why some failed, by name.

    Raises:
        StoppedError: the run under way was stopped.
    """
    failures = {}
    for number, task in enumerate(tasks, start=1):
        doing.say(f"\n[{number}/{len(tasks)}] {task.name}")
        try:
            do_task(doing, task)
        except StoppedError:
            raise
        except Exception as error:
            # Whatever ends one task, running out of memory too, leaves the others to be done.
            known = isinstance(error, UserError | RunFailedError)
            reason = str(error) if known else f"{type(error).__name__}: {one_line(error)}"
            failures[task.name] = reason
            doing.say(f"{task.name} failed: {reason}")
            if is_leader():
                save_failure(doing.workdir, task.name, reason, traceback.format_exc())
    return failures


def do_task(doing: Doing, task: Task) -> None:
    """Does one task, or what is left of it."""
    if is_leader():
        forget_failure(doing.workdir, task.name)
    if not isinstance(task, FineTune):
        probe_task(doing.plan, task, doing.weights, doing.workdir, doing.say)
        return
    for seed, run in doing.plan.final(task, _choose_rate(doing, task)).items():
        result = _do_run(doing, run)
        if result.failed:
            raise RunFailedError(f"the final run with seed {seed} failed: {result.failed}")


def _choose_rate(doing: Doing, task: FineTune) -> float:
    """Returns the learning rate of the final runs, after those that choose it."""
    choosing = doing.plan.choosing(task)
    if not choosing:
        return task.learning_rates[0]
    results = {rate: _do_run(doing, run) for rate, run in choosing.items()}
    chosen = choose(results)
    if chosen is None:
        raise RunFailedError(
            "no learning rate could be trained with: "
            + "; ".join(f"{rate:g}: {run.failed}" for rate, run in results.items())
        )
    doing.say(f"{task.name}: learning rate {chosen:g} is chosen")
    return chosen


def _do_run(doing: Doing, run: Run) -> RunResult:
    """Runs what is left of a run; returns what came of it, now or before."""
    folder = f"{doing.workdir}/{run.folder}"
    result, stopped_by = read_result(folder), None
    if result is None:
        doing.say(f"\n{run.folder}")
        result, stopped_by = _train(doing, run, folder)
        if is_leader():
            save_result(folder, result)
    if is_leader() and not doing.keep_checkpoints:
        checkpoints = epath.Path(folder) / FOLDER
        if checkpoints.exists():
            checkpoints.rmtree()
    if stopped_by is not None:
        raise StoppedError(stopped_by)
    return result


def _train(doing: Doing, run: Run, folder: str) -> tuple[RunResult, signal.Signals | None]:
    """Trains to the end; returns what came of it, and the signal that came meanwhile, if one did.

    Raises:
        StoppedError: the signal came before the end.
    """
    for change in workdirs.check(folder, run.config):
        doing.say(f"changed since this run was last started: {change}")
    scores: dict[str, dict[str, float]] = {}
    failed, stopped_by = "", None
    try:
        ended = train_and_evaluate(run.config, folder, doing.weights)
        stopped_by = ended.stopped_by
        if ended.step < ended.num_steps:
            raise StoppedError(stopped_by)
        scores = {name: one.values() for name, one in ended.scores.items()}
    except DivergedError as error:
        # It would diverge again; a rate too high is what choosing is there to find out.
        failed = str(error)
        doing.say(f"{run.folder} failed: {failed}")
    seconds = training_seconds(read_metrics(folder), run.config.batch_size)
    return RunResult(scores, seconds, failed), stopped_by
