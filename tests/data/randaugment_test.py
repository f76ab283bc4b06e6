"""Tests of RandAugment: operations are bit-identical to Pillow's; how they are sampled."""

from collections import Counter
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from mixer_jax.data import randaugment
from tests.helpers.messages import raises

GRAY = (128, 128, 128)


def sample_images() -> dict[str, np.ndarray]:
    china, flower = (
        cv2.resize(photograph, (224, 224), interpolation=cv2.INTER_AREA)
        for photograph in load_sample_images().images
    )
    rng = np.random.default_rng(0)
    return {
        "china": china,
        "flower": flower,
        "constant": np.full((224, 224, 3), (17, 128, 250), np.uint8),
        "noise": rng.integers(256, size=(224, 224, 3), dtype=np.uint8),
        "not square": china[60:157, 20:151],
        # A flip by slicing has negative strides.
        "flipped": flower[:, ::-1],
        # With so few pixels, the equalization table exceeds 255.
        "small": rng.integers(256, size=(19, 23, 3), dtype=np.uint8),
        "one pixel": np.array([[[3, 200, 90]]], np.uint8),
    }


IMAGES = sample_images()


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest) -> np.ndarray:
    return IMAGES[request.param]


def to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image))


def apply(name: str, image: np.ndarray, magnitude: float, seed: int = 0) -> np.ndarray:
    strength = magnitude / 10
    return randaugment.OPERATIONS[name](image, strength, np.random.default_rng(seed))


def test_auto_contrast_matches_pillow(image: np.ndarray) -> None:
    expected = ImageOps.autocontrast(to_pillow(image))
    np.testing.assert_array_equal(randaugment.auto_contrast(image), expected)


def test_auto_contrast_matches_pillow_for_any_range() -> None:
    for low in range(0, 255, 7):
        for high in range(low + 1, 256, 11):
            ramp = np.arange(low, high + 1, dtype=np.uint8)[:, None]
            image = np.stack([ramp, ramp[::-1], np.full_like(ramp, low)], axis=-1)
            expected = ImageOps.autocontrast(to_pillow(image))
            np.testing.assert_array_equal(randaugment.auto_contrast(image), expected)


def test_equalize_matches_pillow(image: np.ndarray) -> None:
    expected = ImageOps.equalize(to_pillow(image))
    np.testing.assert_array_equal(randaugment.equalize(image), expected)


def test_invert_matches_pillow(image: np.ndarray) -> None:
    np.testing.assert_array_equal(randaugment.invert(image), ImageOps.invert(to_pillow(image)))


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterize_matches_pillow(image: np.ndarray, bits: int) -> None:
    expected = ImageOps.posterize(to_pillow(image), bits)
    np.testing.assert_array_equal(randaugment.posterize(image, bits), expected)


@pytest.mark.parametrize("threshold", [0, 1, 25, 128, 255, 256, 512])
def test_solarize_matches_pillow(image: np.ndarray, threshold: int) -> None:
    expected = ImageOps.solarize(to_pillow(image), threshold)
    np.testing.assert_array_equal(randaugment.solarize(image, threshold), expected)


def test_solarize_add_brightens_values_below_128() -> None:
    image = np.array([[[0, 20, 127], [128, 200, 255]]], np.uint8)
    expected = [[[110, 130, 237], [128, 200, 255]]]
    np.testing.assert_array_equal(randaugment.solarize_add(image, 110), expected)
    expected = [[[220, 240, 255], [128, 200, 255]]]
    np.testing.assert_array_equal(randaugment.solarize_add(image, 220), expected)


@pytest.mark.parametrize(
    ("operation", "enhancer"),
    [
        (randaugment.color, ImageEnhance.Color),
        (randaugment.contrast, ImageEnhance.Contrast),
        (randaugment.brightness, ImageEnhance.Brightness),
        (randaugment.sharpness, ImageEnhance.Sharpness),
    ],
    ids=["color", "contrast", "brightness", "sharpness"],
)
def test_enhancements_match_pillow(
    image: np.ndarray, operation: Callable, enhancer: Callable
) -> None:
    # The last factor is a binary fraction: 3.7 (magnitude 20) would differ by one level if Pillow
    # was compiled with fused multiply-add, as on arm64.
    for factor in (0, 0.1, 0.55, 1, 1.9, 2.8, 3.75):
        expected = enhancer(to_pillow(image)).enhance(factor)
        np.testing.assert_array_equal(operation(image, factor), expected, f"factor {factor}")


