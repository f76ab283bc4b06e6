"""Plan of a suite, stored in its workdir so that a later start runs the same."""

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR
from mixer_jax.checkpoints.weights import Tree, flatten_params
from mixer_jax.config.compat import upgrade_overrides
from mixer_jax.errors import UserError
from mixer_jax.files import atomic_write
from mixer_jax.suites import tasks as tasks_lib
from mixer_jax.suites.run_configs import Run, SuiteSettings, final_runs, is_resumable, sweep_runs
from mixer_jax.suites.tasks import FineTuneTask, Suite, Task
from mixer_jax.training.workdir import CONFIG_FILE

SUITE_FILE = "suite.json"
_OVERRIDES = "overrides."
# Fields that do not affect the results.
_NOT_COMPARED = (
    "data_dir",
    "device_days",
    "data_notes",
    "digest",
    "pretrain_dataset_assumed",
    "suite.title",
)
_MAX_DIFFERENCES = 5


class TransferPlan(NamedTuple):
    """Suite to run for a checkpoint.

    Attributes:
        suite: Tasks to run.
        settings: Settings that all runs share.
        image_sizes: Image size of each task by name, in pixels.
        pretrain_dataset: One of `paper_results.PRETRAIN_DATASETS`; empty if unknown.
        device_days: Days of pre-training times the number of devices; None if unknown.
        digest: `params_digest` of the checkpoint.
        data_notes: Data that differ from the protocol, one line each.
        pretrain_dataset_assumed: Whether `pretrain_dataset` is assumed from the number of classes.
    """

    suite: Suite
    settings: SuiteSettings
    image_sizes: dict[str, int]
    pretrain_dataset: str = ""
    device_days: float | None = None
    digest: str = ""
    data_notes: tuple[str, ...] = ()
    pretrain_dataset_assumed: bool = False

    @property
    def model_info(self) -> ModelInfo:
        """Metadata of the checkpoint."""
        return self.settings.model_info

    def sweep_runs(self, task: FineTuneTask) -> dict[float, Run]:
        """Returns the runs of a task's sweep by learning rate."""
        return sweep_runs(task, self.image_sizes[task.name], self.settings)

    def final_runs(self, task: FineTuneTask, learning_rate: float) -> dict[int, Run]:
        """Returns a task's final runs by seed."""
        return final_runs(task, self.image_sizes[task.name], self.settings, learning_rate)


def params_digest(params: Tree) -> str:
    """Computes the SHA-256 digest of the paths, shapes and bytes of parameters on the host."""
    digest = hashlib.sha256()
    for path, array in sorted(flatten_params(params)):
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def check_workdir(workdir: str) -> None:
    """Raises UserError if a workdir belongs to a run instead of a suite."""
    folder = epath.Path(workdir)
    if (folder / CONFIG_FILE).exists() or (folder / CHECKPOINT_DIR).exists():
        raise UserError(
            f"--workdir must not be that of a mixer_jax.main run, got {workdir!r}. Choose another "
            "--workdir."
        )


def validate_run_configs(plan: TransferPlan, tasks: Sequence[Task]) -> None:
    """Raises UserError if the config of a run breaks a rule."""
    for task in tasks:
        if isinstance(task, FineTuneTask):
            plan.sweep_runs(task)
            plan.final_runs(task, task.learning_rates[0])


def to_json(plan: TransferPlan) -> dict[str, Any]:
    """Converts a plan to plain data."""
    settings = plan.settings
    # Thousands of class names do not affect fine-tuning.
    model_info = dataclasses.replace(plan.model_info, class_names=())
    return {
        "suite": tasks_lib.to_json(plan.suite),
        "checkpoint": settings.checkpoint,
        "model_info": model_info.to_dict(),
        "data_dir": settings.data_dir,
        "overrides": dict(settings.overrides),
        "image_sizes": plan.image_sizes,
        "pretrain_dataset": plan.pretrain_dataset,
        "device_days": plan.device_days,
        "digest": plan.digest,
        "data_notes": list(plan.data_notes),
        "pretrain_dataset_assumed": plan.pretrain_dataset_assumed,
    }


