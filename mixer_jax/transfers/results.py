"""What came of a suite's runs: a small JSON file for each, and what those of a task say."""

import dataclasses
import json
import statistics

from etils import epath

from mixer_jax.errors import UserError
from mixer_jax.evaluation.tasks import FineTune, Probe
from mixer_jax.training.workdir import write_whole
from mixer_jax.transfers.runs import TEST, VALIDATION

RESULT_FILE = "result.json"
FAILED_FILE = "failed.txt"
# Folders of a probe, on the checkpoint and on a freshly initialised network.
CHECKPOINT, FRESH = "checkpoint", "fresh"


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
class Score:
    """What is known of a task, or of one thing scored in it.

    Attributes:
        mean: top-1 share, over the runs; None: there is none yet.
        deviation: over the runs, as of a sample; None: there are not several.
        runs: that have been scored.
        num_examples: that were scored in each.
        seconds: that its runs took, those that chose the learning rate among them.
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


def save_result(folder: str, result: RunResult) -> None:
    """Writes what came of the run in `folder`, whole or not at all."""
    epath.Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(result), indent=2) + "\n"
    write_whole(epath.Path(folder) / RESULT_FILE, text)


def read_result(folder: str) -> RunResult | None:
    """Returns what came of the run in `folder`; None: it has not ended yet.

    Raises:
        UserError: its file is damaged.
    """
    path = epath.Path(folder) / RESULT_FILE
    if not path.exists():
        return None
    try:
        return RunResult(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no result of a run; remove it to repeat the run") from error


def choose(results: dict[float, RunResult]) -> float | None:
    """Returns the learning rate with the best validation score; None: every run failed.

    Among equals it is the one with the higher log-likelihood, then the lower one.
    """

    def merit(rate: float) -> tuple[float, float, float]:
        scores = results[rate].scores[VALIDATION]
        return scores["top1"], scores["log_likelihood"], -rate

    return max((rate for rate, run in results.items() if not run.failed), key=merit, default=None)


def fine_tuned(task: FineTune, workdir: str) -> dict[str, Score]:
    """Returns what is known of a task, by evaluation: `TEST` and the names of `task.also`."""
    folder = f"{workdir}/{task.name}"
    rates = task.learning_rates
    chosen: float | None = rates[0]
    choosing: dict[float, RunResult] = {}
    if len(rates) > 1:
        found = {rate: read_result(f"{folder}/choose/learning_rate={rate:g}") for rate in rates}
        choosing = {rate: result for rate, result in found.items() if result}
        chosen = choose(choosing) if len(choosing) == len(rates) else None
    final = [read_result(f"{folder}/final/seed={seed}") for seed in task.seeds]
    done = [result for result in final if result]
    seconds = sum(result.seconds for result in [*choosing.values(), *done])
    failed = next((result.failed for result in done if result.failed), "")
    if len(choosing) == len(rates) > 1 and chosen is None:
        failed = "; ".join(result.failed for result in choosing.values())
    failed = _read_failure(folder) or failed
    begun = Score(seconds=seconds, learning_rate=chosen, failed=failed)
    if failed or len(done) < len(task.seeds):
        return dict.fromkeys([TEST, *task.also], begun)
    scored = {name: [result.scores[name] for result in done] for name in [TEST, *task.also]}
    return {
        name: dataclasses.replace(
            begun,
            mean=statistics.fmean(one["top1"] for one in runs),
            deviation=statistics.stdev(one["top1"] for one in runs) if len(runs) > 1 else None,
            runs=len(runs),
            num_examples=int(runs[0]["num_examples"]),
        )
        for name, runs in scored.items()
    }


def probed(task: Probe, workdir: str) -> dict[tuple[str, str], Score]:
    """Returns what is known of a task, by network and measure: ("fresh", "5_shot")."""
    folder = f"{workdir}/{task.name}"
    few_shot = task.method == "few_shot"
    measures = [f"{n}_shot" for n in task.shots] if few_shot else [task.method]
    found = {}
    for network in (CHECKPOINT, FRESH) if task.beside_fresh else (CHECKPOINT,):
        result = read_result(f"{folder}/{network}")
        for measure in measures:
            score = Score(failed=_read_failure(folder))
            if result:
                values = result.scores[TEST]
                score = Score(
                    values[measure],
                    values.get(f"{measure}_std") if len(task.seeds) > 1 else None,
                    len(task.seeds) if few_shot else 1,
                    int(values["num_examples"]),
                    result.seconds,
                )
            found[network, measure] = score
    return found


def save_failure(workdir: str, name: str, reason: str, trace: str) -> None:
    """Writes down why a task failed; the next start tries it again."""
    path = epath.Path(workdir) / name / FAILED_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{reason}\n\n{trace}")


def forget_failure(workdir: str, name: str) -> None:
    """Removes what `save_failure` wrote."""
    (epath.Path(workdir) / name / FAILED_FILE).unlink(missing_ok=True)


def _read_failure(folder: str) -> str:
    path = epath.Path(folder) / FAILED_FILE
    return path.read_text().partition("\n")[0] if path.exists() else ""
