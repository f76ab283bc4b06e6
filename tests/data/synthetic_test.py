"""Tests of synthetic data."""

import numpy as np
import pytest

from mixer_jax.data.decode import decode
from mixer_jax.data.source import Example, Source
from mixer_jax.data.synthetic import synthetic_source


def read(source: Source) -> list[Example]:
    return [source.examples[index] for index in range(len(source))]


def test_synthetic_examples_depend_only_on_the_split() -> None:
    train, train_again, test = (
        read(synthetic_source(split, num_classes=10, num_examples=100, image_size=32))
        for split in ("train", "train", "test")
    )
    assert train == train_again
    assert [e["labels"] for e in train] != [e["labels"] for e in test]
    assert {e["image"] for e in train}.isdisjoint(e["image"] for e in test)


def test_synthetic_labels_alone_are_those_of_the_examples() -> None:
    source = synthetic_source("train", 10, 20)
    labels = [source.examples[index]["labels"] for index in range(20)]
    assert [source.read_labels(index) for index in range(20)] == labels


def test_synthetic_labels_are_uniform() -> None:
    source = synthetic_source("train", num_classes=10, num_examples=1000, image_size=8)
    counts = np.bincount([example["labels"][0] for example in read(source)])
    # 100 of each are expected, with a standard deviation of 9.5.
    assert len(counts) == source.num_classes == 10
    assert counts.min() > 60


@pytest.mark.parametrize("image_size", [32, 224])
def test_synthetic_images_differ_and_have_contrast(image_size: int) -> None:
    source = synthetic_source("train", 10, 20, image_size)
    images = [decode(example["image"]) for example in read(source)]
    assert {image.shape for image in images} == {(image_size, image_size, 3)}
    assert len({image.tobytes() for image in images}) > 10
    assert min(image.std() for image in images) > 30


def test_iterating_over_synthetic_examples_ends() -> None:
    source = synthetic_source("train", 2, 5, 8)
    assert list(source.examples) == read(source)
