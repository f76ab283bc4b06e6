"""Tests of VTAB-1k: splits with the real counts, and reading of small copies of the datasets."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from mixer_jax.data.decode import decode
from mixer_jax.data.loader import eval_batches, train_batches
from mixer_jax.data.readers import BadImage
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.source import Source
from mixer_jax.data.tfds_labels import bare_dataset_name
from mixer_jax.distributed.sharding import batch_sharding
from mixer_jax.suites.builtin import VTAB_1K
from mixer_jax.suites.tasks import FineTuneTask, task_splits
from tests.helpers.batches import UNCHANGED, mesh_of
from tests.helpers.fake_vtab import COUNTS, SliceMap, real_features, write_fake_dataset

SIZE = 16
# Classes and labeled splits of the datasets in the paper's average of five.
AVERAGE_OF_FIVE = {
    "imagenet2012": (1000, ("train", "validation")),
    "imagenet2012_real": (1000, ("validation",)),
    "cifar10": (10, ("train", "test")),
    "cifar100": (100, ("train", "test")),
    "oxford_iiit_pet": (37, ("train", "test")),
    "oxford_flowers102": (102, ("train", "validation", "train+validation", "test")),
}
all_tasks = pytest.mark.parametrize("task", VTAB_1K, ids=lambda task: task.name)


def examples_of_split(dataset: str, split: str) -> set[tuple[str, int]]:
    """Returns the examples in a split of the real dataset, according to TFDS."""
    counts = COUNTS[bare_dataset_name(dataset)]
    template = tfds.core.ShardedFileTemplate(
        data_dir=Path(), dataset_name=dataset, filetype_suffix="array_record"
    )
    splits = tfds.core.splits.SplitDict(
        [
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=[count],
                num_bytes=0,
                filename_template=template.replace(split=name),
            )
            for name, count in counts.items()
        ]
    )
    taken = [
        (one.splitname, index)
        for one in tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
        for index in range(counts[one.splitname])[slice(one.from_, one.to)]
    ]
    assert splits[split].num_examples == len(taken) == len(set(taken))
    return set(taken)


@all_tasks
def test_splits_have_the_declared_sizes_and_do_not_overlap(task: FineTuneTask) -> None:
    sweep_train, sweep_val, train, test = (
        examples_of_split(task.dataset, split) for split in task_splits(task)
    )
    assert task.num_examples == tuple(map(len, (sweep_train, sweep_val, train, test)))
    assert task.num_examples[:3] == (800, 200, 1000)
    assert not sweep_train & sweep_val
    assert sweep_train | sweep_val == train
    assert not train & test


def test_vtab_1k_has_nineteen_tasks_in_three_groups() -> None:
    groups = [task.group for task in VTAB_1K]
    assert groups == ["natural"] * 7 + ["specialized"] * 4 + ["structured"] * 8
    assert len({task.name for task in VTAB_1K}) == len({task.dataset for task in VTAB_1K}) == 19


@all_tasks
def test_is_large_image_agrees_with_tfds(task: FineTuneTask, tmp_path: Path) -> None:
    height, width, _ = real_features(task.dataset, tmp_path)["image"].shape
    # Datasets without a fixed size contain photographs.
    assert task.is_large_image == (height is None or height * width >= 96**2)


@dataclasses.dataclass(frozen=True)
class Copy:
    """Small substitute for a real dataset.

    Attributes:
        folder: TFDS data directory.
        scale: Translation of slices of the real dataset.
        examples: Examples before they were written by TFDS, by split.
    """

    folder: str
    scale: SliceMap
    examples: dict[str, list[Any]]


@pytest.fixture(scope="module")
def copy_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Copy]:
    """Function that writes the copy of a dataset on first use."""

    @functools.cache
    def write(dataset: str) -> Copy:
        folder = tmp_path_factory.mktemp("copy")
        tasks = [
            task
            for task in VTAB_1K
            if bare_dataset_name(task.dataset) == bare_dataset_name(dataset)
        ]
        scale = SliceMap.from_splits(
            dataset, [split for task in tasks for split in task_splits(task)]
        )
        return Copy(str(folder), scale, write_fake_dataset(dataset, scale.sizes(), folder))

    return lambda dataset: write(dataset.partition("@")[0])


def distance_class(distance: float, *thresholds: float) -> int:
    return sum(distance > threshold for threshold in thresholds)


def vehicle_class(example: dict[str, Any]) -> int:
    # Object types of `kitti`: car 0, van 1, truck 2.
    ahead = [float(o["location"][2]) for o in example["objects"] if o["type"] <= 2]
    return distance_class(min(ahead), 8, 20) if ahead else 3


ANSWERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "clevr@count_all": lambda e: len(e["objects"]) - 3,
    "clevr@closest_object_distance": lambda e: distance_class(
        min(float(o["pixel_coords"][2]) for o in e["objects"]), 8, 8.5, 9, 9.5, 10
    ),
    "dsprites@x_position": lambda e: e["label_x_position"] // 2,
    "dsprites@orientation": lambda e: int(e["label_orientation"] / 2.5),
    "smallnorb@label_azimuth": lambda e: e["label_azimuth"],
    "smallnorb@label_elevation": lambda e: e["label_elevation"],
    "kitti@closest_vehicle_distance": vehicle_class,
    "imagenet2012_real": lambda e: tuple(e["real_label"]),
}


def pixels(dataset: str, encoded: bytes) -> bytes:
    """Returns the expected RGB pixels of an encoded image."""
    # The pixels of dSprites are 0 and 1, for black and white.
    return (decode(encoded) * (255 if bare_dataset_name(dataset) == "dsprites" else 1)).tobytes()


def check_examples(dataset: str, source: Source, copy: Copy) -> set[int]:
    """Asserts that images and labels equal those written; returns the labels."""
    answer = ANSWERS.get(dataset, lambda e: e["label"])
    written = {
        pixels(dataset, example["image"]): example
        for examples in copy.examples.values()
        for example in examples
    }
    found = [source.examples[index] for index in range(len(source))]
    for example in found:
        expected = answer(written.pop(decode(example["image"]).tobytes()))
        labels = expected if isinstance(expected, tuple) else (expected,)
        assert example["labels"] == labels
        assert all(0 <= label < source.num_classes for label in labels)
    return {label for example in found for label in example["labels"]}


def raise_on_bad_images(step: int, bad: list[BadImage]) -> None:
    raise AssertionError(f"at step {step}: {bad}")


def check_evaluation(source: Source) -> None:
    """Asserts that one pass of the pipeline yields every example once, in order."""
    batches = eval_batches(
        source,
        batch_size=8,
        image_size=(SIZE, SIZE),
        eval_crop="resize",
        exif_orientation=False,
        num_threads=1,
        prefetch_batches=1,
        sharding=batch_sharding(mesh_of(1, 1)),
        on_bad_images=raise_on_bad_images,
    )
    arrays = jax.tree.map(lambda *rows: np.concatenate(rows), *map(jax.device_get, batches))
    expected = [source.examples[index]["labels"] for index in range(len(source))]
    assert arrays["image"].shape[1:] == (SIZE, SIZE, 3)
    assert arrays["mask"].sum() == sum(bool(labels) for labels in expected)
    rows = arrays["label"][: len(source)]
    if source.multi_label:
        assert [tuple(np.flatnonzero(row)) for row in rows] == [
            tuple(sorted(set(e))) for e in expected
        ]
    else:
        assert rows.tolist() == [labels[0] for labels in expected]


def check_training(source: Source, crop: str, flip: bool, labels: set[int]) -> None:
    batch = next(
        train_batches(
            source,
            seed=0,
            start_step=0,
            num_steps=1,
            batch_size=8,
            image_size=SIZE,
            preprocess=UNCHANGED | {"train_crop": crop, "flip": flip},
            num_threads=1,
            num_workers=1,
            prefetch_batches=1,
            sharding=batch_sharding(mesh_of(1, 1)),
            on_bad_images=raise_on_bad_images,
        )
    )
    assert batch["image"].shape == (8, SIZE, SIZE, 3)
    assert set(batch["label"].tolist()) <= labels


@all_tasks
def test_tasks_read_images_and_labels(task: FineTuneTask, copy_of: Callable[[str], Copy]) -> None:
    copy = copy_of(task.dataset)
    sources = [
        open_dataset(task.dataset, copy.scale.translate(split), copy.folder)
        for split in task_splits(task)
    ]
    labels = [check_examples(task.dataset, source, copy) for source in sources]
    assert {source.num_classes for source in sources} == {task.num_classes}
    assert [len(source) for source in sources[:3]] == [5, 5, 10]
    assert labels[0] | labels[1] == labels[2]
    check_evaluation(sources[-1])
    check_training(sources[2], task.train_crop, task.flip, labels[2])


@pytest.mark.parametrize("dataset", AVERAGE_OF_FIVE)
def test_data_sets_of_avg5_read_images_and_labels(
    dataset: str, copy_of: Callable[[str], Copy]
) -> None:
    copy = copy_of(dataset)
    num_classes, splits = AVERAGE_OF_FIVE[dataset]
    for split in splits:
        source = open_dataset(dataset, split, copy.folder)
        assert source.num_classes == num_classes
        assert source.multi_label == (dataset == "imagenet2012_real")
        labels = check_examples(dataset, source, copy)
        check_evaluation(source)
        if not source.multi_label:
            check_training(source, "random_crop", True, labels)
