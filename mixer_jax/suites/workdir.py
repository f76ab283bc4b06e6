"""Files in the workdir of a suite: its plan, results of runs, failures and throughput.

The plan is in suite.json, so that a later start runs the same. Every completed run and probe has a
result.json in its folder, every failed task a failed.txt.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR
from mixer_jax.config.compat import upgrade_overrides
from mixer_jax.errors import RunError, UserError
from mixer_jax.files import (
    atomic_write,
    file_lock,
    is_integer,
    is_number,
    output_errors,
    parse_json,
)
from mixer_jax.suites import tasks
from mixer_jax.suites.plan import TransferPlan, is_resumable
from mixer_jax.suites.tasks import VALIDATION
from mixer_jax.training.workdir import CONFIG_FILE

PLAN_FILE = "suite.json"
RESULT_FILE = "result.json"
FAILED_FILE = "failed.txt"
THROUGHPUT_FILE = "throughput.json"
_OVERRIDES = "overrides."
# Fields of plans that do not affect the results.
_NOT_COMPARED = (
    "data_dir",
    "device_days",
    "data_notes",
    "digest",
    "pretrain_dataset_assumed",
    "suite.title",
)
# Old spellings in plans that were saved before a rename.
_RENAMED_FIELDS = {
    "about": "model_info",
    "pretrained_on": "pretrain_dataset",
    "pretrained_on_assumed": "pretrain_dataset_assumed",
}
_MAX_DIFFERENCES = 5
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


class Throughput(NamedTuple):
    """Inference throughput on one device, at the best batch size; 0 if batch size 1 does not fit.

    Attributes:
        image_size: Height and width, in pixels.
    """

    images_per_second: float
    batch_size: int
    device: str
    image_size: tuple[int, int]


def check_not_run_workdir(workdir: str) -> None:
    """Raises UserError if a workdir belongs to a run instead of a suite."""
    folder = epath.Path(workdir)
    if (folder / CONFIG_FILE).exists() or (folder / CHECKPOINT_DIR).exists():
        raise UserError(
            f"--workdir must not be that of a mixer_jax.main run, got {workdir!r}. Choose another "
            "--workdir."
        )


@contextlib.contextmanager
def lock_tasks(workdir: str, names: Iterable[str]) -> Iterator[None]:
    """Keeps other processes from running tasks, until the block or this process ends.

    Object stores and some network file systems have no locks; there, it does nothing.

    Raises:
        RunError: Another process runs one of the tasks.
        OutputWriteError: The folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        for name in names if "://" not in workdir else ():
            # In the suite's folder, because a task that cannot start leaves none of its own.
            path = Path(workdir, f".{name}.lock")
            with output_errors(workdir):
                try:
                    stack.enter_context(file_lock(path))
                    continue
                except BlockingIOError as error:
                    owner = error.strerror
            raise RunError(
                f"task {name} of --workdir={workdir!r} is {owner}, which is running it. Wait until "
                "it has finished, stop it, or give each process its own --shard or --workdir."
            )
        yield


def to_json(plan: TransferPlan) -> dict[str, Any]:
    """Converts a plan to plain data."""
    # Thousands of class names do not affect fine-tuning.
    model_info = dataclasses.replace(plan.model_info, class_names=())
    return plan._asdict() | {
        "suite": tasks.to_json(plan.suite),
        "model_info": model_info.to_dict(),
        "overrides": dict(plan.overrides),
    }


def read_plan(workdir: str) -> TransferPlan | None:
    """Restores the plan in a workdir, or returns None; raises UserError if it is damaged."""
    path = epath.Path(workdir) / PLAN_FILE
    if not path.exists():
        return None
    try:
        data = tasks.rename_keys(parse_json(path.read_bytes()), _RENAMED_FIELDS)
        fields = data | {
            "suite": tasks.from_json(data["suite"]),
            "model_info": ModelInfo.from_dict(data["model_info"], str(path)),
            "overrides": tuple(upgrade_overrides(data["overrides"]).items()),
            "data_notes": tuple(data["data_notes"]),
        }
        plan = TransferPlan(**fields)
        _check_plan(plan)
        return plan
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} must be a suite's plan, but is damaged or has an unknown format. Choose "
            "another --workdir."
        ) from error


def _check_plan(plan: TransferPlan) -> None:
    """Raises ValueError, KeyError or TypeError if a value of a saved plan has another type."""
    tasks.check_suite(plan.suite)
    texts = [plan.checkpoint, plan.data_dir, plan.pretrain_dataset, plan.digest, *plan.data_notes]
    sizes = [plan.image_sizes[task.name] for task in plan.suite.tasks]
    if not (
        all(isinstance(text, str) for text in [*texts, *dict(plan.overrides).values()])
        and all(is_integer(size) and size > 0 for size in sizes)
        and (plan.device_days is None or is_number(plan.device_days))
    ):
        raise TypeError("a value has another type")


def save_plan(workdir: str, plan: TransferPlan) -> list[str]:
    """Saves a plan in its workdir, or merges it with the plan there.

    Returns:
        Resumable keys that have changed, one line "KEY: old -> new" each.

    Raises:
        UserError: The workdir contains results of a different suite or checkpoint.
        OutputWriteError, WriteFailureError: The workdir cannot be written.
    """
    path = epath.Path(workdir) / PLAN_FILE
    with output_errors(workdir), contextlib.ExitStack() as stack:
        # Object stores have no locks; there the last of several processes wins.
        if "://" not in workdir:
            stack.enter_context(file_lock(Path(f"{path}.lock"), wait=True))
        changes = []
        if old := read_plan(workdir):
            changes = _check_same(workdir, old, plan)
            # Every shard sees only the data of its own tasks.
            notes = tuple(dict.fromkeys(old.data_notes + plan.data_notes))
            days = old.device_days if plan.device_days is None else plan.device_days
            plan = plan._replace(data_notes=notes, device_days=days)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, _to_text(to_json(plan)))
    return changes