@pytest.mark.parametrize("degrees", [0, 3, -3, 17.3, 30, -30, 45, -60])
def test_rotate(image: np.ndarray, degrees: float) -> None:
    expected = to_pillow(image).rotate(degrees, Image.Resampling.NEAREST, fillcolor=GRAY)
    np.testing.assert_array_equal(randaugment.rotate(image, degrees), expected)


def test_rotate_matches_pillow_for_large_images() -> None:
    # So wide that its fixed-point coordinates do not fit in 32 bits.
    image = np.random.default_rng(0).integers(256, size=(3, 32000, 3), dtype=np.uint8)
    for degrees in (-60, 0.01, 180):
        expected = to_pillow(image).rotate(degrees, Image.Resampling.NEAREST, fillcolor=GRAY)
        np.testing.assert_array_equal(randaugment.rotate(image, degrees), expected)


def affine_by_pillow(image: np.ndarray, coefficients: tuple[float, ...]) -> Image.Image:
    picture = to_pillow(image)
    return picture.transform(
        picture.size,
        Image.Transform.AFFINE,
        coefficients,
        Image.Resampling.NEAREST,
        fillcolor=GRAY,
    )


@pytest.mark.parametrize("slope", [0, 0.03, 0.1234, -0.3, 0.3, -0.45, 0.6, 2, -3])
def test_shear_matches_pillow(image: np.ndarray, slope: float) -> None:
    expected = affine_by_pillow(image, (1, slope, 0, 0, 1, 0))
    np.testing.assert_array_equal(randaugment.shear_x(image, slope), expected)
    expected = affine_by_pillow(image, (1, 0, 0, slope, 1, 0))
    np.testing.assert_array_equal(randaugment.shear_y(image, slope), expected)


@pytest.mark.parametrize("pixels", [0, 1, -10, 12.5, 30.3, -100, 150, 200])
def test_translate_matches_pillow(image: np.ndarray, pixels: float) -> None:
    expected = affine_by_pillow(image, (1, 0, pixels, 0, 1, 0))
    np.testing.assert_array_equal(randaugment.translate_x(image, pixels), expected)
    expected = affine_by_pillow(image, (1, 0, 0, 0, 1, pixels))
    np.testing.assert_array_equal(randaugment.translate_y(image, pixels), expected)


@pytest.mark.parametrize(
    ("center", "half_size", "rows", "columns"),
    [
        ((112, 100), 40, slice(72, 152), slice(60, 140)),
        ((0, 0), 40, slice(0, 40), slice(0, 40)),
        ((223, 10), 60, slice(163, 224), slice(0, 70)),
        ((5, 223), 1, slice(4, 6), slice(222, 224)),
        ((112, 112), 0, slice(0), slice(0)),
    ],
)
def test_cutout_fills_a_square_clipped_to_the_image(
    center: tuple[int, int], half_size: int, rows: slice, columns: slice
) -> None:
    image = IMAGES["noise"]
    expected = image.copy()
    expected[rows, columns] = 128
    np.testing.assert_array_equal(randaugment.cutout(image, np.array(center), half_size), expected)


@pytest.mark.parametrize(
    ("name", "operation", "arguments"),
    [
        ("Posterize", randaugment.posterize, {0: 1, 2: 1, 5: 2, 9: 3, 10: 4, 15: 6, 20: 8, 30: 8}),
        ("Solarize", randaugment.solarize, {0: 0, 3: 76, 5: 128, 10: 256, 15: 384, 20: 512}),
        ("SolarizeAdd", randaugment.solarize_add, {0: 0, 3: 33, 10: 110, 15: 165, 20: 220}),
        ("Color", randaugment.color, {0: 0.1, 5: 1, 10: 1.9, 15: 2.8}),
        ("Contrast", randaugment.contrast, {0: 0.1, 5: 1, 10: 1.9, 15: 2.8}),
        ("Brightness", randaugment.brightness, {0: 0.1, 5: 1, 10: 1.9, 15: 2.8}),
        ("Sharpness", randaugment.sharpness, {0: 0.1, 5: 1, 10: 1.9, 15: 2.8}),
    ],
)
def test_operations_scale_their_argument_with_the_magnitude(
    name: str, operation: Callable, arguments: dict[float, float]
) -> None:
    image = IMAGES["noise"]
    for magnitude, argument in arguments.items():
        np.testing.assert_array_equal(apply(name, image, magnitude), operation(image, argument))


