"""The protocol: choose a learning rate, train with every seed, score; probe; one after the other.

What has ended lies in the suite's folder as a small file and is not done again, so a suite that was
killed goes on where it was.
"""

import contextlib
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from mixer_jax.errors import DivergedError, RunFailedError, UnwritableError, UserError, one_line
from mixer_jax.evaluation.tasks import FineTune, Task
from mixer_jax.locks import locked
from mixer_jax.parallel.hosts import any_host, is_leader
from mixer_jax.training import workdir as workdirs
from mixer_jax.training.loop import train_and_evaluate
from mixer_jax.training.metrics import read_metrics
from mixer_jax.transfers.cost import training_seconds
from mixer_jax.transfers.plan import Plan
from mixer_jax.transfers.probing import probe_task
from mixer_jax.transfers.results import (
    RunResult,
    choose,
    drop_checkpoints,
    forget_failure,
    read_result,
    save_failure,
    save_result,
    writing,
)
from mixer_jax.transfers.runs import Run
from mixer_jax.weights.load import Weights

_LOCK_FILE = ".lock"
_OTHERS = "another program is doing it in this --workdir; give each its --shard"


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

    Of several hosts, one cannot tell whether the others have met an error too, and those that have
    not would wait for it for ever. So there all errors are raised but divergence, which all see.

    Raises:
        StoppedError: the run under way was stopped.
        UnwritableError: a result cannot be kept.
    """
    failures = {}
    for number, task in enumerate(tasks, start=1):
        doing.say(f"\n[{number}/{len(tasks)}] {task.name}")
        try:
            with _lock(doing.workdir, task.name) as ours:
                if ours:
                    do_task(doing, task)
        except (StoppedError, UnwritableError):
            raise
        except Exception as error:
            # Whatever ends one task, running out of memory too, leaves the others to be done.
            if jax.process_count() > 1 and not isinstance(error, DivergedError):
                raise
            failures[task.name] = _reason(error)
            if is_leader():
                save_failure(doing.workdir, task.name, _reason(error), traceback.format_exc())
        if not ours:
            failures[task.name] = _OTHERS
        if task.name in failures:
            doing.say(f"{task.name} failed: {failures[task.name]}")
    return failures


@contextlib.contextmanager
def _lock(workdir: str, name: str) -> Iterator[bool]:
    """Keeps other programs from doing a task; yields whether it is this program's, on all hosts.

    Where there are no locks, as behind URLs, it is.
    """
    with contextlib.ExitStack() as stack:
        taken = False
        if is_leader() and "://" not in workdir:
            with writing(f"{workdir}/{name}"):
                try:
                    stack.enter_context(locked(Path(workdir, name, _LOCK_FILE)))
                except BlockingIOError:
                    taken = True
        yield not any_host(taken)


def _reason(error: Exception) -> str:
    known = isinstance(error, UserError | RunFailedError)
    return str(error) if known else f"{type(error).__name__}: {one_line(error)}"


def do_task(doing: Doing, task: Task) -> None:
    """Does one task, or what is left of it."""
    if is_leader():
        forget_failure(doing.workdir, task.name)
    if not isinstance(task, FineTune):
        probe_task(doing.plan, task, doing.weights, doing.workdir, doing.say)
        return
    for seed, run in doing.plan.final(task, _choose_rate(doing, task)).items():
        # Not kept if it diverges: with another number of devices it may not.
        result = _do_run(doing, run, keep_failure=False)
        if result.failed:
            raise DivergedError(f"the final run with seed {seed} failed: {result.failed}")


def _choose_rate(doing: Doing, task: FineTune) -> float:
    """Returns the learning rate of the final runs, after those that choose it."""
    choosing = doing.plan.choosing(task)
    if not choosing:
        return task.learning_rates[0]
    results = {rate: _do_run(doing, run, keep_failure=True) for rate, run in choosing.items()}
    chosen = choose(results)
    if chosen is None:
        raise DivergedError(
            "no learning rate could be trained with: "
            + "; ".join(f"{rate:g}: {run.failed}" for rate, run in results.items())
        )
    doing.say(f"{task.name}: learning rate {chosen:g} is chosen")
    return chosen


def _do_run(doing: Doing, run: Run, keep_failure: bool) -> RunResult:
    """Runs what is left of a run; returns what came of it, now or before."""
    folder = f"{doing.workdir}/{run.folder}"
    result, stopping = read_result(folder, [*run.config.evals]), False
    if result is None or (result.failed and not keep_failure):
        doing.say(f"\n{run.folder}")
        result, received = _train(doing, run, folder)
        if is_leader() and (keep_failure or not result.failed):
            save_result(folder, result)
        # The signal may have reached one host alone, after the last step at which they asked.
        stopping = any_host(received is not None)
    if is_leader() and not doing.keep_checkpoints:
        drop_checkpoints(folder)
    if stopping:
        raise StoppedError(received)
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
