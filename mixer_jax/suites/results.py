"""Result store of a suite: small JSON files in its workdir, and the scores of a task.

Every completed run and probe has a result.json in its folder, every failed task a failed.txt; the
suite itself has a throughput.json.
"""

import contextlib
import dataclasses
import json
import statistics
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from etils import epath

from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR
from mixer_jax.errors import OutputWriteError, UserError, summarize_error
from mixer_jax.files import atomic_write
from mixer_jax.suites.run_configs import TEST, VALIDATION, final_folder, sweep_folder
from mixer_jax.suites.tasks import FineTuneTask, ProbeTask

RESULT_FILE = "result.json"
FAILED_FILE = "failed.txt"
THROUGHPUT_FILE = "throughput.json"
# Folders of a probe of the checkpoint, and of a randomly initialized network.
CHECKPOINT, RANDOM_INIT = "checkpoint", "fresh"
NETWORK_TITLES = {CHECKPOINT: "checkpoint", RANDOM_INIT: "random initialization"}
# Metrics that a fine-tuning run must have.
_FINE_TUNE_METRICS = ("top1", "log_likelihood", "num_examples")


@dataclasses.dataclass(frozen=True)
class RunResult:
    """Result of one run.

    Attributes:
        scores: Metrics by name, for each evaluation.
        seconds: Duration of training, or of the probe.
        failed: Reason why the run has no scores; empty if it has scores.
    """

    scores: dict[str, dict[str, float]]
    seconds: float
    failed: str = ""


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """Score of a task, or of one evaluation of it.

    Attributes:
        mean: Mean top-1 accuracy over the runs, as a fraction; None if there is none yet.
        std: Sample standard deviation over the runs; None for a single run.
        runs: Number of completed runs; some are missing without a mean.
        num_examples: Number of test examples of each run.
        seconds: Duration of the runs, including the sweep; 0 for further evaluations of the same
            runs.
        learning_rate: Learning rate selected; None if there is none.
        failed: Reason why there is no mean; empty if runs are only missing.
    """

    mean: float | None = None
    std: float | None = None
    runs: int = 0
    num_examples: int = 0
    seconds: float = 0.0
    learning_rate: float | None = None
    failed: str = ""


class Throughput(NamedTuple):
    """Inference throughput on one device.

    Attributes:
        images_per_second: Throughput at the best batch size; 0 if batch size 1 does not fit.
        batch_size: Best batch size.
        device: Device kind.
        image_size: Height and width, in pixels.
    """

    images_per_second: float
    batch_size: int
    device: str
    image_size: tuple[int, int]


@contextlib.contextmanager
def output_errors(folder: str) -> Iterator[None]:
    """Raises OutputWriteError if the block fails to write into `folder`."""
    try:
        yield
    except Exception as error:
        # Every file system has its own exceptions.
        reason = getattr(error, "strerror", None) or summarize_error(error)
        raise OutputWriteError(
            f"{folder} must be writable ({reason}). Fix that and rerun the same command to resume."
        ) from error


def save_result(folder: str, result: RunResult) -> None:
    """Writes the result of the run in `folder` atomically.

    Raises:
        OutputWriteError: It cannot be written.
    """
    with output_errors(folder):
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        atomic_write(epath.Path(folder) / RESULT_FILE, _to_text(dataclasses.asdict(result)))


def read_result(
    folder: str, evals: Iterable[str] = (), metrics: Iterable[str] = _FINE_TUNE_METRICS
) -> RunResult | None:
    """Reads the result of the run in `folder`; returns None if the run is not complete.

    Args:
        folder: Workdir of the run.
        evals: Evaluations that must have scores, unless the run failed.
        metrics: Metrics that each of them must have.

    Raises:
        UserError: The file is damaged or incomplete.
    """
    path = epath.Path(folder) / RESULT_FILE
    if not path.exists():
        return None
    try:
        result = RunResult(**json.loads(path.read_text()))
        _check(result, [] if result.failed else [(e, m) for e in evals for m in metrics])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a run's result. Remove it to repeat the run.") from error
    return result


def _check(result: RunResult, required: list[tuple[str, str]]) -> None:
    """Raises some error if a result lacks a value or has one of the wrong type."""
    values: list[Any] = [result.seconds, *(result.scores[name][key] for name, key in required)]
    values += [value for scores in result.scores.values() for value in scores.values()]
    if not isinstance(result.failed, str) or not all(isinstance(v, int | float) for v in values):
        raise TypeError


def delete_checkpoints(folder: str) -> None:
    """Deletes the checkpoints of the run in `folder`, if there are any.

    Raises:
        OutputWriteError: They cannot be deleted.
    """
    checkpoints = epath.Path(folder) / CHECKPOINT_DIR
    with output_errors(folder):
        if checkpoints.exists():
            checkpoints.rmtree()


