"""Data of a suite: available splits, missing datasets, image sizes."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.data.names import HUGGING_FACE, PATH_PREFIXES, split_label
from mixer_jax.data.readers import median_image_area
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.source import Source
from mixer_jax.errors import DatasetNotPreparedError, UserError
from mixer_jax.evaluation.probes import LazyLabels, ProbeConfig, align_labels, sample_all_shots
from mixer_jax.models.registry import get_family
from mixer_jax.suites.tasks import NATIVE, FineTuneTask, ProbeTask, Suite, Task, task_splits

# VTAB's rule (arXiv 1912.11370): smaller images are shown at the smaller size.
_LARGE_AREA = 96 * 96
# Labels of larger splits are not read ahead of their task.
_MAX_LABELS = 100_000


class SuiteData(NamedTuple):
    """Available and missing data of a suite.

    Attributes:
        sources: Splits of every task whose data are available, by task name.
        missing: One-line errors of the other tasks, by task name.
        hints: Commands that prepare the missing data, one line per dataset.
        notes: Splits that differ from TFDS's metadata, one line each.
    """

    sources: dict[str, list[Source]]
    missing: dict[str, str]
    hints: list[str]
    notes: list[str]


def resolve_folders(suite: Suite) -> Suite:
    """Makes the paths of datasets that are not TFDS's absolute, and expands ~."""
    tasks: list[Task] = []
    for task in suite.tasks:
        fields: dict[str, Any] = {"dataset": _resolve_folder(task.dataset)}
        if isinstance(task, FineTuneTask):
            fields["extra_evals"] = {
                name: (_resolve_folder(dataset), split)
                for name, (dataset, split) in task.extra_evals.items()
            }
        tasks.append(dataclasses.replace(task, **fields))
    return dataclasses.replace(suite, tasks=tuple(tasks))


def open_task_data(tasks: Sequence[Task], data_dir: str) -> SuiteData:
    """Opens all data of some tasks, without reading images or using devices.

    Raises:
        UserError: A dataset does not have the number of classes that its task declares.
    """
    data = SuiteData({}, {}, [], [])
    for task in tasks:
        sources = []
        extra = task.extra_evals.values() if isinstance(task, FineTuneTask) else ()
        for dataset, split in [*((task.dataset, split) for split in task_splits(task)), *extra]:
            try:
                sources.append(open_dataset(dataset, split, data_dir))
            except UserError as error:
                data.missing.setdefault(task.name, str(error))
                hint = error.hint if isinstance(error, DatasetNotPreparedError) else str(error)
                if hint not in data.hints:
                    data.hints.append(hint)
        if task.name not in data.missing:
            data.sources[task.name] = sources[: len(task_splits(task))]
            _check_sizes(task, data.sources[task.name], data)
    return data


def check_available(tasks: Sequence[Task], data: SuiteData) -> None:
    """Raises UserError, naming the tasks and the fix, if data are missing."""
    if not data.missing:
        return
    names = list(data.missing)
    if len(tasks) == 1:
        raise UserError(data.missing[names[0]])
    available = [task.name for task in tasks if task.name in data.sources]
    alternative = f", or run the others with --tasks={','.join(available)}" if available else ""
    raise UserError(
        f"data are missing for {len(names)} of {len(tasks)} tasks: {', '.join(names)}. --dry_run "
        f"shows how to prepare them{alternative}."
    )


def check_probe_data(tasks: Sequence[Task], data: SuiteData, skip_bad: bool) -> None:
    """Checks that the available data suit their probes.

    Few-shot probes need enough images of every class; this is checked unless there are too many
    images to read their labels. `skip_bad` skips unreadable examples, which otherwise are an error.

    Raises:
        UserError: The data do not suit a probe; the message names the task and the class.
    """
    for task in tasks:
        if not isinstance(task, ProbeTask) or task.name not in data.sources:
            continue
        train, test = data.sources[task.name]
        try:
            align_labels(train, test)
            if task.method == "few_shot" and len(train) <= _MAX_LABELS:
                config = ProbeConfig(task.method, task.shots, task.seeds)
                sample_all_shots(config, train, LazyLabels(train, skip_bad))
        except UserError as error:
            raise UserError(f"task {task.name}: {error}") from error


def choose_image_size(
    task: Task, requested: str, model_info: ModelInfo, sources: list[Source]
) -> int:
    """Returns the side of a task's square input images, in pixels.

    `requested` is a number of pixels, `tasks.NATIVE` for the checkpoint's size, or `tasks.AUTO` for
    that size if images are smaller than 96 × 96 px, and twice that for others. The last two are the
    task's own size if it has one, rounded to a size that the model accepts: 384 px is 378 px for
    patches of 14 px. The first of `sources` is measured if the task does not declare the size of
    its images; without sources, because data are missing, images count as large.

    Raises:
        UserError: The model does not accept the requested size.
    """
    height, width = model_info.image_size
    family, config = get_family(model_info.family), model_info.config
    if requested.isdecimal():
        size = int(requested)
        family.check_image_size(config, size, size)
        return size
    if isinstance(task, FineTuneTask) and task.image_size:
        multiple = family.image_size_multiple(config)
        return max(round(task.image_size / multiple), 1) * multiple
    if height != width:
        raise UserError(
            f"--image_size must be a number for a checkpoint of non-square images, here {height} × "
            f"{width} px. Pass --image_size={min(height, width)}."
        )
    if requested == NATIVE:
        return height
    is_large = task.is_large_image
    if is_large is None:
        is_large = not sources or median_image_area(sources[0]) >= _LARGE_AREA
    return 2 * height if is_large else height


def _resolve_folder(dataset: str) -> str:
    for prefix in PATH_PREFIXES:
        path = dataset.removeprefix(prefix)
        if path == dataset or not path or "://" in path:
            continue
        resolved = os.path.abspath(os.path.expanduser(path))
        # Another name is that of a dataset on the Hub.
        folders = resolved, split_label(resolved)[0]
        if prefix != HUGGING_FACE or any(map(os.path.isdir, folders)):
            return prefix + resolved
    return dataset


def _check_sizes(task: Task, sources: list[Source], data: SuiteData) -> None:
    num_classes = sources[0].num_classes
    if task.num_classes and num_classes != task.num_classes:
        raise UserError(
            f"task {task.name}: {task.dataset} must have {task.num_classes:,} classes, got "
            f"{num_classes:,}. It is a different dataset with the same name."
        )
    for split, source, expected in zip(
        task_splits(task), sources, task.num_examples or map(len, sources), strict=True
    ):
        if len(source) != expected:
            data.notes.append(
                f"differs from the protocol: {task.dataset} {split} has {len(source):,} images "
                f"instead of {expected:,}"
            )
