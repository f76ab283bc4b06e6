"""What a suite is going to do, kept in its folder so that a later start does the same."""

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from mixer_jax.checkpoints import tree
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR
from mixer_jax.config.compat import upgrade_overrides
from mixer_jax.errors import UserError
from mixer_jax.files import atomic_write
from mixer_jax.suites import tasks as tasks_lib
from mixer_jax.suites.run_configs import Run, SuiteSettings, final_runs, is_resumable, sweep_runs
from mixer_jax.suites.tasks import FineTuneTask, Suite, Task
from mixer_jax.training.workdir import CONFIG_FILE

SUITE_FILE = "suite.json"
_OVERRIDES = "overrides."
# What says nothing of the result: where data lie, what people are told.
_NOT_COMPARED = (
    "data_dir",
    "device_days",
    "data_notes",
    "digest",
    "pretrain_dataset_assumed",
    "suite.title",
)
# Differences that an error names.
_MOST_TOLD = 5


class TransferPlan(NamedTuple):
    """A suite for a checkpoint.

    Attributes:
        suite: what is done.
        setting: with what.
        image_sizes: of every task by its name, pixels.
        pretrain_dataset: one of `evaluation.paper.DATA`; empty: unknown.
        device_days: that pre-training took; None: unknown.
        digest: of the weights, as `params_digest`.
        data_notes: of data that are not the protocol's, one line each.
        pretrain_dataset_assumed: whether that is only assumed, from the number of classes.
    """

    suite: Suite
    setting: SuiteSettings
    image_sizes: dict[str, int]
    pretrain_dataset: str = ""
    device_days: float | None = None
    digest: str = ""
    data_notes: tuple[str, ...] = ()
    pretrain_dataset_assumed: bool = False

    @property
    def about(self) -> ModelInfo:
        """What the weights say of themselves."""
        return self.setting.about

    def choosing(self, task: FineTuneTask) -> dict[float, Run]:
        """Returns the runs that choose a task's learning rate, by that."""
        return sweep_runs(task, self.image_sizes[task.name], self.setting)

    def final(self, task: FineTuneTask, learning_rate: float) -> dict[int, Run]:
        """Returns a task's final runs, by their seeds."""
        return final_runs(task, self.image_sizes[task.name], self.setting, learning_rate)


def params_digest(params: tree.Tree) -> str:
    """Returns the SHA-256 of parameters on the host: of their paths, shapes and bytes."""
    digest = hashlib.sha256()
    for path, array in sorted(tree.flatten(params)):
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def check_workdir(workdir: str) -> None:
    """Raises UserError if a folder is that of a run and not of a suite."""
    folder = epath.Path(workdir)
    if (folder / CONFIG_FILE).exists() or (folder / CHECKPOINT_DIR).exists():
        raise UserError(
            f"workdir {workdir!r} belongs to a run of mixer_jax.main; choose another --workdir"
        )


def validate_run_configs(plan: TransferPlan, tasks: Sequence[Task]) -> None:
    """Raises UserError if a run of a task would break a rule between its keys."""
    for task in tasks:
        if isinstance(task, FineTuneTask):
            plan.choosing(task)
            plan.final(task, task.learning_rates[0])


def to_json(plan: TransferPlan) -> dict[str, Any]:
    """Returns a plan as plain data."""
    setting = plan.setting
    # Names of thousands of classes say nothing here.
    about = dataclasses.replace(plan.about, class_names=())
    return {
        "suite": tasks_lib.to_json(plan.suite),
        "checkpoint": setting.checkpoint,
        "about": about.to_dict(),
        "data_dir": setting.data_dir,
        "overrides": dict(setting.overrides),
        "image_sizes": plan.image_sizes,
        "pretrain_dataset": plan.pretrain_dataset,
        "device_days": plan.device_days,
        "digest": plan.digest,
        "data_notes": list(plan.data_notes),
        "pretrain_dataset_assumed": plan.pretrain_dataset_assumed,
    }