def save_failure(workdir: str, name: str, reason: str, traceback: str) -> None:
    """Records why a task failed; the next start retries it.

    Raises:
        OutputWriteError: It cannot be written.
    """
    path = epath.Path(workdir) / name / FAILED_FILE
    with output_errors(str(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, f"{reason}\n\n{traceback}")


def clear_failure(workdir: str, name: str) -> None:
    """Removes the record of `save_failure`.

    Raises:
        OutputWriteError: It cannot be removed.
    """
    path = epath.Path(workdir) / name / FAILED_FILE
    with output_errors(str(path.parent)):
        path.unlink(missing_ok=True)


def _read_failure(folder: str) -> str:
    path = epath.Path(folder) / FAILED_FILE
    return path.read_text().partition("\n")[0] if path.exists() else ""


def save_throughput(workdir: str, throughput: Throughput) -> None:
    """Writes the measured throughput."""
    atomic_write(epath.Path(workdir) / THROUGHPUT_FILE, _to_text(throughput._asdict()))


def read_throughput(workdir: str) -> Throughput | None:
    """Reads the measured throughput; returns None if it was not measured.

    Raises:
        UserError: The file is damaged.
    """
    path = epath.Path(workdir) / THROUGHPUT_FILE
    if not path.exists():
        return None
    try:
        throughput = Throughput(**json.loads(path.read_text()))
        height, width = throughput.image_size
        return throughput._replace(image_size=(height, width))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged. Remove it to measure again.") from error


def _to_text(data: Any) -> str:
    return json.dumps(data, indent=2) + "\n"


def select_learning_rate(results: dict[float, RunResult]) -> float | None:
    """Returns the learning rate with the best validation accuracy; None if every run failed.

    Ties go to the higher log-likelihood, then to the lower learning rate.
    """

    def rank(rate: float) -> tuple[float, float, float]:
        scores = results[rate].scores[VALIDATION]
        return scores["top1"], scores["log_likelihood"], -rate

    return max((rate for rate, run in results.items() if not run.failed), key=rank, default=None)


def read_fine_tune_scores(task: FineTuneTask, workdir: str) -> dict[str, TaskScore]:
    """Reads the scores of a task by evaluation: `TEST` and the names of `task.extra_evals`."""
    rates = task.learning_rates
    learning_rate: float | None = rates[0]
    sweep: dict[float, RunResult] = {}
    if len(rates) > 1:
        results = {
            rate: read_result(f"{workdir}/{sweep_folder(task, rate)}", [VALIDATION])
            for rate in rates
        }
        sweep = {rate: result for rate, result in results.items() if result}
        learning_rate = select_learning_rate(sweep) if len(sweep) == len(rates) else None
    names = [TEST, *task.extra_evals]
    final = [read_result(f"{workdir}/{final_folder(task, seed)}", names) for seed in task.seeds]
    done = [result for result in final if result and not result.failed]
    seconds = sum(result.seconds for result in [*sweep.values(), *done])
    failed = _read_failure(f"{workdir}/{task.name}")
    if not failed and len(sweep) == len(rates) > 1 and learning_rate is None:
        failed = "; ".join(result.failed for result in sweep.values())
    incomplete = TaskScore(runs=len(done), learning_rate=learning_rate, failed=failed)
    # Extra evaluations have no runs of their own.
    first = dataclasses.replace(incomplete, seconds=seconds)
    if failed or len(done) < len(task.seeds):
        return {TEST: first} | dict.fromkeys(task.extra_evals, incomplete)
    scores = {name: [result.scores[name] for result in done] for name in names}
    return {
        name: dataclasses.replace(
            first if name == TEST else incomplete,
            mean=statistics.fmean(run["top1"] for run in runs),
            std=statistics.stdev(run["top1"] for run in runs) if len(runs) > 1 else None,
            num_examples=int(runs[0]["num_examples"]),
        )
        for name, runs in scores.items()
    }


def read_probe_scores(task: ProbeTask, workdir: str) -> dict[tuple[str, str], TaskScore]:
    """Reads the scores of a task by network and metric, such as (CHECKPOINT, "5_shot")."""
    folder = f"{workdir}/{task.name}"
    few_shot = task.method == "few_shot"
    metrics = [f"{shots}_shot" for shots in task.shots] if few_shot else [task.method]
    scores = {}
    for network in (CHECKPOINT, RANDOM_INIT) if task.compare_random_init else (CHECKPOINT,):
        result = read_result(f"{folder}/{network}", [TEST], [*metrics, "num_examples"])
        for metric in metrics:
            score = TaskScore(failed=_read_failure(folder))
            if result:
                values = result.scores[TEST]
                score = TaskScore(
                    values[metric],
                    values.get(f"{metric}_std") if len(task.seeds) > 1 else None,
                    len(task.seeds) if few_shot else 1,
                    int(values["num_examples"]),
                    result.seconds if metric == metrics[0] else 0.0,
                )
            scores[network, metric] = score
    return scores
