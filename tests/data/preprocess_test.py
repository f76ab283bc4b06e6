"""Tests of preprocessing: what is decoded, which part of it is kept, and how it is resized."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from mixer_jax.data import preprocess
from mixer_jax.data.preprocess import eval_image, sample_inception_crop, train_image
from mixer_jax.data.randaugment import rand_augment
from tests.helpers.images import encode, noise, smooth, turned

PLAIN: dict[str, Any] = {
    "train_crop": "resize",
    "min_area": 0.05,
    "max_shift": 2,
    "flip": False,
    "randaugment_layers": 0,
    "randaugment_magnitude": 10.0,
}
CROPS = ["inception", "random_crop", "random_shift", "resize"]


def coordinates(height: int, width: int) -> np.ndarray:
    """Returns an image that is 0 to 255 from top to bottom in red, left to right in green."""
    image = np.full((height, width, 3), 128)
    image[..., 0] = np.rint(np.linspace(0, 255, height))[:, None]
    image[..., 1] = np.rint(np.linspace(0, 255, width))
    return image.astype(np.uint8)


def inception_crops(image: np.ndarray, min_area: float, draws: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    height, width, _ = image.shape
    boxes = [sample_inception_crop(height, width, rng, min_area) for _ in range(draws)]
    return [image[top : top + height, left : left + width] for top, left, height, width in boxes]


@pytest.mark.parametrize("min_area", [0.05, 0.5])
@pytest.mark.parametrize("shape", [(200, 200), (160, 250), (250, 160)])
def test_inception_crops_are_parts_in_range(shape: tuple[int, int], min_area: float) -> None:
    image = coordinates(*shape)
    for crop in inception_crops(image, min_area, 500):
        height, width = crop.shape[:2]
        top = int(np.flatnonzero(image[:, 0, 0] == crop[0, 0, 0])[0])
        left = int(np.flatnonzero(image[0, :, 1] == crop[0, 0, 1])[0])
        np.testing.assert_array_equal(crop, image[top : top + height, left : left + width])
        if crop.shape == image.shape:
            continue  # Ten draws did not fit.
        # Sides are rounded to whole pixels.
        assert (height + 0.5) * (width + 0.5) >= min_area * shape[0] * shape[1]
        assert (width + 0.5) / (height - 0.5) >= 3 / 4
        assert (width - 0.5) / (height + 0.5) <= 4 / 3


def test_inception_crops_fill_their_range() -> None:
    crops = inception_crops(coordinates(200, 200), 0.05, 2000)
    areas = np.array([crop.shape[0] * crop.shape[1] for crop in crops]) / 200**2
    aspects = np.array([crop.shape[1] / crop.shape[0] for crop in crops])
    assert areas.min() < 0.06
    assert areas.max() > 0.95
    assert aspects.min() < 0.76
    assert aspects.max() > 1.32
    # Wide and tall are equally likely, and areas uniform where every aspect fits.
    assert abs(np.log(aspects).mean()) < 0.01
    uniform = areas[areas < 0.7]
    assert abs(uniform.mean() - (0.05 + 0.7) / 2) < 0.02
    # Ten tries find one that fits, almost always.
    assert (areas == 1).mean() < 0.01


def test_inception_crops_lie_anywhere() -> None:
    image = coordinates(200, 200)
    small = [crop for crop in inception_crops(image, 0.05, 2000) if max(crop.shape) < 120]
    assert len(small) > 400
    for axis, levels in enumerate([image[:, 0, 0], image[0, :, 1]]):
        # Rows above, or columns left, as a share of all those outside of the crop.
        before = np.searchsorted(levels, [crop[0, 0, axis] for crop in small])
        share = before / [200 - crop.shape[axis] for crop in small]
        assert share.min() == 0
        assert share.max() == 1
        assert abs(share.mean() - 1 / 2) < 0.05
        assert abs(share.std() - 12**-0.5) < 0.03


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        # With sides of at most 4:3 no part of these covers 5 % of them: what is left is the centre.
        ((30, 1000), (0, 480, 30, 40)),
        ((1000, 30), (480, 0, 40, 30)),
        ((1, 1), (0, 0, 1, 1)),
        ((1, 500), (0, 249, 1, 1)),
    ],
)
def test_inception_falls_back_to_the_centre(
    shape: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    rng = np.random.default_rng(0)
    assert {sample_inception_crop(*shape, rng, 0.05) for _ in range(20)} == {box}


def moved(image: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """Returns the image moved down and right, black where nothing came from."""
    result = np.zeros_like(image)
    height, width = image.shape[:2]
    for y in range(height):
        for x in range(width):
            if 0 <= y - dy < height and 0 <= x - dx < width:
                result[y, x] = image[y - dy, x - dx]
    return result


@pytest.mark.parametrize("max_shift", [0, 1, 2])
def test_every_shift_is_equally_likely(max_shift: int) -> None:
    image, rng = noise(6, 7), np.random.default_rng(0)
    reach = range(-max_shift, max_shift + 1)
    expected = {moved(image, dy, dx).tobytes() for dy in reach for dx in reach}
    draws = 60 * len(expected)
    drawn = Counter(preprocess.random_shift(image, rng, max_shift).tobytes() for _ in range(draws))
    assert drawn.keys() == expected
    assert len(expected) == len(reach) ** 2
    # 60 of each are expected, with a standard deviation of 8.
    assert min(drawn.values()) > 30


@pytest.mark.parametrize("shape", [(40, 60), (16, 16), (7, 9), (24, 12)])
def test_every_random_crop_is_equally_likely(shape: tuple[int, int]) -> None:
    image, rng = noise(*shape), np.random.default_rng(0)
    # Resized to 16 for 14: 3 × 3 places.
    resized = preprocess.resize_area(image, 16, 16)
    expected = [resized[y : y + 14, x : x + 14].tobytes() for y in range(3) for x in range(3)]
    settings = PLAIN | {"train_crop": "random_crop"}
    drawn = Counter(
        train_image(encode(image, "PNG"), rng, image_size=14, **settings).tobytes()
        for _ in range(60 * 9)
    )
    assert drawn.keys() == set(expected)
    assert len(drawn) == 9
    # 60 of each are expected, with a standard deviation of 7.
    assert min(drawn.values()) > 30


@pytest.mark.parametrize(("image_size", "margin"), [(224, 32), (448, 64), (384, 55), (32, 5)])
def test_random_crops_keep_seven_eighths(image_size: int, margin: int) -> None:
    image, rng = noise(50, 70), np.random.default_rng(0)
    side = image_size + margin
    resized = preprocess.resize_area(image, side, side)
    for _ in range(10):
        crop = preprocess.random_crop(image, rng, image_size)
        assert crop.shape == (image_size, image_size, 3)
        parts = np.lib.stride_tricks.sliding_window_view(resized, crop.shape)[:, :, 0]
        assert parts.shape[:2] == (margin + 1, margin + 1)
        corners = (parts[:, :, 0, 0] == crop[0, 0]).all(-1)
        assert any((parts[y, x] == crop).all() for y, x in np.argwhere(corners))


@pytest.mark.parametrize("crop", CROPS)
def test_half_of_the_images_are_flipped(crop: str) -> None:
    # Left is dark and right is bright, in whatever part of it.
    encoded, rng = encode(coordinates(32, 32), "PNG"), np.random.default_rng(0)
    settings = PLAIN | {"train_crop": crop, "flip": True, "max_shift": 0}
    images = [train_image(encoded, rng, image_size=16, **settings) for _ in range(400)]
    flipped = sum(bool(image[0, 0, 1] > image[0, -1, 1]) for image in images)
    # 200 are expected, with a standard deviation of 10.
    assert 160 < flipped < 240


def test_flipping_mirrors_left_to_right() -> None:
    image, rng = noise(9, 9), np.random.default_rng(0)
    settings = PLAIN | {"flip": True}
    results = [train_image(encode(image, "PNG"), rng, image_size=9, **settings) for _ in range(20)]
    assert {r.tobytes() for r in results} == {image.tobytes(), image[:, ::-1].tobytes()}


@pytest.mark.parametrize("augment", [PLAIN, PLAIN | {"flip": True, "randaugment_layers": 2}])
@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("shape", [(40, 60), (16, 16), (500, 9)])
def test_training_images(shape: tuple[int, int], crop: str, augment: dict[str, Any]) -> None:
    encoded = encode(noise(*shape), "PNG")

    def draw(seed: int) -> np.ndarray:
        rng, settings = np.random.default_rng(seed), augment | {"train_crop": crop}
        return train_image(encoded, rng, image_size=16, **settings)

    image = draw(0)
    assert image.shape == (16, 16, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, draw(0))
    out = np.zeros((16, 16, 3), np.uint8)
    rng, settings = np.random.default_rng(0), augment | {"train_crop": crop}
    assert train_image(encoded, rng, image_size=16, **settings, out=out) is out
    np.testing.assert_array_equal(out, image)
    whole = crop == "resize" or (crop == "inception" and shape == (500, 9))
    always_alike = whole and not augment["flip"]
    assert (len({draw(seed).tobytes() for seed in range(20)}) == 1) == always_alike


def test_augmentation_follows_flip_and_crop() -> None:
    encoded = encode(smooth(32, 32), "PNG")
    settings = PLAIN | {"randaugment_layers": 2}
    plain = train_image(encoded, np.random.default_rng(0), image_size=32, **PLAIN)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        expected = rand_augment(plain, np.random.default_rng(seed), num_layers=2, magnitude=10.0)
        result = train_image(encoded, rng, image_size=32, **settings)
        np.testing.assert_array_equal(result, expected)


def test_training_resizes_without_antialiasing() -> None:
    image = noise(32, 32)
    resized = train_image(
        encode(image, "PNG"), np.random.default_rng(0), image_size=8, **PLAIN
    ).astype(float)
    # Bilinear at a quarter: the middle four of every sixteen pixels, and no other.
    blocks = image.reshape(8, 4, 8, 4, 3)[:, 1:3, :, 1:3]
    np.testing.assert_allclose(resized, blocks.mean((1, 3)), atol=0.75)


def evaluate(image: np.ndarray, image_size: int, eval_crop: str) -> np.ndarray:
    size = (image_size, image_size)
    return eval_image(encode(image, "PNG"), image_size=size, eval_crop=eval_crop)


@pytest.mark.parametrize("eval_crop", ["shorter_side", "square", "resize"])
@pytest.mark.parametrize("image_size", [224, 448, 32])
@pytest.mark.parametrize(
    "shape", [(256, 256), (375, 500), (500, 333), (40, 30), (30, 900), (900, 30)]
)
def test_evaluation_crops_the_centre(
    shape: tuple[int, int], image_size: int, eval_crop: str
) -> None:
    shown = evaluate(coordinates(*shape), image_size, eval_crop)
    assert shown.shape == (image_size, image_size, 3)
    assert shown.dtype == np.uint8
    assert shown.flags.c_contiguous
    # Pixels of the image per pixel shown: the paper keeps 224 of 256.
    per_pixel = {
        "shorter_side": [min(shape) / image_size * 224 / 256] * 2,
        "square": [side / image_size * 224 / 256 for side in shape],
        "resize": [side / image_size for side in shape],
    }[eval_crop]
    from_centre = np.arange(image_size) - (image_size - 1) / 2
    for channel, side in enumerate(shape):
        position = np.clip((side - 1) / 2 + from_centre * per_pixel[channel], 0, side - 1)
        level = 255 / (side - 1)
        found = shown[..., channel] if channel else shown[..., channel].T
        # Within a pixel, of the image or of what is shown, and the rounding of its level.
        tolerance = max(per_pixel[channel], 1) * level + 1
        np.testing.assert_allclose(
            found, np.tile(position * level, (image_size, 1)), atol=tolerance
        )


@pytest.mark.parametrize("eval_crop", ["shorter_side", "square"])
@pytest.mark.parametrize(("image_size", "side"), [(224, 256), (448, 512), (7, 8)])
def test_evaluation_of_the_right_size_only_crops(
    image_size: int, side: int, eval_crop: str
) -> None:
    image, edge = noise(side, side), (side - image_size) // 2
    expected = image[edge : edge + image_size, edge : edge + image_size]
    np.testing.assert_array_equal(evaluate(image, image_size, eval_crop), expected)


def test_orientation_reaches_both_kinds_of_images() -> None:
    upright, encoded = turned(smooth(16, 32), 1), turned(smooth(16, 32), 3)
    rng = np.random.default_rng
    train: dict[str, Any] = PLAIN | {"image_size": 8, "exif_orientation": True}
    whole: dict[str, Any] = {"image_size": (8, 8), "eval_crop": "resize", "exif_orientation": True}
    for shown, expected in [
        (train_image(e, rng(0), **train) for e in (encoded, upright)),
        (eval_image(e, **whole) for e in (encoded, upright)),
    ]:
        np.testing.assert_array_equal(shown, expected[::-1, ::-1])