def _check_same(workdir: str, old: TransferPlan, new: TransferPlan) -> list[str]:
    """Returns the resumable differences between two plans; raises UserError for others."""
    if old.checkpoint == new.checkpoint and old.digest != new.digest:
        raise UserError(
            f"--workdir={workdir!r} contains results of other weights: {new.checkpoint} has "
            "changed since. Choose another --workdir."
        )
    before, after = dict(_flatten(to_json(old))), dict(_flatten(to_json(new)))
    resumable, incompatible = [], []
    for path in {**before, **after}:
        old_value, new_value = before.get(path, "(absent)"), after.get(path, "(absent)")
        if old_value == new_value or path in _NOT_COMPARED:
            continue
        key = path.removeprefix(_OVERRIDES)
        if key != path and is_resumable(key):
            resumable.append(f"{key}: {old_value} -> {new_value}")
        else:
            incompatible.append(f"{path}: {old_value!r} -> {new_value!r}")
    if incompatible:
        differences = "; ".join(incompatible[:_MAX_DIFFERENCES])
        differences += "; …" if incompatible[_MAX_DIFFERENCES:] else ""
        raise UserError(
            f"--workdir={workdir!r} contains a different suite ({differences}). Choose "
            "another --workdir."
        )
    return resumable


def _flatten(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of a plan as plain data by dotted path, tasks by name."""
    if path == "suite.tasks":
        data = {task["name"]: task for task in data}
    if not isinstance(data, dict):
        yield path, list(data) if isinstance(data, tuple) else data
        return
    for name, value in data.items():
        yield from _flatten(value, f"{path}.{name}" if path else name)


def save_result(folder: str, result: RunResult) -> None:
    """Writes the result of the run in `folder`, or raises OutputWriteError."""
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
        result = RunResult(**parse_json(path.read_bytes()))
        required = [(m, result.scores[e][m]) for e in evals for m in metrics if not result.failed]
        values = [value for scores in result.scores.values() for value in scores.values()]
        if not isinstance(result.failed, str) or not all(map(is_number, [result.seconds, *values])):
            raise TypeError
        if not all(0 <= value <= 1 for m, value in required if m == "top1"):
            raise TypeError
        # The log-likelihood of a model that has diverged may be infinite.
        if not all(math.isfinite(value) for m, value in required if m != "log_likelihood"):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a run's result. Remove it to repeat the run.") from error
    return result


def select_learning_rate(results: dict[float, RunResult]) -> float | None:
    """Returns the learning rate with the best validation accuracy; None if every run failed.

    Ties go to the higher log-likelihood, then to the lower learning rate.
    """

    def rank(rate: float) -> tuple[float, float, float]:
        scores = results[rate].scores[VALIDATION]
        return scores["top1"], scores["log_likelihood"], -rate

    return max((rate for rate, run in results.items() if not run.failed), key=rank, default=None)


def delete_checkpoints(folder: str) -> None:
    """Deletes the checkpoints of the run in `folder`, or raises OutputWriteError."""
    checkpoints = epath.Path(folder) / CHECKPOINT_DIR
    with output_errors(folder):
        if checkpoints.exists():
            checkpoints.rmtree()


def save_failure(folder: str, reason: str, traceback: str) -> None:
    """Records why the task in `folder` failed, or raises OutputWriteError."""
    with output_errors(folder):
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        atomic_write(epath.Path(folder) / FAILED_FILE, f"{reason}\n\n{traceback}")


def clear_failure(folder: str) -> None:
    """Removes the record of `save_failure`, or raises OutputWriteError."""
    with output_errors(folder):
        (epath.Path(folder) / FAILED_FILE).unlink(missing_ok=True)


def read_failure(folder: str) -> str:
    """Reads the reason of `save_failure`; empty if the task has not failed."""
    path = epath.Path(folder) / FAILED_FILE
    if not path.exists():
        return ""
    return path.read_bytes().decode(errors="replace").partition("\n")[0]


def save_throughput(workdir: str, throughput: Throughput) -> None:
    """Writes the measured throughput, or raises OutputWriteError or WriteFailureError."""
    with output_errors(workdir):
        atomic_write(epath.Path(workdir) / THROUGHPUT_FILE, _to_text(throughput._asdict()))


def read_throughput(workdir: str) -> Throughput | None:
    """Reads the measured throughput, or returns None; raises UserError if it is damaged."""
    path = epath.Path(workdir) / THROUGHPUT_FILE
    if not path.exists():
        return None
    try:
        throughput = Throughput(**parse_json(path.read_bytes()))
        height, width = throughput.image_size
        sizes = (height, width, throughput.batch_size)
        if (
            not all(map(is_integer, sizes))
            or not is_number(throughput.images_per_second)
            or not isinstance(throughput.device, str)
        ):
            raise TypeError
        return throughput._replace(image_size=(height, width))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged. Remove it to measure again.") from error


def _to_text(data: Any) -> str:
    return json.dumps(data, indent=2) + "\n"
