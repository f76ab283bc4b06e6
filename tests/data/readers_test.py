"""Tests of the readers: what they put where, and out of what randomness."""

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
    shuffled_indices,
)
from mixer_jax.data.source import Example, Source
from tests.helpers.bad_images import reason_of

SIZE = 8
PLACES = np.array([40, 3, 10**12])
SETTINGS: dict[str, Any] = {
    "train_crop": "inception",
    "min_area": 0.05,
    "max_shift": 0,
    "flip": True,
    "randaugment_layers": 2,
    "randaugment_magnitude": 10.0,
}


def encoded(seed: int) -> bytes:
    image = np.random.default_rng(seed).integers(256, size=(20, 30, 3), dtype=np.uint8)
    return cv2.imencode(".png", image)[1].tobytes()


EXAMPLES = [Example(image=encoded(k), labels=(k,), name=f"image {k}") for k in range(10)]
SOURCE = Source("toy", EXAMPLES, tuple("abcdefghij"))


def test_every_place_has_random_numbers_of_its_own() -> None:
    """Whatever was prepared before it, as documented: Philox with seed and place for its key."""
    order = shuffled_indices(SOURCE, 5)
    arrays = TrainReader(SOURCE, 5, SIZE, SETTINGS)(PLACES).arrays
    for row, place in enumerate(PLACES.tolist()):
        rng = np.random.Generator(np.random.Philox(key=[5, place]))
        index = order[place]
        image = train_image(EXAMPLES[index]["image"], rng, image_size=SIZE, **SETTINGS)
        np.testing.assert_array_equal(arrays["image"][row], image)
        assert arrays["label"][row] == index


def test_no_random_number_is_left_over_from_another_place() -> None:
    randomness = _PerExampleRng(5)
    # An odd number of draws of 32 bits leaves half a word behind.
    randomness.at(40).integers(10)
    expected = np.random.Generator(np.random.Philox(key=[5, 3])).integers(10, size=9)
    assert randomness.at(3).integers(10, size=9).tolist() == expected.tolist()


def test_arrays_are_filled_where_they_are() -> None:
    reader = TrainReader(SOURCE, 0, SIZE, SETTINGS)
    whole = reader.allocate(7)
    rows = {name: array[2:5] for name, array in whole.items()}
    assert reader.fill(PLACES, rows) == []
    alone = reader(PLACES).arrays
    for name, array in whole.items():
        np.testing.assert_array_equal(array[2:5], alone[name])
        assert not array[:2].any()
        assert not array[5:].any()


def test_several_right_answers_or_none() -> None:
    answers = [(2, 7), (), (9,)]
    examples = [Example(image=encoded(0), labels=a, name="") for a in answers]
    real = Source("real", examples, tuple("abcdefghij"), multi_label=True)
    arrays = EvalReader(real, (SIZE, SIZE), "whole", exif_orientation=False)(np.arange(4)).arrays
    assert [tuple(np.flatnonzero(row)) for row in arrays["label"]] == [*answers, ()]
    assert arrays["mask"].tolist() == [True, False, True, False]


def test_what_cannot_be_evaluated_stays_empty() -> None:
    examples = [EXAMPLES[0], Example(image=b"broken", labels=(1,), name="image 1"), EXAMPLES[2]]
    source = Source("toy", examples, SOURCE.class_names)
    reader = EvalReader(source, (SIZE, SIZE), "whole", exif_orientation=False)
    arrays, bad = reader(np.arange(4))
    assert bad == [BadImage("image 1", reason_of(b"broken"))]
    assert arrays["mask"].tolist() == [True, False, True, False]
    assert arrays["label"].tolist() == [0, 0, 2, 0]
    assert [image.any() for image in arrays["image"]] == [True, False, True, False]


@pytest.mark.parametrize("size", [(12, 8), (8, 12)])
def test_images_need_not_be_square(size: tuple[int, int]) -> None:
    reader = EvalReader(SOURCE, size, "shorter_side", exif_orientation=False)
    images = reader(np.arange(11)).arrays["image"]
    assert images.shape == (11, *size, 3)
    for row, example in enumerate(EXAMPLES):
        shown = eval_image(example["image"], image_size=size, eval_crop="shorter_side")
        np.testing.assert_array_equal(images[row], shown)
    assert not images[10].any()
