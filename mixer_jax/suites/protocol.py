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

from mixer_jax.checkpoints.load import PretrainedWeights
from mixer_jax.config.config import parse
from mixer_jax.distributed.multihost import any_host, is_primary_process
from mixer_jax.errors import NonFiniteError, OutputWriteError, RunError, UserError, summarize_error
from mixer_jax.files import file_lock
from mixer_jax.suites.plan import TransferPlan
from mixer_jax.suites.probe_tasks import run_probe_task
from mixer_jax.suites.results import (
    RunResult,
    clear_failure,
    delete_checkpoints,
    output_errors,
    read_result,
    save_failure,
    save_result,
    select_learning_rate,
)
from mixer_jax.suites.run_configs import Run
from mixer_jax.suites.tasks import FineTuneTask, Task
from mixer_jax.suites.throughput import training_seconds
from mixer_jax.training import workdir as workdirs
from mixer_jax.training.loop import train_and_evaluate
from mixer_jax.training.metrics import read_metrics
from mixer_jax.visualization.curves import plot_curves

_LOCK_FILE = ".lock"
_OTHERS = "another program is doing it in this --workdir; give each its --shard"


class TaskInterruptedError(Exception):
    """A signal has stopped the run under way, which was saved."""

    def __init__(self, received: signal.Signals | None):
        super().__init__(received)
        self.received = received


class TaskContext(NamedTuple):
    """What tasks are done with.

    Attributes:
        plan: of the suite.
        workdir: absolute path or URL of the suite.
        weights: to judge.
        keep_checkpoints: of runs that have ended.
        say: tells people something.
    """

    plan: TransferPlan
    workdir: str
    weights: PretrainedWeights
    keep_checkpoints: bool
    say: Callable[[str], None]


def run_tasks(doing: TaskContext, tasks: Sequence[Task]) -> dict[str, str]:
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
                    run_task(doing, task)
        except (TaskInterruptedError, OutputWriteError):
            raise
        except Exception as error:
            # Whatever ends one task, running out of memory too, leaves the others to be done.
            if jax.process_count() > 1 and not isinstance(error, NonFiniteError):
                raise
            failures[task.name] = _reason(error)
            if is_primary_process():
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
        if is_primary_process() and "://" not in workdir:
            with output_errors(f"{workdir}/{name}"):
                try:
                    stack.enter_context(file_lock(Path(workdir, name, _LOCK_FILE)))
                except BlockingIOError:
                    taken = True
        yield not any_host(taken)


def _reason(error: Exception) -> str:
    known = isinstance(error, UserError | RunError)
    return str(error) if known else f"{type(error).__name__}: {summarize_error(error)}"


def run_task(doing: TaskContext, task: Task) -> None:
    """Does one task, or what is left of it."""
    if is_primary_process():
        clear_failure(doing.workdir, task.name)
    if not isinstance(task, FineTuneTask):
        run_probe_task(doing.plan, task, doing.weights, doing.workdir, doing.say)
        return
    for seed, run in doing.plan.final(task, _select_learning_rate(doing, task)).items():
        # Not kept if it diverges: with another number of devices it may not.
        result = _do_run(doing, run, keep_failure=False)
        if result.failed:
            raise NonFiniteError(f"the final run with seed {seed} failed: {result.failed}")


def _select_learning_rate(doing: TaskContext, task: FineTuneTask) -> float:
    """Returns the learning rate of the final runs, after those that choose it."""
    choosing = doing.plan.choosing(task)
    if not choosing:
        return task.learning_rates[0]
    results = {rate: _do_run(doing, run, keep_failure=True) for rate, run in choosing.items()}
    chosen = select_learning_rate(results)
    if chosen is None:
        raise NonFiniteError(
            "no learning rate could be trained with: "
            + "; ".join(f"{rate:g}: {run.failed}" for rate, run in results.items())
        )
    doing.say(f"{task.name}: learning rate {chosen:g} is chosen")
    return chosen


def _do_run(doing: TaskContext, run: Run, keep_failure: bool) -> RunResult:
    """Runs what is left of a run; returns what came of it, now or before."""
    folder = f"{doing.workdir}/{run.folder}"
    result, stopping = read_result(folder, [*run.config.evals]), False
    if result is None or (result.failed and not keep_failure):
        doing.say(f"\n{run.folder}")
        result, received = _train(doing, run, folder)
        if is_primary_process() and (keep_failure or not result.failed):
            save_result(folder, result)
        # The signal may have reached one host alone, after the last step at which they asked.
        stopping = any_host(received is not None)
    if is_primary_process() and not doing.keep_checkpoints:
        delete_checkpoints(folder)
    if stopping:
        raise TaskInterruptedError(received)
    return result


def _train(doing: TaskContext, run: Run, folder: str) -> tuple[RunResult, signal.Signals | None]:
    """Trains to the end; returns what came of it, and the signal that came meanwhile, if one did.

    Raises:
        StoppedError: the signal came before the end.
    """
    config = parse(run.config)
    for change in workdirs.check_workdir(folder, config):
        doing.say(f"changed since this run was last started: {change}")
    scores: dict[str, dict[str, float]] = {}
    failed, stopped_by = "", None
    try:
        ended = train_and_evaluate(config, folder, doing.weights)
        stopped_by = ended.stopped_by
        if is_primary_process():
            plot_curves(folder)
        if ended.step < ended.num_steps:
            raise TaskInterruptedError(stopped_by)
        scores = {name: one.as_dict() for name, one in ended.scores.items()}
    except NonFiniteError as error:
        # It would diverge again; a rate too high is what choosing is there to find out.
        failed = str(error)
        doing.say(f"{run.folder} failed: {failed}")
    seconds = training_seconds(read_metrics(folder), config.batch_size)
    return RunResult(scores, seconds, failed), stopped_by
