"""Tests of evaluation crops, pixel by pixel: which size an image gets, and which part is shown."""

import io
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from mixer_jax.data.decode import BadImageError
from mixer_jax.data.preprocess import eval_image, resize, resize_area
from tests.helpers.bad_images import reason_of
from tests.helpers.images import encode, noise, photograph, png_that_claims
from tests.helpers.messages import mentions

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SHAPES = [(375, 500), (427, 333), (256, 256), (40, 31), (301, 300), (20, 400)]


def part(*shape: int) -> np.ndarray:
    return photograph()[: shape[0], : shape[1]]


def centre(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def evaluate(image: np.ndarray, image_size: tuple[int, int], eval_crop: str) -> np.ndarray:
    encoded = encode(image, "PNG")
    shown = eval_image(encoded, image_size=image_size, eval_crop=eval_crop)
    assert shown.shape == (*image_size, 3)
    assert shown.dtype == np.uint8
    assert shown.flags.c_contiguous
    return shown


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [224, 448, 384, 30])
def test_a_square_is_cut_from_an_image_whose_shorter_side_is_resized(
    shape: tuple[int, int], side: int
) -> None:
    image, larger = part(*shape), round(side * 8 / 7)
    sides = [round(length * larger / min(shape)) for length in shape]
    expected = centre(resize_area(image, *sides), side, side)
    np.testing.assert_array_equal(evaluate(image, (side, side), "shorter_side"), expected)


@pytest.mark.parametrize(
    ("shape", "image_size", "resized"),
    [
        ((400, 600), (224, 336), (256, 384)),
        ((400, 600), (224, 112), (256, 384)),
        ((400, 600), (112, 224), (171, 256)),
        ((600, 400), (112, 224), (384, 256)),
        ((400, 600), (112, 448), (341, 512)),
        # A hair higher than wanted, or wider.
        ((401, 600), (224, 336), (257, 384)),
        ((400, 601), (224, 336), (256, 385)),
        # Enlarged.
        ((20, 30), (224, 112), (256, 384)),
        ((30, 20), (112, 224), (384, 256)),
    ],
)
def test_an_oblong_is_cut_from_the_smallest_image_that_covers_it(
    shape: tuple[int, int], image_size: tuple[int, int], resized: tuple[int, int]
) -> None:
    image = Image.fromarray(photograph()).resize(shape[::-1])
    expected = centre(resize_area(np.asarray(image), *resized), *image_size)
    shown = evaluate(np.asarray(image), image_size, "shorter_side")
    np.testing.assert_array_equal(shown, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("image_size", [(224, 224), (224, 448), (448, 224)])
def test_each_side_may_be_resized_on_its_own(
    shape: tuple[int, int], image_size: tuple[int, int]
) -> None:
    image, (height, width) = part(*shape), image_size
    resized = resize_area(image, height * 8 // 7, width * 8 // 7)
    expected = centre(resized, height, width)
    np.testing.assert_array_equal(evaluate(image, image_size, "square"), expected)


@pytest.mark.parametrize("image_size", [(224, 224), (224, 448), (448, 224)])
def test_the_whole_image_is_resized(image_size: tuple[int, int]) -> None:
    image = part(375, 500)
    expected = resize(image, *image_size)
    np.testing.assert_array_equal(evaluate(image, image_size, "whole"), expected)


def as_timm(image: Image.Image, image_size: tuple[int, int], eval_crop: str) -> np.ndarray:
    """As torchvision's Resize and CenterCrop; for an oblong, the least size that covers it.

    Wanted is the size / 0.875 rounded down; the longer side follows in proportion, rounded down;
    of the margins, halves are rounded to even.
    """
    height, width = image_size
    ratio = max(
        Fraction(int(height / 0.875), image.height), Fraction(int(width / 0.875), image.width)
    )
    size = (int(image.width * ratio), int(image.height * ratio))
    resized = image.resize(size, FILTERS[eval_crop])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return np.asarray(resized.crop((left, top, left + width, top + height)))


@pytest.mark.parametrize("eval_crop", FILTERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("image_size", [(224, 224), (384, 384), (224, 320), (320, 224), (200, 90)])
def test_bicubic_and_bilinear_are_what_timm_does(
    shape: tuple[int, int], image_size: tuple[int, int], eval_crop: str
) -> None:
    image = part(*shape)
    expected = as_timm(Image.fromarray(image), image_size, eval_crop)
    np.testing.assert_array_equal(evaluate(image, image_size, eval_crop), expected)


@pytest.mark.parametrize("eval_crop", FILTERS)
def test_timm_decodes_with_pillow(eval_crop: str) -> None:
    encoded = encode(photograph(), "JPEG", quality=90)
    with Image.open(io.BytesIO(encoded)) as image:
        expected = as_timm(image.convert("RGB"), (224, 224), eval_crop)
    shown = eval_image(encoded, image_size=(224, 224), eval_crop=eval_crop)
    np.testing.assert_array_equal(shown, expected)


@pytest.mark.parametrize("eval_crop", ["shorter_side", "bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1)])
def test_an_image_too_long_to_be_resized_is_refused(eval_crop: str, shape: tuple[int, int]) -> None:
    # Its shorter side made 256 pixels, it would have 300 million.
    image = noise(*shape)
    with pytest.raises(BadImageError) as caught:
        evaluate(image, (224, 224), eval_crop)
    assert caught.value.reason == reason_of(png_that_claims(60_000, 60_000))
    assert mentions(str(caught.value), "256", "1280000")
    assert evaluate(image, (224, 224), "square").shape == (224, 224, 3)


def test_whole_image_of_the_right_size_is_unchanged() -> None:
    np.testing.assert_array_equal(evaluate(noise(48, 48), (48, 48), "whole"), noise(48, 48))


@pytest.mark.parametrize("eval_crop", ["shorter_side", "square"])
def test_evaluation_averages_over_areas(eval_crop: str) -> None:
    image = noise(1024, 1024)
    expected = image.reshape(256, 4, 256, 4, 3).mean((1, 3))[16:240, 16:240]
    shown = evaluate(image, (224, 224), eval_crop).astype(float)
    np.testing.assert_allclose(shown, expected, atol=0.5)