def read_plan(workdir: str) -> TransferPlan | None:
    """Restores the plan saved in a workdir; returns None if there is none.

    Raises:
        UserError: The file is damaged or has an unknown format.
    """
    path = epath.Path(workdir) / SUITE_FILE
    if not path.exists():
        return None
    try:
        data = _upgrade(json.loads(path.read_text()))
        model_info = ModelInfo.from_dict(data["model_info"], str(path))
        overrides = tuple(upgrade_overrides(data["overrides"]).items())
        return TransferPlan(
            tasks_lib.from_json(data["suite"]),
            SuiteSettings(data["checkpoint"], model_info, data["data_dir"], overrides),
            data["image_sizes"],
            data["pretrain_dataset"],
            data["device_days"],
            data["digest"],
            tuple(data["data_notes"]),
            data["pretrain_dataset_assumed"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} must be a suite's plan, but is damaged or has an unknown format. Choose "
            "another --workdir."
        ) from error


def _upgrade(data: dict[str, Any]) -> dict[str, Any]:
    """Translates fields of plans that were saved before a rename."""
    names = {
        "about": "model_info",
        "pretrained_on": "pretrain_dataset",
        "pretrained_on_assumed": "pretrain_dataset_assumed",
    }
    return {names.get(name, name): value for name, value in data.items()}


def save_plan(workdir: str, plan: TransferPlan) -> list[str]:
    """Saves a plan in its workdir, or merges it with the plan there.

    Args:
        workdir: Absolute path or URL of the suite's workdir.
        plan: Plan to save.

    Returns:
        Resumable keys that have changed, one line "KEY: old -> new" each.

    Raises:
        UserError: The workdir contains results of a different suite or checkpoint, or is not
            writable.
    """
    path = epath.Path(workdir) / SUITE_FILE
    try:
        if read_plan(workdir) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _create(path, _to_text(plan))
        # Read back, because another process may have been first.
        old = read_plan(workdir) or plan
        changes = _check_same(workdir, old, plan)
        # Every shard sees only the data of its own tasks.
        notes = tuple(dict.fromkeys(old.data_notes + plan.data_notes))
        days = old.device_days if plan.device_days is None else plan.device_days
        plan = plan._replace(data_notes=notes, device_days=days)
        if _to_text(plan) != _to_text(old):
            atomic_write(path, _to_text(plan))
    except OSError as error:
        raise UserError(
            f"--workdir must be writable, got {workdir!r} ({error.strerror}). Choose another "
            "--workdir."
        ) from error
    return changes


def _to_text(plan: TransferPlan) -> str:
    return json.dumps(to_json(plan), indent=2) + "\n"


def _create(path: epath.Path, text: str) -> None:
    """Writes a file atomically unless it exists: among several processes the first one wins."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    if "://" in str(path):
        # Object stores have no links; there the last one wins.
        atomic_write(path, text)
        return
    try:
        temporary.write_text(text)
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        # Some file systems have no links either.
        atomic_write(path, text)
    finally:
        temporary.unlink(missing_ok=True)


def _check_same(workdir: str, old: TransferPlan, new: TransferPlan) -> list[str]:
    """Returns the resumable differences between two plans; raises UserError for others."""
    before, after = dict(_flatten(to_json(old))), dict(_flatten(to_json(new)))
    if before["checkpoint"] == after["checkpoint"] and old.digest != new.digest:
        raise UserError(
            f"--workdir={workdir!r} contains results of other weights: {after['checkpoint']} has "
            "changed since. Choose another --workdir."
        )
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


def select_tasks(suite: Suite, names: tuple[str, ...], shard: tuple[int, int]) -> tuple[Task, ...]:
    """Selects the tasks that this process runs.

    Args:
        suite: Suite to select from.
        names: Names of tasks; empty for all.
        shard: i and n, for the i-th of n shards, counted from 1.

    Raises:
        UserError: The suite has no task with a name, or the shard is empty.
    """
    choices = [task.name for task in suite.tasks]
    for name in names:
        if name not in choices:
            raise UserError(
                f"--tasks must be among the tasks of {suite.name}, {', '.join(choices)}, got "
                f"{name!r}."
            )
    selected = [task for task in suite.tasks if not names or task.name in names]
    index, count = shard
    tasks = tuple(selected[index - 1 :: count])
    if not tasks:
        raise UserError(
            f"--shard={index}/{count} is empty: there are only {len(selected)} tasks. Use fewer "
            "shards."
        )
    return tasks


def _flatten(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of plain data by dotted path, tasks by name."""
    if isinstance(data, dict):
        items = data.items()
    elif isinstance(data, list | tuple) and data and isinstance(data[0], dict):
        items = {item["name"]: item for item in data}.items()
    else:
        yield path, list(data) if isinstance(data, tuple) else data
        return
    for name, value in items:
        yield from _flatten(value, f"{path}.{name}" if path else name)
