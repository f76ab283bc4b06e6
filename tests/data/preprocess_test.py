"""Tests of preprocessing: crops and their distributions, flips, resizing, random erasing."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from mixer_jax.data import preprocess
from mixer_jax.data.permutation import PixelPermutation
from mixer_jax.data.preprocess import (
    erase_random_box,
    eval_image,
    sample_resized_crop,
    train_image,
)
from mixer_jax.data.randaugment import rand_augment
from tests.helpers.images import encode, encode_with_orientation, noise, smooth

PLAIN: dict[str, Any] = {
    "train_crop": "resize",
    "min_area": 0.05,
    "max_shift": 2,
    "flip": False,
    "randaugment_layers": 0,
    "randaugment_magnitude": 10.0,
}
CROPS = [
    "inception",
    "random_resized_crop",
    "random_crop",
    "bilinear_crop",
    "random_shift",
    "resize",
]


def coordinates(height: int, width: int) -> np.ndarray:
    """Makes an image with gradients from 0 to 255: red from top to bottom, green left to right."""
    image = np.full((height, width, 3), 128)
    image[..., 0] = np.rint(np.linspace(0, 255, height))[:, None]
    image[..., 1] = np.rint(np.linspace(0, 255, width))
    return image.astype(np.uint8)


def resized_crops(image: np.ndarray, min_area: float, draws: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    height, width, _ = image.shape
    boxes = [sample_resized_crop(height, width, rng, min_area) for _ in range(draws)]
    return [image[top : top + height, left : left + width] for top, left, height, width in boxes]


@pytest.mark.parametrize("min_area", [0.05, 0.5])
@pytest.mark.parametrize("shape", [(200, 200), (160, 250), (250, 160)])
def test_resized_crops_have_valid_areas_and_aspect_ratios(
    shape: tuple[int, int], min_area: float
) -> None:
    image = coordinates(*shape)
    for crop in resized_crops(image, min_area, 500):
        height, width = crop.shape[:2]
        top = int(np.flatnonzero(image[:, 0, 0] == crop[0, 0, 0])[0])
        left = int(np.flatnonzero(image[0, :, 1] == crop[0, 0, 1])[0])
        np.testing.assert_array_equal(crop, image[top : top + height, left : left + width])
        if crop.shape == image.shape:
            continue  # The center crop after ten attempts.
        # Height and width are rounded to integers.
        assert (height + 0.5) * (width + 0.5) >= min_area * shape[0] * shape[1]
        assert (width + 0.5) / (height - 0.5) >= 3 / 4
        assert (width - 0.5) / (height + 0.5) <= 4 / 3


def test_resized_crops_cover_the_range_of_areas_and_aspect_ratios() -> None:
    crops = resized_crops(coordinates(200, 200), 0.05, 2000)
    areas = np.array([crop.shape[0] * crop.shape[1] for crop in crops]) / 200**2
    aspects = np.array([crop.shape[1] / crop.shape[0] for crop in crops])
    assert areas.min() < 0.06
    assert areas.max() > 0.95
    assert aspects.min() < 0.76
    assert aspects.max() > 1.32
    # Wide and tall crops are equally likely; areas are uniform where every aspect ratio fits.
    assert abs(np.log(aspects).mean()) < 0.01
    uniform = areas[areas < 0.7]
    assert abs(uniform.mean() - (0.05 + 0.7) / 2) < 0.02
    # Ten attempts almost always suffice.
    assert (areas == 1).mean() < 0.01


def test_resized_crop_positions_are_uniform() -> None:
    image = coordinates(200, 200)
    small = [crop for crop in resized_crops(image, 0.05, 2000) if max(crop.shape) < 120]
    assert len(small) > 400
    for axis, levels in enumerate([image[:, 0, 0], image[0, :, 1]]):
        # Rows above (columns left of) the crop, as a fraction of all rows (columns) outside of it.
        before = np.searchsorted(levels, [crop[0, 0, axis] for crop in small])
        fraction = before / [200 - crop.shape[axis] for crop in small]
        assert fraction.min() == 0
        assert fraction.max() == 1
        assert abs(fraction.mean() - 1 / 2) < 0.05
        assert abs(fraction.std() - 12**-0.5) < 0.03


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        # No crop with an aspect ratio up to 4:3 covers 5 % of these images.
        ((30, 1000), (0, 480, 30, 40)),
        ((1000, 30), (480, 0, 40, 30)),
        ((1, 1), (0, 0, 1, 1)),
        ((1, 500), (0, 249, 1, 1)),
    ],
)
def test_resized_crop_falls_back_to_the_center(
    shape: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    rng = np.random.default_rng(0)
    assert {sample_resized_crop(*shape, rng, 0.05) for _ in range(20)} == {box}


def shift_image(image: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """Shifts the image down and right, padding with black."""
    result = np.zeros_like(image)
    height, width = image.shape[:2]
    for y in range(height):
        for x in range(width):
            if 0 <= y - dy < height and 0 <= x - dx < width:
                result[y, x] = image[y - dy, x - dx]
    return result


@pytest.mark.parametrize("max_shift", [0, 1, 2])
def test_random_shifts_are_uniform(max_shift: int) -> None:
    image, rng = noise(6, 7), np.random.default_rng(0)
    reach = range(-max_shift, max_shift + 1)
    expected = {shift_image(image, dy, dx).tobytes() for dy in reach for dx in reach}
    draws = 60 * len(expected)
    drawn = Counter(preprocess.random_shift(image, rng, max_shift).tobytes() for _ in range(draws))
    assert drawn.keys() == expected
    assert len(expected) == len(reach) ** 2
    # 60 of each are expected, with a standard deviation of 8.
    assert min(drawn.values()) > 30


@pytest.mark.parametrize("shape", [(40, 60), (16, 16), (7, 9), (24, 12)])
def test_random_crops_are_uniform(shape: tuple[int, int]) -> None:
    image, rng = noise(*shape), np.random.default_rng(0)
    # Resized to 16 for a crop of 14: 3 × 3 positions.
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


@pytest.mark.parametrize(
    ("train_crop", "image_size", "resize_size", "margin"),
    [
        ("random_crop", 224, 0, 32),
        ("random_crop", 448, 0, 64),
        ("random_crop", 384, 0, 55),
        ("random_crop", 32, 0, 5),
        ("random_crop", 32, 48, 16),
        ("bilinear_crop", 32, 0, 5),
        # BiT-HyperRule.
        ("bilinear_crop", 128, 160, 32),
        ("bilinear_crop", 384, 448, 64),
    ],
)
def test_random_crops_are_parts_of_the_resized_image(
    train_crop: str, image_size: int, resize_size: int, margin: int
) -> None:
    image, rng = noise(50, 70), np.random.default_rng(0)
    size = image_size + margin
    resize = preprocess.resize if train_crop == "bilinear_crop" else preprocess.resize_area
    resized = resize(image, size, size)
    settings = PLAIN | {"train_crop": train_crop, "resize_size": resize_size}
    for _ in range(10):
        crop = train_image(encode(image, "PNG"), rng, image_size=image_size, **settings)
        assert crop.shape == (image_size, image_size, 3)
        windows = np.lib.stride_tricks.sliding_window_view(resized, crop.shape)[:, :, 0]
        assert windows.shape[:2] == (margin + 1, margin + 1)
        corners = (windows[:, :, 0, 0] == crop[0, 0]).all(-1)
        assert any((windows[y, x] == crop).all() for y, x in np.argwhere(corners))


@pytest.mark.parametrize("crop", CROPS)
def test_train_image_flips_half_of_the_images(crop: str) -> None:
    # In any crop, the left is darker than the right.
    encoded, rng = encode(coordinates(32, 32), "PNG"), np.random.default_rng(0)
    settings = PLAIN | {"train_crop": crop, "flip": True, "max_shift": 0}
    images = [train_image(encoded, rng, image_size=16, **settings) for _ in range(400)]
    flipped = sum(bool(image[0, 0, 1] > image[0, -1, 1]) for image in images)
    # 200 are expected, with a standard deviation of 10.
    assert 160 < flipped < 240


def test_train_image_flips_horizontally() -> None:
    image, rng = noise(9, 9), np.random.default_rng(0)
    settings = PLAIN | {"flip": True}
    results = [train_image(encode(image, "PNG"), rng, image_size=9, **settings) for _ in range(20)]
    assert {r.tobytes() for r in results} == {image.tobytes(), image[:, ::-1].tobytes()}


@pytest.mark.parametrize("augment", [PLAIN, PLAIN | {"flip": True, "randaugment_layers": 2}])
@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("shape", [(40, 60), (16, 16), (500, 9)])
def test_train_image_is_deterministic_and_writes_to_out(
    shape: tuple[int, int], crop: str, augment: dict[str, Any]
) -> None:
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
    has_one_crop = crop == "resize" or (
        crop in ("inception", "random_resized_crop") and shape == (500, 9)
    )
    is_constant = has_one_crop and not augment["flip"]
    assert (len({draw(seed).tobytes() for seed in range(20)}) == 1) == is_constant


def test_randaugment_is_applied_after_crop_and_flip() -> None:
    encoded = encode(smooth(32, 32), "PNG")
    settings = PLAIN | {"randaugment_layers": 2}
    plain = train_image(encoded, np.random.default_rng(0), image_size=32, **PLAIN)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        expected = rand_augment(plain, np.random.default_rng(seed), num_layers=2, magnitude=10.0)
        result = train_image(encoded, rng, image_size=32, **settings)
        np.testing.assert_array_equal(result, expected)


def erased_box(before: np.ndarray, after: np.ndarray) -> tuple[int, int, int, int]:
    """Finds top, left, height and width of the only box in which two images differ."""
    different = (before != after).any(-1)
    (rows, columns) = (np.flatnonzero(different.any(axis)) for axis in (1, 0))
    top, left, height, width = rows[0], columns[0], len(rows), len(columns)
    assert different.sum() == height * width
    assert different[top : top + height, left : left + width].all()
    return int(top), int(left), height, width


def test_erased_boxes_have_the_sizes_and_positions_of_their_formula() -> None:
    # No level of the image is that of the box.
    image, rng = np.zeros((100, 140, 3), np.uint8), np.random.default_rng(0)
    boxes = np.array(
        [erased_box(image, erase_random_box(image, rng, "constant")) for _ in range(3000)]
    )
    top, left, height, width = boxes.T
    assert image.max() == 0
    assert (height < 100).all()
    assert (width < 140).all()
    # Height and width are rounded to integers.
    assert ((height + 0.5) * (width + 0.5) >= 0.02 * 14_000).all()
    assert ((height - 0.5) * (width - 0.5) <= 14_000 / 3).all()
    assert ((height + 0.5) / (width - 0.5) >= 0.3).all()
    assert ((height - 0.5) / (width + 0.5) <= 1 / 0.3).all()
    # Boxes of up to a fifth of the area fit with any aspect ratio: areas are uniform there, and
    # aspect ratios log-uniform.
    areas, aspects = height * width / 14_000, np.log(height / width)
    small = areas < 0.2
    assert areas[small].mean() == pytest.approx((0.02 + 0.2) / 2, abs=0.006)
    assert aspects[small].mean() == pytest.approx(0.0, abs=0.06)
    assert aspects[small].std() == pytest.approx(np.log(1 / 0.3) / 3**0.5, abs=0.03)
    for start, free in ((top[small], 100 - height[small]), (left[small], 140 - width[small])):
        assert (start <= free).all()
        assert (start / free).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (2, 2)])
def test_images_too_small_for_a_box_are_not_erased(shape: tuple[int, int]) -> None:
    image, rng = noise(*shape), np.random.default_rng(0)
    results = [erase_random_box(image, rng, "pixel") for _ in range(20)]
    if 1 in shape:
        assert all((result == image).all() for result in results)
    assert {result.shape for result in results} == {(*shape, 3)}


@pytest.mark.parametrize(("mode", "max_colors"), [("constant", 1), ("random", 1), ("pixel", 2**24)])
def test_erased_boxes_have_one_color_or_noise(mode: str, max_colors: int) -> None:
    # Positions of the box are the same in all modes.
    before, rng = np.full((64, 64, 3), 7, np.uint8), np.random.default_rng
    top, left, height, width = erased_box(before, erase_random_box(before, rng(1), "constant"))
    erased = erase_random_box(before, rng(1), mode)
    box = erased[top : top + height, left : left + width]
    outside = np.ones((64, 64), bool)
    outside[top : top + height, left : left + width] = False
    assert (erased[outside] == 7).all()
    colors = np.unique(box.reshape(-1, 3), axis=0)
    if max_colors == 1:
        assert len(colors) == 1
    else:
        # Uniform levels, independent per pixel and channel.
        assert len(colors) > 0.9 * height * width
        assert box.mean() == pytest.approx(127.5, abs=6)
        assert box.std() == pytest.approx(256 / 12**0.5, abs=4)
        assert abs(np.corrcoef(box[..., 0].ravel(), box[..., 1].ravel())[0, 1]) < 0.15
    if mode == "constant":
        # The model sees almost 0.
        assert np.abs(box / 127.5 - 1).max() < 0.004
    if mode == "random":
        fills = {erase_random_box(before, rng(seed), mode).max() for seed in range(20)}
        assert len(fills) > 10


def test_train_image_erases_with_its_probability_after_everything_random() -> None:
    encoded = encode(smooth(40, 40), "PNG")
    settings = PLAIN | {"train_crop": "inception", "flip": True, "randaugment_layers": 2}
    permutation = PixelPermutation("pixels", 8, 0)
    num_erased = 0
    for seed in range(200):

        def draw(seed: int = seed, **changes: Any) -> np.ndarray:
            rng = np.random.default_rng(seed)
            return train_image(encoded, rng, image_size=32, **settings | changes)

        plain, erased = draw(), draw(random_erasing=0.3, random_erasing_mode="pixel")
        if (plain == erased).all():
            continue
        # Crop, flip and RandAugment are those of the image without a box.
        different = (plain != erased).any(-1)
        rows, columns = np.flatnonzero(different.any(1)), np.flatnonzero(different.any(0))
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        assert different[box].mean() > 0.99
        assert different[box].size < 32 * 32 / 2
        num_erased += 1
        if num_erased < 5:
            permuted = draw(
                random_erasing=0.3, random_erasing_mode="pixel", permutation=permutation
            )
            np.testing.assert_array_equal(permuted, permutation(erased))
    # 60 are expected, with a standard deviation of 6.5.
    assert 35 < num_erased < 85


def test_train_image_resizes_without_antialiasing() -> None:
    image = noise(32, 32)
    resized = train_image(
        encode(image, "PNG"), np.random.default_rng(0), image_size=8, **PLAIN
    ).astype(float)
    # Bilinear interpolation at a quarter of the size reads the middle four of sixteen pixels.
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
def test_eval_image_takes_the_center_crop(
    shape: tuple[int, int], image_size: int, eval_crop: str
) -> None:
    result = evaluate(coordinates(*shape), image_size, eval_crop)
    assert result.shape == (image_size, image_size, 3)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    # Pixels of the image per pixel of the result; the crop is 224 of 256.
    per_pixel = {
        "shorter_side": [min(shape) / image_size * 224 / 256] * 2,
        "square": [length / image_size * 224 / 256 for length in shape],
        "resize": [length / image_size for length in shape],
    }[eval_crop]
    from_center = np.arange(image_size) - (image_size - 1) / 2
    for channel, length in enumerate(shape):
        position = (length - 1) / 2 + from_center * per_pixel[channel]
        position = np.clip(position, 0, length - 1)
        level = 255 / (length - 1)
        found = result[..., channel] if channel else result[..., channel].T
        # Within one pixel of the image or the result, plus rounding of the level.
        tolerance = max(per_pixel[channel], 1) * level + 1
        np.testing.assert_allclose(
            found, np.tile(position * level, (image_size, 1)), atol=tolerance
        )


@pytest.mark.parametrize("eval_crop", ["shorter_side", "square"])
@pytest.mark.parametrize(("image_size", "size"), [(224, 256), (448, 512), (7, 8)])
def test_eval_image_of_the_size_before_crop_is_only_cropped(
    image_size: int, size: int, eval_crop: str
) -> None:
    image, margin = noise(size, size), (size - image_size) // 2
    expected = image[margin : margin + image_size, margin : margin + image_size]
    np.testing.assert_array_equal(evaluate(image, image_size, eval_crop), expected)


def test_train_and_eval_images_apply_exif_orientation() -> None:
    upright, encoded = (encode_with_orientation(smooth(16, 32), k) for k in (1, 3))
    rng = np.random.default_rng
    train: dict[str, Any] = PLAIN | {"image_size": 8, "exif_orientation": True}
    evaluate: dict[str, Any] = {
        "image_size": (8, 8),
        "eval_crop": "resize",
        "exif_orientation": True,
    }
    for result, expected in [
        (train_image(e, rng(0), **train) for e in (encoded, upright)),
        (eval_image(e, **evaluate) for e in (encoded, upright)),
    ]:
        np.testing.assert_array_equal(result, expected[::-1, ::-1])
