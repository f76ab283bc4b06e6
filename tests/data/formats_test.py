"""Guarantees of the loader for datasets of every format, which contain the same images."""

import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from mixer_jax.benchmarks.formats import DatasetLocation, LabeledImage, write_datasets
from mixer_jax.data.conversion import convert_dataset
from mixer_jax.data.loader import Batch, Chunks, eval_batches
from mixer_jax.data.readers import TrainReader
from mixer_jax.data.registry import list_splits, open_dataset
from mixer_jax.data.source import Source
from mixer_jax.distributed.sharding import batch_sharding
from tests.helpers.batches import (
    AUGMENTED,
    SIZE,
    assert_identical,
    mesh_of,
    on_host,
    small_train_batches,
)
from tests.helpers.images import encode

CLASSES = ("bird house", "cat", "dog")
NUM_TRAIN, NUM_VALIDATION = 20, 7
FORMATS = ["folder", "array_record", "manifest", "wds", "hf, Arrow", "hf, Parquet"]


def make_images(count: int, seed: int) -> list[LabeledImage]:
    """Makes JPEG files of noise, of which no two are the same."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 12, 16, 3), np.uint8)
    return [
        LabeledImage(encode(image, "JPEG"), CLASSES[index % 3])
        for index, image in enumerate(pixels)
    ]


SPLITS = {"train": make_images(NUM_TRAIN, 0), "validation": make_images(NUM_VALIDATION, 1)}


@pytest.fixture(scope="module")
def locations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, DatasetLocation]]:
    folder = tmp_path_factory.mktemp("formats")
    with pytest.MonkeyPatch.context() as patch:
        # Parquet is converted in the cache.
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        yield write_datasets(SPLITS, folder, shard_size=8)


@pytest.fixture(params=FORMATS)
def location(request: Any, locations: dict[str, DatasetLocation]) -> DatasetLocation:
    return locations[request.param]


@pytest.fixture
def train(location: DatasetLocation) -> Source:
    return open_dataset(location.name, "train", location.data_dir)


def test_every_format_is_tested(locations: dict[str, DatasetLocation]) -> None:
    assert sorted(locations) == sorted(FORMATS)


@pytest.mark.parametrize("split", SPLITS)
def test_formats_have_the_same_images_and_classes(split: str, location: DatasetLocation) -> None:
    source = open_dataset(location.name, split, location.data_dir)
    assert source.class_names == CLASSES
    assert not source.multi_label
    read = [source.examples[index] for index in range(len(source))]
    assert [source.read_labels(index) for index in range(len(source))] == [
        example["labels"] for example in read
    ]
    assert Counter((e["image"], CLASSES[e["labels"][0]]) for e in read) == Counter(SPLITS[split])
    assert len({example["name"] for example in read}) == len(read)


def test_slices_contain_all_classes_and_partition_a_split(location: DatasetLocation) -> None:
    first, second = (
        open_dataset(location.name, split, location.data_dir)
        for split in ("train[:60%]", "train[60%:]")
    )
    images = Counter(
        part.examples[i]["image"] for part in (first, second) for i in range(len(part))
    )
    assert images == Counter(image.image for image in SPLITS["train"])
    for part in (first, second):
        assert {part.read_labels(index)[0] for index in range(len(part))} == {0, 1, 2}


def test_splits_are_listed(location: DatasetLocation) -> None:
    if not location.data_dir:
        assert list_splits(location.name) == ("train", "validation")


def batches(source: Source, start_step: int = 0, num_steps: int = 6, **settings: Any) -> Any:
    return small_train_batches(
        start_step, num_steps, preprocess=AUGMENTED, examples=source.examples, **settings
    )


def test_an_epoch_contains_every_example_once(train: Source) -> None:
    reader = TrainReader(train, 0, SIZE, AUGMENTED)
    for epoch in range(3):
        positions = range(epoch * NUM_TRAIN, (epoch + 1) * NUM_TRAIN)
        indices = [int(reader._indices[position]) for position in positions]
        images = Counter(train.examples[index]["image"] for index in indices)
        assert images == Counter(image.image for image in SPLITS["train"])


def labels_of(batches: Iterator[Batch]) -> np.ndarray:
    return np.concatenate([batch["label"] for batch in on_host(batches)])


def test_batches_of_an_epoch_have_every_label(train: Source) -> None:
    # Five batches of four are an epoch.
    epochs = np.sort(labels_of(batches(train, num_steps=10)).reshape(2, NUM_TRAIN))
    expected = sorted(CLASSES.index(image.class_name) for image in SPLITS["train"])
    assert epochs.tolist() == [expected, expected]


@pytest.mark.parametrize("start_step", [1, 5])
def test_batches_are_the_same_when_resumed(start_step: int, train: Source) -> None:
    from_start = batches(train)
    for _ in range(start_step):
        next(from_start)
    assert_identical(batches(train, start_step), from_start)


def test_batches_are_the_same_when_the_dataset_is_opened_again(
    location: DatasetLocation, train: Source
) -> None:
    again = open_dataset(location.name, "train", location.data_dir)
    assert again.fingerprint() == train.fingerprint()
    assert_identical(batches(train), batches(again))


def test_batches_do_not_depend_on_threads(train: Source) -> None:
    assert_identical(batches(train, num_threads=1), batches(train, num_threads=4))


@pytest.mark.slow
def test_batches_do_not_depend_on_processes(train: Source) -> None:
    assert_identical(batches(train, num_workers=1), batches(train, num_workers=2))


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_hosts_load_disjoint_rows_of_the_same_batches(num_hosts: int, train: Source) -> None:
    def load(local_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Every host has its own copy of the opened dataset.
        reader = TrainReader(pickle.loads(pickle.dumps(train)), 0, SIZE, AUGMENTED)
        chunks = Chunks(range(1, 4), local_rows, 8)
        positions = np.concatenate([chunk.positions for chunk in chunks])
        return positions, reader(positions).arrays["image"]

    _, expected = load(np.arange(8))
    parts = [load(local_rows) for local_rows in np.split(np.arange(8), num_hosts)]
    positions, images = (np.concatenate(column) for column in zip(*parts, strict=True))
    assert sorted(positions) == list(range(8, 32))
    np.testing.assert_array_equal(images[np.argsort(positions)], expected)


def test_evaluation_counts_every_example_once(location: DatasetLocation) -> None:
    source = open_dataset(location.name, "validation", location.data_dir)
    evaluated = on_host(
        eval_batches(
            source,
            batch_size=4,
            image_size=(SIZE, SIZE),
            eval_crop="resize",
            exif_orientation=False,
            num_threads=2,
            prefetch_batches=2,
            sharding=batch_sharding(mesh_of(1, 1)),
            on_bad_images=print,
        )
    )
    mask, labels, images = (
        np.concatenate([batch[name] for batch in evaluated]) for name in ("mask", "label", "image")
    )
    assert mask.tolist() == [True] * NUM_VALIDATION + [False]
    expected = sorted(CLASSES.index(image.class_name) for image in SPLITS["validation"])
    assert sorted(labels[mask]) == expected
    assert len({image.tobytes() for image in images[mask]}) == NUM_VALIDATION


@pytest.mark.parametrize("format_name", [name for name in FORMATS if name != "array_record"])
def test_conversion_keeps_batches_and_evaluation(
    format_name: str, locations: dict[str, DatasetLocation], tmp_path: Path
) -> None:
    original, _ = locations[format_name]
    convert_dataset(original, "converted", str(tmp_path))
    for split in SPLITS:
        before = open_dataset(original, split)
        after = open_dataset("converted", split, str(tmp_path))
        assert before.class_names == after.class_names
        assert_identical(batches(before), batches(after))
        names = [after.examples[index]["name"] for index in range(len(after))]
        # They do not depend on where the original is.
        assert not any(str(tmp_path.parent) in name or "formats" in name for name in names)
        assert len(set(names)) == len(names)
