"""Tests of the readers: positions of the stream, randomness per position, and filled arrays."""

from typing import Any

import cv2
import numpy as np
import pytest

from mixer_jax.data.preprocess import eval_image, train_image
from mixer_jax.data.readers import (
    BadImage,
    EvalReader,
    TrainReader,
    _PerExampleRng,
    median_image_area,
    shuffled_indices,
)
from mixer_jax.data.source import Example, Source
from tests.helpers.bad_images import reason_of

SIZE = 8
POSITIONS = np.array([40, 3, 10**12])
PREPROCESS: dict[str, Any] = {
    "train_crop": "inception",
    "min_area": 0.05,
    "max_shift": 0,
    "flip": True,
    "randaugment_layers": 2,
    "randaugment_magnitude": 10.0,
}


def encoded(seed: int, height: int = 20, width: int = 30) -> bytes:
    image = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    return cv2.imencode(".png", image)[1].tobytes()


EXAMPLES = [Example(image=encoded(k), labels=(k,), name=f"image {k}") for k in range(10)]
SOURCE = Source("toy", EXAMPLES, tuple("abcdefghij"))


def test_train_reader_uses_the_documented_random_generator() -> None:
    """Philox with key [seed, position], independently of positions read before."""
    indices = shuffled_indices(SOURCE, 5)
    arrays = TrainReader(SOURCE, 5, SIZE, PREPROCESS)(POSITIONS).arrays
    for row, position in enumerate(POSITIONS.tolist()):
        rng = np.random.Generator(np.random.Philox(key=[5, position]))
        index = indices[position]
        image = train_image(EXAMPLES[index]["image"], rng, image_size=SIZE, **PREPROCESS)
        np.testing.assert_array_equal(arrays["image"][row], image)
        assert arrays["label"][row] == index


def test_per_example_rng_keeps_no_state_between_positions() -> None:
    rngs = _PerExampleRng(5)
    # An odd number of 32-bit draws leaves half a word in the generator's buffer.
    rngs.at(40).integers(10)
    expected = np.random.Generator(np.random.Philox(key=[5, 3])).integers(10, size=9)
    assert rngs.at(3).integers(10, size=9).tolist() == expected.tolist()


def test_train_reader_fills_only_the_given_rows() -> None:
    reader = TrainReader(SOURCE, 0, SIZE, PREPROCESS)
    arrays = reader.allocate(7)
    rows = {name: array[2:5] for name, array in arrays.items()}
    assert reader.fill(POSITIONS, rows) == []
    expected = reader(POSITIONS).arrays
    for name, array in arrays.items():
        np.testing.assert_array_equal(array[2:5], expected[name])
        assert not array[:2].any()
        assert not array[5:].any()


SEVERAL = [(2, 7), (), (9,)]
MULTI_LABEL_SOURCE = Source(
    "real",
    [Example(image=encoded(0), labels=labels, name="") for labels in SEVERAL],
    tuple("abcdefghij"),
    multi_label=True,
)


@pytest.mark.parametrize("count_unlabeled", [False, True])
def test_eval_reader_encodes_multiple_labels_or_none(count_unlabeled: bool) -> None:
    reader = EvalReader(
        MULTI_LABEL_SOURCE, (SIZE, SIZE), "resize", False, count_unlabeled=count_unlabeled
    )
    arrays = reader(np.arange(4)).arrays
    assert [tuple(np.flatnonzero(row)) for row in arrays["label"]] == [*SEVERAL, ()]
    assert arrays["mask"].tolist() == [True, count_unlabeled, True, False]


def test_train_reader_encodes_multiple_labels_or_none() -> None:
    reader = TrainReader(MULTI_LABEL_SOURCE, 0, SIZE, PREPROCESS)
    labels = reader(np.arange(3)).arrays["label"]
    assert (labels.shape, labels.dtype) == ((3, 10), np.bool_)
    assert sorted(tuple(np.flatnonzero(row).tolist()) for row in labels) == sorted(SEVERAL)


def test_eval_reader_leaves_rows_of_bad_images_and_padding_empty() -> None:
    examples = [EXAMPLES[0], Example(image=b"broken", labels=(1,), name="image 1"), EXAMPLES[2]]
    source = Source("toy", examples, SOURCE.class_names)
    reader = EvalReader(source, (SIZE, SIZE), "resize", exif_orientation=False)
    arrays, bad_images = reader(np.arange(4))
    assert bad_images == [BadImage("image 1", reason_of(b"broken"))]
    assert arrays["mask"].tolist() == [True, False, True, False]
    assert arrays["label"].tolist() == [0, 0, 2, 0]
    assert [image.any() for image in arrays["image"]] == [True, False, True, False]


@pytest.mark.parametrize("size", [(12, 8), (8, 12)])
def test_eval_reader_accepts_rectangular_image_sizes(size: tuple[int, int]) -> None:
    reader = EvalReader(SOURCE, size, "shorter_side", exif_orientation=False)
    images = reader(np.arange(11)).arrays["image"]
    assert images.shape == (11, *size, 3)
    for row, example in enumerate(EXAMPLES):
        expected = eval_image(example["image"], image_size=size, eval_crop="shorter_side")
        np.testing.assert_array_equal(images[row], expected)
    assert not images[10].any()


def test_median_image_area_skips_bad_images() -> None:
    files = [encoded(0, 2, 3), b"broken", encoded(0, 4, 5), encoded(0, 9, 9)]
    examples = [Example(image=file, labels=(0,), name="") for file in files]
    assert median_image_area(Source("toy", examples, ("a",))) == 20
    assert median_image_area(Source("toy", examples[1:2], ("a",))) == 0


def test_median_image_area_samples_the_whole_source() -> None:
    sizes = [1] * 50 + [3] * 51
    examples = [Example(image=encoded(0, s, s), labels=(0,), name="") for s in sizes]
    assert median_image_area(Source("toy", examples[:60], ("a",))) == 1
    assert median_image_area(Source("toy", examples[40:], ("a",))) == 9
