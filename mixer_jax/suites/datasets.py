"""The data of a suite: what is there, what is missing, and at which size its images are seen."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.data.folder import FOLDER
from mixer_jax.data.readers import median_image_area
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.source import Source
from mixer_jax.errors import DatasetNotPreparedError, UserError
from mixer_jax.evaluation.few_shot import LazyLabels
from mixer_jax.evaluation.probes import ProbeConfig, align_labels, sample_all_shots
from mixer_jax.models.mixer_config import check_image_size
from mixer_jax.suites.tasks import NATIVE, FineTuneTask, ProbeTask, Suite, Task

# VTAB's rule, as arXiv 1912.11370 has it: smaller images are seen at the smaller size.
_SMALL_AREA = 96 * 96
# Of larger splits the labels are not read before their task begins.
_MOST_LABELS = 100_000


class SuiteData(NamedTuple):
    """What is known of a suite's data.

    Attributes:
        sources: the splits of every task whose data are there, by the task's name.
        missing: what is wrong with the others, in one line, by the task's name.
        advice: what to do so that they are there, one line a data set.
        notes: of data that are not what TFDS's metadata say.
    """

    sources: dict[str, list[Source]]
    missing: dict[str, str]
    advice: list[str]
    notes: list[str]


def task_splits(task: Task) -> tuple[str, ...]:
    """Returns the splits that a task uses, in the order of its `num_examples`."""
    if isinstance(task, FineTuneTask):
        return task.choose_split, task.validation_split, task.train_split, task.test_split
    return task.train_split, task.test_split


def resolve_folders(suite: Suite) -> Suite:
    """Returns a suite whose folders of images are named so that they mean the same from anywhere.

    Args:
        suite: whose data sets may be "folder:PATH", relative or with a ~.
    """
    tasks: list[Task] = []
    for task in suite.tasks:
        changed: dict[str, Any] = {"dataset": _absolute(task.dataset)}
        if isinstance(task, FineTuneTask):
            places = task.also.items()
            changed["also"] = {name: (_absolute(data), split) for name, (data, split) in places}
        tasks.append(dataclasses.replace(task, **changed))
    return dataclasses.replace(suite, tasks=tuple(tasks))


def open_task_data(tasks: Sequence[Task], data_dir: str) -> SuiteData:
    """Opens all data that tasks need, which costs little; uses no device.

    Args:
        tasks: of a suite.
        data_dir: where TFDS keeps its data sets; empty: TFDS's default.

    Raises:
        UserError: a data set has another number of classes than the task says.
    """
    data = SuiteData({}, {}, [], [])
    for task in tasks:
        sources = []
        also = task.also.values() if isinstance(task, FineTuneTask) else ()
        for dataset, split in [*((task.dataset, split) for split in task_splits(task)), *also]:
            try:
                sources.append(open_dataset(dataset, split, data_dir))
            except UserError as error:
                data.missing.setdefault(task.name, str(error))
                advice = error.hint if isinstance(error, DatasetNotPreparedError) else str(error)
                if advice not in data.advice:
                    data.advice.append(advice)
        if task.name not in data.missing:
            data.sources[task.name] = sources[: len(task_splits(task))]
            _check(task, data.sources[task.name], data)
    return data


def check_available(tasks: Sequence[Task], data: SuiteData) -> None:
    """Raises UserError, naming the tasks and the way out, if data of some are missing."""
    if not data.missing:
        return
    names = list(data.missing)
    if len(tasks) == 1:
        raise UserError(data.missing[names[0]])
    rest = [task.name for task in tasks if task.name in data.sources]
    others = f", and --tasks={','.join(rest)} does the others" if rest else ""
    raise UserError(
        f"{len(names)} of {len(tasks)} tasks lack their data: {', '.join(names)}; --dry_run says "
        f"how to get them{others}"
    )


def check_probe_data(tasks: Sequence[Task], data: SuiteData, skip_bad: bool) -> None:
    """Checks that probes can be learnt from the data that are there.

    Of few-shot probes, that there are enough images of every class, unless there are so many
    images that reading their labels takes long.

    Args:
        tasks: of a suite.
        data: what is there of their data.
        skip_bad: whether examples that cannot be read are left out, or an error.

    Raises:
        UserError: they cannot, naming the task and the class.
    """
    for task in tasks:
        if not isinstance(task, ProbeTask) or task.name not in data.sources:
            continue
        train, test = data.sources[task.name]
        try:
            align_labels(train, test)
            if task.method == "few_shot" and len(train) <= _MOST_LABELS:
                settings = ProbeConfig(task.method, task.shots, task.seeds)
                sample_all_shots(settings, train, LazyLabels(train, skip_bad))
        except UserError as error:
            raise UserError(f"task {task.name}: {error}") from error


def choose_image_size(task: Task, wish: str, about: ModelInfo, sources: list[Source]) -> int:
    """Returns the side at which a task's images are seen, pixels.

    Args:
        task: of the suite.
        wish: `tasks.OWN`, the weights' own size; `tasks.AUTO`, that for images smaller than 96 × 96
            px and twice that for others; or a number of pixels.
        about: what the weights say of themselves.
        sources: of the task, looked at if it does not say how large its images are; empty: the
            data are not there, and taken for large.

    Raises:
        UserError: the size does not suit the weights.
    """
    height, width = about.image_size
    if wish.isdecimal():
        side = int(wish)
        check_image_size(side, side, about.config.patch_size)
        return side
    if height != width:
        raise UserError(
            f"the weights are for images of {height} × {width} px, and suites use square ones; "
            f"pass --image_size={min(height, width)}"
        )
    if wish == NATIVE:
        return height
    large = task.large
    if large is None:
        large = not sources or median_image_area(sources[0]) >= _SMALL_AREA
    return 2 * height if large else height


def _absolute(dataset: str) -> str:
    path = dataset.removeprefix(FOLDER)
    if path == dataset or not path or "://" in path:
        return dataset
    return FOLDER + os.path.abspath(os.path.expanduser(path))


def _check(task: Task, sources: list[Source], data: SuiteData) -> None:
    classes = sources[0].num_classes
    if task.num_classes and classes != task.num_classes:
        raise UserError(
            f"task {task.name}: {task.dataset} has {classes:,} classes and not "
            f"{task.num_classes:,}; it is another data set of that name"
        )
    for split, source, expected in zip(
        task_splits(task), sources, task.num_examples or map(len, sources), strict=True
    ):
        if len(source) != expected:
            data.notes.append(
                f"not the protocol's data: {task.dataset} {split} has {len(source):,} images, not "
                f"{expected:,}"
            )