@pytest.mark.parametrize(
    ("name", "operation", "full"),
    [
        ("Rotate", randaugment.rotate, 30),
        ("ShearX", randaugment.shear_x, 0.3),
        ("ShearY", randaugment.shear_y, 0.3),
        ("TranslateX", randaugment.translate_x, 100),
        ("TranslateY", randaugment.translate_y, 100),
    ],
)
@pytest.mark.parametrize("magnitude", [10, 15])
def test_signed_operations_use_each_sign_half_of_the_time(
    name: str, operation: Callable, full: float, magnitude: float
) -> None:
    image = IMAGES["china"]
    argument = full * magnitude / 10
    results = {sign: operation(image, sign * argument).tobytes() for sign in (1, -1)}
    assert results[1] != results[-1]
    drawn = Counter(apply(name, image, magnitude, seed).tobytes() for seed in range(60))
    assert drawn.keys() == set(results.values())
    assert min(drawn.values()) >= 18


@pytest.mark.parametrize(("magnitude", "size"), [(0, 0), (1, 8), (10, 80), (15, 120), (20, 160)])
def test_cutout_positions_cover_the_image(magnitude: float, size: int) -> None:
    image = np.zeros((240, 200, 3), np.uint8)
    covered = np.zeros((240, 200), bool)
    largest = 0
    for seed in range(300):
        result = apply("Cutout", image, magnitude, seed)
        painted = result[..., 0] == 128
        assert (result == np.where(painted, 128, 0)[..., None]).all()
        height, width = painted.any(1).sum(), painted.any(0).sum()
        assert painted.sum() == height * width
        assert max(height, width) <= size
        largest = max(largest, min(height, width))
        covered |= painted
    assert largest == size
    if size >= 80:
        assert covered.all()


@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_operations_return_a_new_image_at_any_magnitude(image: np.ndarray, name: str) -> None:
    before = image.copy()
    for magnitude in (0, 0.5, 10, 15, 20, 25):
        result = apply(name, image, magnitude)
        assert result.shape == image.shape
        assert result.dtype == np.uint8
        assert not np.shares_memory(result, image)
    np.testing.assert_array_equal(image, before)


def rand_augment(
    image: np.ndarray, seed: int, num_layers: int = 2, magnitude: float = 15
) -> np.ndarray:
    return randaugment.rand_augment(
        image, np.random.default_rng(seed), num_layers=num_layers, magnitude=magnitude
    )


def test_rand_augment_is_deterministic(image: np.ndarray) -> None:
    before = image.copy()
    for seed in range(20):
        np.testing.assert_array_equal(rand_augment(image, seed), rand_augment(image, seed))
    np.testing.assert_array_equal(image, before)


def test_rand_augment_differs_between_seeds() -> None:
    results = {rand_augment(IMAGES["china"], seed).tobytes() for seed in range(50)}
    assert len(results) > 40


def test_rand_augment_without_layers_returns_the_image(image: np.ndarray) -> None:
    np.testing.assert_array_equal(rand_augment(image, 0, num_layers=0), image)


def test_rand_augment_samples_operations_uniformly(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def recorder(name: str) -> Callable:
        def record(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
            drawn.append(name)
            assert strength == 1.5
            return image + 1

        return record

    names = list(randaugment.OPERATIONS)
    assert len(names) == 16
    monkeypatch.setattr(randaugment, "OPERATIONS", {name: recorder(name) for name in names})
    image = np.zeros((2, 2, 3), np.uint8)
    for seed in range(80):
        # The value reaches 20 only if each operation is applied to the previous result.
        assert (rand_augment(image, seed, num_layers=20) == 20).all()
    counts = Counter(drawn)
    assert counts.keys() == set(names)
    # 100 of each are expected, with a standard deviation of 10.
    assert min(counts.values()) > 60
    assert max(counts.values()) < 140


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        (np.zeros((8, 8, 3), np.float32), ("float32", "(8, 8, 3)", "uint8", "RGB")),
        (np.zeros((8, 8), np.uint8), ("uint8", "(8, 8)")),
        (np.zeros((8, 8, 4), np.uint8), ("uint8", "(8, 8, 4)")),
        (np.zeros((2, 8, 8, 3), np.uint8), ("uint8", "(2, 8, 8, 3)")),
    ],
)
def test_rand_augment_rejects_other_arrays(image: np.ndarray, parts: tuple[str, ...]) -> None:
    with raises(ValueError, *parts):
        rand_augment(image, 0)


@pytest.mark.parametrize(("num_layers", "magnitude"), [(-1, 10), (2, -1)])
def test_rand_augment_rejects_negative_numbers(num_layers: int, magnitude: float) -> None:
    with raises(ValueError, "num_layers", str(num_layers), "magnitude", str(magnitude)):
        rand_augment(IMAGES["small"], 0, num_layers, magnitude)
