"""What came of a suite's runs: a small JSON file for each, and what those of a task say."""

import contextlib
import dataclasses
import json
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR
from mixer_jax.errors import OutputWriteError, UserError, summarize_error
from mixer_jax.files import atomic_write
from mixer_jax.suites.run_configs import TEST, VALIDATION
from mixer_jax.suites.tasks import FineTuneTask, ProbeTask

RESULT_FILE = "result.json"
FAILED_FILE = "failed.txt"
# Folders of a probe, on the checkpoint and on a freshly initialised network.
CHECKPOINT, RANDOM_INIT = "checkpoint", "fresh"
# What is needed of the scores of a fine-tuning run.
_JUDGED = ("top1", "log_likelihood", "num_examples")


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What came of one run.

    Attributes:
        scores: of each evaluation, numbers by name.
        seconds: that training took, or the probe.
        failed: why the run gave no scores; empty: it did.
    """

    scores: dict[str, dict[str, float]]
    seconds: float
    failed: str = ""


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """What is known of a task, or of one thing scored in it.

    Attributes:
        mean: top-1 share, over the runs; None: there is none yet.
        deviation: over the runs, as of a sample; None: there are not several.
        runs: that have been scored; without a mean, some are still to come.
        num_examples: that were scored in each.
        seconds: that its runs took, those that chose the learning rate among them; 0 where those
            of another score are the same runs.
        learning_rate: that was chosen; None: nothing was.
        failed: why there is no mean; empty: the runs are still to come.
    """

    mean: float | None = None
    deviation: float | None = None
    runs: int = 0
    num_examples: int = 0
    seconds: float = 0.0
    learning_rate: float | None = None
    failed: str = ""


@contextlib.contextmanager
def output_errors(folder: str) -> Iterator[None]:
    """Raises UnwritableError where what is done meanwhile fails to write into `folder`."""
    try:
        yield
    except Exception as error:
        # Each kind of file system raises its own.
        reason = getattr(error, "strerror", None) or summarize_error(error)
        raise OutputWriteError(
            f"{folder} cannot be written ({reason}); mend that, and the same command goes on"
        ) from error


def save_result(folder: str, result: RunResult) -> None:
    """Writes what came of the run in `folder`, whole or not at all.

    Raises:
        UnwritableError: it cannot be written.
    """
    text = json.dumps(dataclasses.asdict(result), indent=2) + "\n"
    with output_errors(folder):
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        atomic_write(epath.Path(folder) / RESULT_FILE, text)


def delete_checkpoints(folder: str) -> None:
    """Removes the checkpoints of the run in `folder`, if it has any.

    Raises:
        UnwritableError: they cannot be removed.
    """
    checkpoints = epath.Path(folder) / CHECKPOINT_DIR
    with output_errors(folder):
        if checkpoints.exists():
            checkpoints.rmtree()


def read_result(
    folder: str, evaluations: Iterable[str] = (), numbers: Iterable[str] = _JUDGED
) -> RunResult | None:
    """Returns what came of the run in `folder`; None: it has not ended yet.

    Args:
        folder: of the run.
        evaluations: whose scores are needed, unless the run failed.
        numbers: that are needed of each.

    Raises:
        UserError: its file is damaged, or lacks some of them.
    """
    path = epath.Path(folder) / RESULT_FILE
    if not path.exists():
        return None
    try:
        result = RunResult(**json.loads(path.read_text()))
        _check(result, [] if result.failed else [(e, n) for e in evaluations for n in numbers])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is no result of a run; remove it to repeat the run") from error
    return result


def _check(result: RunResult, needed: list[tuple[str, str]]) -> None:
    """Raises an error of some kind if a result has not what it should have."""
    values: list[Any] = [result.seconds, *(result.scores[name][key] for name, key in needed)]
    values += [value for scores in result.scores.values() for value in scores.values()]
    if not isinstance(result.failed, str) or not all(isinstance(v, int | float) for v in values):
        raise TypeError


def select_learning_rate(results: dict[float, RunResult]) -> float | None:
    """Returns the learning rate with the best validation score; None: every run failed.

    Among equals it is the one with the higher log-likelihood, then the lower one.
    """

    def merit(rate: float) -> tuple[float, float, float]:
        scores = results[rate].scores[VALIDATION]
        return scores["top1"], scores["log_likelihood"], -rate

    return max((rate for rate, run in results.items() if not run.failed), key=merit, default=None)


def read_fine_tune_scores(task: FineTuneTask, workdir: str) -> dict[str, TaskScore]:
    """Returns what is known of a task, by evaluation: `TEST` and the names of `task.also`."""
    folder = f"{workdir}/{task.name}"
    rates = task.learning_rates
    chosen: float | None = rates[0]
    choosing: dict[float, RunResult] = {}
    if len(rates) > 1:
        found = {
            rate: read_result(f"{folder}/choose/learning_rate={rate:g}", [VALIDATION])
            for rate in rates
        }
        choosing = {rate: result for rate, result in found.items() if result}
        chosen = select_learning_rate(choosing) if len(choosing) == len(rates) else None
    names = [TEST, *task.also]
    final = [read_result(f"{folder}/final/seed={seed}", names) for seed in task.seeds]
    done = [result for result in final if result and not result.failed]
    seconds = sum(result.seconds for result in [*choosing.values(), *done])
    failed = _read_failure(folder)
    if not failed and len(choosing) == len(rates) > 1 and chosen is None:
        failed = "; ".join(result.failed for result in choosing.values())
    begun = TaskScore(runs=len(done), learning_rate=chosen, failed=failed)
    # What else is scored takes no runs of its own.
    first = dataclasses.replace(begun, seconds=seconds)
    if failed or len(done) < len(task.seeds):
        return {TEST: first} | dict.fromkeys(task.also, begun)
    scored = {name: [result.scores[name] for result in done] for name in names}
    return {
        name: dataclasses.replace(
            first if name == TEST else begun,
            mean=statistics.fmean(one["top1"] for one in runs),
            deviation=statistics.stdev(one["top1"] for one in runs) if len(runs) > 1 else None,
            num_examples=int(runs[0]["num_examples"]),
        )
        for name, runs in scored.items()
    }


def read_probe_scores(task: ProbeTask, workdir: str) -> dict[tuple[str, str], TaskScore]:
    """Returns what is known of a task, by network and measure: ("fresh", "5_shot")."""
    folder = f"{workdir}/{task.name}"
    few_shot = task.method == "few_shot"
    measures = [f"{n}_shot" for n in task.shots] if few_shot else [task.method]
    found = {}
    for network in (CHECKPOINT, RANDOM_INIT) if task.beside_fresh else (CHECKPOINT,):
        result = read_result(f"{folder}/{network}", [TEST], [*measures, "num_examples"])
        for measure in measures:
            score = TaskScore(failed=_read_failure(folder))
            if result:
                values = result.scores[TEST]
                score = TaskScore(
                    values[measure],
                    values.get(f"{measure}_std") if len(task.seeds) > 1 else None,
                    len(task.seeds) if few_shot else 1,
                    int(values["num_examples"]),
                    result.seconds if measure == measures[0] else 0.0,
                )
            found[network, measure] = score
    return found


def save_failure(workdir: str, name: str, reason: str, trace: str) -> None:
    """Writes down why a task failed; the next start tries it again.

    Raises:
        UnwritableError: it cannot be written.
    """
    path = epath.Path(workdir) / name / FAILED_FILE
    with output_errors(str(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, f"{reason}\n\n{trace}")


def clear_failure(workdir: str, name: str) -> None:
    """Removes what `save_failure` wrote.

    Raises:
        UnwritableError: it cannot be removed.
    """
    path = epath.Path(workdir) / name / FAILED_FILE
    with output_errors(str(path.parent)):
        path.unlink(missing_ok=True)


def _read_failure(folder: str) -> str:
    path = epath.Path(folder) / FAILED_FILE
    return path.read_text().partition("\n")[0] if path.exists() else ""