def read_plan(workdir: str) -> TransferPlan | None:
    """Returns the plan that `save_plan` wrote; None: there is none.

    Raises:
        UserError: its file is damaged, or of another version.
    """
    path = epath.Path(workdir) / SUITE_FILE
    if not path.exists():
        return None
    try:
        data = _upgrade(json.loads(path.read_text()))
        about = ModelInfo.from_dict(data["about"], str(path))
        overrides = tuple(upgrade_overrides(data["overrides"]).items())
        return TransferPlan(
            tasks_lib.from_json(data["suite"]),
            SuiteSettings(data["checkpoint"], about, data["data_dir"], overrides),
            data["image_sizes"],
            data["pretrain_dataset"],
            data["device_days"],
            data["digest"],
            tuple(data["data_notes"]),
            data["pretrain_dataset_assumed"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged or of another version; choose another --workdir"
        ) from error


def _upgrade(data: dict[str, Any]) -> dict[str, Any]:
    """Translates the names of fields of plans that were saved before these were renamed."""
    names = {
        "pretrained_on": "pretrain_dataset",
        "pretrained_on_assumed": "pretrain_dataset_assumed",
    }
    return {names.get(name, name): value for name, value in data.items()}


def save_plan(workdir: str, plan: TransferPlan) -> list[str]:
    """Writes a plan into its folder, or what is new in it.

    Args:
        workdir: absolute path or URL of the suite.
        plan: to keep.

    Returns:
        Keys that are set differently from before but do no harm, one line "KEY: old -> new" each.

    Raises:
        UserError: the folder holds another suite or other weights' results, or cannot be written.
    """
    path = epath.Path(workdir) / SUITE_FILE
    try:
        if read_plan(workdir) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _create(path, _text(plan))
        # Read back, for another program may have been first.
        old = read_plan(workdir) or plan
        changes = _check_same(workdir, old, plan)
        # A share of the tasks sees only its own data.
        notes = tuple(dict.fromkeys(old.data_notes + plan.data_notes))
        days = old.device_days if plan.device_days is None else plan.device_days
        plan = plan._replace(data_notes=notes, device_days=days)
        if _text(plan) != _text(old):
            atomic_write(path, _text(plan))
    except OSError as error:
        raise UserError(
            f"workdir {workdir!r} cannot be written ({error.strerror}); choose another --workdir"
        ) from error
    return changes


def _text(plan: TransferPlan) -> str:
    return json.dumps(to_json(plan), indent=2) + "\n"


def _create(path: epath.Path, text: str) -> None:
    """Writes a file, whole, unless there is one: of several programs the first has its way."""
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    if "://" in str(path):
        # An object store has no links; there the last has its way.
        atomic_write(path, text)
        return
    try:
        draft.write_text(text)
        os.link(draft, path)
    except FileExistsError:
        pass
    except OSError:
        # Some file systems have no links either.
        atomic_write(path, text)
    finally:
        draft.unlink(missing_ok=True)


def _check_same(workdir: str, old: TransferPlan, new: TransferPlan) -> list[str]:
    """Returns the harmless differences between two plans, and raises UserError for others."""
    before, now = dict(_flatten(to_json(old))), dict(_flatten(to_json(new)))
    if before["checkpoint"] == now["checkpoint"] and old.digest != new.digest:
        raise UserError(
            f"workdir {workdir!r} holds results of other weights: the weights of "
            f"{now['checkpoint']} have changed since; choose another --workdir"
        )
    harmless, harmful = [], []
    for path in {**before, **now}:
        was, is_now = before.get(path, "(absent)"), now.get(path, "(absent)")
        if was == is_now or path in _NOT_COMPARED:
            continue
        key = path.removeprefix(_OVERRIDES)
        if key != path and is_resumable(key):
            harmless.append(f"{key}: {was} -> {is_now}")
        else:
            harmful.append(f"{path}: {was!r} -> {is_now!r}")
    if harmful:
        told = "; ".join(harmful[:_MOST_TOLD]) + ("; …" if harmful[_MOST_TOLD:] else "")
        raise UserError(
            f"workdir {workdir!r} holds another suite ({told}); choose another --workdir"
        )
    return harmless


def select_tasks(suite: Suite, names: tuple[str, ...], shard: tuple[int, int]) -> tuple[Task, ...]:
    """Returns the tasks that this program does.

    Args:
        suite: to pick from.
        names: of tasks; empty: all.
        shard: i and n, for the i-th of n shares, counted from 1.

    Raises:
        UserError: the suite has no task of a name, or no share is left for this program.
    """
    known = [task.name for task in suite.tasks]
    for name in names:
        if name not in known:
            raise UserError(
                f"--tasks names {name!r}, which suite {suite.name} lacks; it has {', '.join(known)}"
            )
    picked = [task for task in suite.tasks if not names or task.name in names]
    number, count = shard
    share = tuple(picked[number - 1 :: count])
    if not share:
        raise UserError(
            f"--shard={number}/{count} is empty: there are {len(picked)} tasks; use fewer shares"
        )
    return share


def _flatten(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of plain data by their dotted paths, tasks by their names."""
    if isinstance(data, dict):
        parts = data.items()
    elif isinstance(data, list | tuple) and data and isinstance(data[0], dict):
        parts = {part["name"]: part for part in data}.items()
    else:
        yield path, list(data) if isinstance(data, tuple) else data
        return
    for name, value in parts:
        yield from _flatten(value, f"{path}.{name}" if path else name)
