"""Tests of evaluation crops, pixel by pixel: the size after resizing, and the position."""

import io
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixer_jax.data.decode import BadImageError
from mixer_jax.data.preprocess import crop_eval_image, eval_image, resize, resize_area
from tests.helpers.bad_images import reason_of
from tests.helpers.images import encode, noise, photograph, png_with_header_size
from tests.helpers.messages import mentions

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SHAPES = [(375, 500), (427, 333), (256, 256), (40, 31), (301, 300), (20, 400)]


def upper_left(*shape: int) -> np.ndarray:
    return photograph()[: shape[0], : shape[1]]


def center_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def evaluate(image: np.ndarray, image_size: tuple[int, int], eval_crop: str) -> np.ndarray:
    encoded = encode(image, "PNG")
    result = eval_image(encoded, image_size=image_size, eval_crop=eval_crop)
    assert result.shape == (*image_size, 3)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [224, 448, 384, 30])
def test_shorter_side_resizes_the_shorter_side_to_8_7_of_a_square(
    shape: tuple[int, int], size: int
) -> None:
    image, before_crop = upper_left(*shape), round(size * 8 / 7)
    resized = [round(length * before_crop / min(shape)) for length in shape]
    expected = center_crop(resize_area(image, *resized), size, size)
    np.testing.assert_array_equal(evaluate(image, (size, size), "shorter_side"), expected)


@pytest.mark.parametrize(
    ("shape", "image_size", "resized"),
    [
        ((400, 600), (224, 336), (256, 384)),
        ((400, 600), (224, 112), (256, 384)),
        ((400, 600), (112, 224), (171, 256)),
        ((600, 400), (112, 224), (384, 256)),
        ((400, 600), (112, 448), (341, 512)),
        # Slightly higher or wider than the target.
        ((401, 600), (224, 336), (257, 384)),
        ((400, 601), (224, 336), (256, 385)),
        # Enlarged.
        ((20, 30), (224, 112), (256, 384)),
        ((30, 20), (112, 224), (384, 256)),
    ],
)
def test_shorter_side_resizes_to_the_smallest_image_that_covers_a_rectangle(
    shape: tuple[int, int], image_size: tuple[int, int], resized: tuple[int, int]
) -> None:
    image = Image.fromarray(photograph()).resize(shape[::-1])
    expected = center_crop(resize_area(np.asarray(image), *resized), *image_size)
    result = evaluate(np.asarray(image), image_size, "shorter_side")
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("image_size", [(224, 224), (224, 448), (448, 224)])
def test_square_resizes_height_and_width_independently(
    shape: tuple[int, int], image_size: tuple[int, int]
) -> None:
    image, (height, width) = upper_left(*shape), image_size
    resized = resize_area(image, height * 8 // 7, width * 8 // 7)
    expected = center_crop(resized, height, width)
    np.testing.assert_array_equal(evaluate(image, image_size, "square"), expected)


@pytest.mark.parametrize("image_size", [(224, 224), (224, 448), (448, 224)])
def test_resize_does_not_crop(image_size: tuple[int, int]) -> None:
    image = upper_left(375, 500)
    expected = resize(image, *image_size)
    np.testing.assert_array_equal(evaluate(image, image_size, "resize"), expected)


def timm_eval_image(
    image: Image.Image, image_size: tuple[int, int], eval_crop: str, crop_pct: float = 0.875
) -> np.ndarray:
    """Applies torchvision's Resize and CenterCrop; for rectangles, the covering size.

    The target is the size / crop_pct, rounded down; the longer side is scaled in proportion and
    rounded down; margins are rounded half to even.
    """
    height, width = image_size
    ratio = max(
        Fraction(int(height / crop_pct), image.height), Fraction(int(width / crop_pct), image.width)
    )
    size = (int(image.width * ratio), int(image.height * ratio))
    resized = image.resize(size, FILTERS[eval_crop])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return np.asarray(resized.crop((left, top, left + width, top + height)))


@pytest.mark.parametrize("eval_crop", FILTERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("image_size", [(224, 224), (384, 384), (224, 320), (320, 224), (200, 90)])
def test_bicubic_and_bilinear_match_timm(
    shape: tuple[int, int], image_size: tuple[int, int], eval_crop: str
) -> None:
    image = upper_left(*shape)
    expected = timm_eval_image(Image.fromarray(image), image_size, eval_crop)
    np.testing.assert_array_equal(evaluate(image, image_size, eval_crop), expected)


@pytest.mark.parametrize("crop_pct", [0.9, 0.95, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [224, 384])
def test_crop_fractions_match_timm(shape: tuple[int, int], size: int, crop_pct: float) -> None:
    image = upper_left(*shape)
    expected = timm_eval_image(Image.fromarray(image), (size, size), "bicubic", crop_pct)
    settings: dict[str, Any] = {"image_size": (size, size), "eval_crop": "bicubic"}
    result = crop_eval_image(image, **settings, eval_crop_fraction=crop_pct)
    np.testing.assert_array_equal(result, expected)


# Sizes before the crop in big_vision's transfers and BiT-HyperRule (arXiv 1912.11370), and timm's.
@pytest.mark.parametrize(
    ("size", "fraction", "resized"),
    [(384, 6 / 7, 448), (384, 0.857, 448), (480, 15 / 16, 512), (128, 0.8, 160), (384, 1.0, 384)],
)
def test_crop_fraction_sets_the_size_before_the_crop(
    size: int, fraction: float, resized: int
) -> None:
    image = upper_left(500, 375)
    settings: dict[str, Any] = {"image_size": (size, size), "eval_crop": "square"}
    result = crop_eval_image(image, **settings, eval_crop_fraction=fraction)
    expected = center_crop(resize_area(image, resized, resized), size, size)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("eval_crop", FILTERS)
def test_bicubic_and_bilinear_decode_like_pillow(eval_crop: str) -> None:
    encoded = encode(photograph(), "JPEG", quality=90)
    with Image.open(io.BytesIO(encoded)) as image:
        expected = timm_eval_image(image.convert("RGB"), (224, 224), eval_crop)
    result = eval_image(encoded, image_size=(224, 224), eval_crop=eval_crop)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("eval_crop", ["shorter_side", "bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1)])
def test_eval_image_rejects_images_too_elongated_to_resize(
    eval_crop: str, shape: tuple[int, int]
) -> None:
    # With a shorter side of 256 pixels, it would have 300 million.
    image = noise(*shape)
    with pytest.raises(BadImageError) as caught:
        evaluate(image, (224, 224), eval_crop)
    assert caught.value.reason == reason_of(png_with_header_size(60_000, 60_000))
    assert mentions(str(caught.value), "256", "1280000")
    assert evaluate(image, (224, 224), "square").shape == (224, 224, 3)


def test_resize_keeps_an_image_of_the_target_size() -> None:
    np.testing.assert_array_equal(evaluate(noise(48, 48), (48, 48), "resize"), noise(48, 48))


@pytest.mark.parametrize("eval_crop", ["shorter_side", "square"])
def test_eval_crops_reduce_by_area_averaging(eval_crop: str) -> None:
    image = noise(1024, 1024)
    mean = image.reshape(256, 4, 256, 4, 3).mean((1, 3))[16:240, 16:240]
    result = evaluate(image, (224, 224), eval_crop)
    np.testing.assert_array_equal(result, np.trunc(mean))
