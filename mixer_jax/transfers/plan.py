"""What a suite is going to do, kept in its folder so that a later start does the same."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from mixer_jax.errors import UserError
from mixer_jax.evaluation import tasks as tasks_lib
from mixer_jax.evaluation.tasks import FineTune, Suite, Task
from mixer_jax.training.workdir import write_whole
from mixer_jax.transfers.runs import Run, Setting, choosing_runs, final_runs
from mixer_jax.weights.about import About, from_json

SUITE_FILE = "suite.json"
# Differences that an error names.
_MOST_TOLD = 5


class Plan(NamedTuple):
    """A suite for a checkpoint.

    Attributes:
        suite: what is done.
        setting: with what.
        image_sizes: of every task by its name, pixels.
        pretrained_on: one of `evaluation.paper.DATA`; empty: unknown.
        device_days: that pre-training took; None: unknown.
    """

    suite: Suite
    setting: Setting
    image_sizes: dict[str, int]
    pretrained_on: str = ""
    device_days: float | None = None

    @property
    def about(self) -> About:
        """What the weights say of themselves."""
        return self.setting.about

    def choosing(self, task: FineTune) -> dict[float, Run]:
        """Returns the runs that choose a task's learning rate, by that."""
        return choosing_runs(task, self.image_sizes[task.name], self.setting)

    def final(self, task: FineTune, learning_rate: float) -> dict[int, Run]:
        """Returns a task's final runs, by their seeds."""
        return final_runs(task, self.image_sizes[task.name], self.setting, learning_rate)


def check_runs(plan: Plan, tasks: Sequence[Task]) -> None:
    """Raises UserError if a run of a task would break a rule between its keys."""
    for task in tasks:
        if isinstance(task, FineTune):
            plan.choosing(task)
            plan.final(task, task.learning_rates[0])


def to_json(plan: Plan) -> dict[str, Any]:
    """Returns a plan as plain data."""
    setting = plan.setting
    # Names of thousands of classes say nothing here.
    about = dataclasses.replace(plan.about, class_names=())
    return {
        "suite": tasks_lib.to_json(plan.suite),
        "checkpoint": setting.checkpoint,
        "about": about.to_json(),
        "data_dir": setting.data_dir,
        "overrides": dict(setting.overrides),
        "image_sizes": plan.image_sizes,
        "pretrained_on": plan.pretrained_on,
        "device_days": plan.device_days,
    }


def read_plan(workdir: str) -> Plan | None:
    """Returns the plan that `save_plan` wrote; None: there is none.

    Raises:
        UserError: its file is damaged, or of another version.
    """
    path = epath.Path(workdir) / SUITE_FILE
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        about = from_json(data["about"], str(path))
        overrides = tuple(data["overrides"].items())
        return Plan(
            tasks_lib.from_json(data["suite"]),
            Setting(data["checkpoint"], about, data["data_dir"], overrides),
            data["image_sizes"],
            data["pretrained_on"],
            data["device_days"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged or of another version; choose another --workdir"
        ) from error


def save_plan(workdir: str, plan: Plan) -> None:
    """Writes a plan into its folder, unless it is there.

    Raises:
        UserError: the folder holds another one, or cannot be written.
    """
    old = read_plan(workdir)
    if old is not None:
        before, now = dict(_flatten(to_json(old))), dict(_flatten(to_json(plan)))
        # Where data lie says nothing of the result.
        differing = [
            f"{path}: {before.get(path, '(absent)')!r} -> {now.get(path, '(absent)')!r}"
            for path in {**before, **now}
            if path != "data_dir" and before.get(path) != now.get(path)
        ]
        if differing:
            told = "; ".join(differing[:_MOST_TOLD]) + ("; …" if differing[_MOST_TOLD:] else "")
            raise UserError(
                f"workdir {workdir!r} holds another suite ({told}); choose another --workdir"
            )
        return
    try:
        path = epath.Path(workdir) / SUITE_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(to_json(plan), indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"workdir {workdir!r} cannot be written ({error.strerror}); choose another --workdir"
        ) from error


def pick_tasks(suite: Suite, names: tuple[str, ...], shard: tuple[int, int]) -> tuple[Task, ...]:
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
