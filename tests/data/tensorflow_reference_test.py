"""Comparison of preprocessing with TensorFlow, which the paper's authors used.

Decoded pixels are identical. Resized pixels are truncated, as the authors do; some of them differ,
by one level, because OpenCV's and TensorFlow's sums round differently. Boxes of the Inception crop
come from the same distribution.
"""

import io
import itertools
import os
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from mixer_jax.data.decode import decode
from mixer_jax.data.preprocess import eval_image, sample_inception_crop, train_image

# The most frequent size in ImageNet, landscape and portrait.
SHAPES = [(375, 500), (500, 375)]
# Enlarged along one or both axes for a crop of 224 or 448.
SMALL_SHAPES = [(200, 250), (100, 130), (20, 30), (200, 427), (400, 200), (255, 400)]
# Pixel edges before and after enlarging to 256 or 512 coincide, so that a rounding error would
# select a neighboring pixel.
ALIGNED_SHAPES = [(210, 246), (372, 486), (420, 396)]
ENCODINGS = ["JPEG 4:2:0", "JPEG 4:4:4", "PNG"]


@pytest.fixture(scope="module")
def tf() -> ModuleType:
    """TensorFlow without accelerators, which other processes may be using."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow

    tensorflow.config.set_visible_devices([], "GPU")
    return tensorflow


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """A bright and a dark photograph of 427 × 640 pixels."""
    return list(load_sample_images().images)


def encode(image: np.ndarray, encoding: str) -> bytes:
    file = io.BytesIO()
    if encoding == "PNG":
        Image.fromarray(image).save(file, "PNG")
    else:
        subsampling = encoding.removeprefix("JPEG ")
        Image.fromarray(image).save(file, "JPEG", quality=90, subsampling=subsampling)
    return file.getvalue()


def encoded_crops(
    photographs: list[np.ndarray], shape: tuple[int, int], encoding: str
) -> list[bytes]:
    """Encodes the center crop of each photograph, transposed for portrait shapes."""
    files = []
    for image in photographs:
        if shape[0] > image.shape[0]:
            image = image.swapaxes(0, 1)
        top, left = ((length - crop) // 2 for length, crop in zip(image.shape, shape, strict=False))
        crop = image[top : top + shape[0], left : left + shape[1]]
        assert crop.shape[:2] == shape
        files.append(encode(np.ascontiguousarray(crop), encoding))
    return files


def reference_decode(tf: ModuleType, encoded: bytes) -> np.ndarray:
    if encoded.startswith(b"\x89PNG"):
        return tf.io.decode_png(encoded, channels=3).numpy()
    return tf.io.decode_jpeg(encoded, channels=3).numpy()


def reference_resize(
    tf: ModuleType, image: np.ndarray, height: int, width: int, method: str
) -> np.ndarray:
    return tf.image.resize(image, (height, width), method=method, antialias=False).numpy()


def assert_same_levels(actual: np.ndarray, expected: np.ndarray) -> None:
    """Compares uint8 with the truncated levels of the floating-point reference.

    Rounding instead of truncating would be half a level brighter on average. Levels that should be
    exact integers may be one lower in TensorFlow, whose sums then end just below the integer.
    """
    assert actual.shape == expected.shape
    difference = actual.astype(np.float64) - np.trunc(expected)
    assert np.abs(difference).max() <= 1
    inexact = np.abs(expected - np.rint(expected)) > 0.01
    assert abs(difference[inexact].mean()) <= 0.02


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("shape", [*SHAPES, (101, 67)])
def test_decode_matches_tensorflow(
    tf: ModuleType, photographs: list[np.ndarray], shape: tuple[int, int], encoding: str
) -> None:
    for encoded in encoded_crops(photographs, shape, encoding):
        np.testing.assert_array_equal(decode(encoded), reference_decode(tf, encoded))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_decoded_crop_matches_tensorflow(
    tf: ModuleType, photographs: list[np.ndarray], encoding: str
) -> None:
    rng = np.random.default_rng(0)
    for encoded in encoded_crops(photographs, (375, 500), encoding):
        image = reference_decode(tf, encoded)
        for _ in range(20):
            box = sample_inception_crop(375, 500, rng, 0.05)
            top, left, height, width = box
            crop = decode(encoded, lambda *_, box=box: box)
            expected = image[top : top + height, left : left + width]
            np.testing.assert_array_equal(crop, expected)


@pytest.mark.parametrize("image_size", [32, 224, 448])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_train_image_matches_tensorflow(
    tf: ModuleType, photographs: list[np.ndarray], encoding: str, image_size: int
) -> None:
    for seed, shape in enumerate([*SHAPES, (100, 130)] * 2):
        for encoded in encoded_crops(photographs, shape, encoding):
            image = train_image(
                encoded,
                np.random.default_rng(seed),
                image_size=image_size,
                train_crop="inception",
                min_area=0.05,
                max_shift=0,
                flip=False,
                randaugment_layers=0,
                randaugment_magnitude=0.0,
            )
            top, left, height, width = sample_inception_crop(
                *shape, np.random.default_rng(seed), 0.05
            )
            crop = reference_decode(tf, encoded)[top : top + height, left : left + width]
            expected = reference_resize(tf, crop, image_size, image_size, "bilinear")
            assert_same_levels(image, expected)


def reference_eval_image(
    tf: ModuleType, encoded: bytes, image_size: tuple[int, int], eval_crop: str
) -> np.ndarray:
    """Applies the authors' resize_small(256) or resize(256), then central_crop(224)."""
    image = reference_decode(tf, encoded)
    height, width = target = [length * 256 // 224 for length in image_size]
    if eval_crop == "shorter_side":
        # In float32 as in their code, which supports only square images.
        pairs = zip(target, image.shape, strict=False)
        ratio = max(np.float32(new) / np.float32(old) for new, old in pairs)
        height, width = (int(np.rint(np.float32(length) * ratio)) for length in image.shape[:2])
    resized = reference_resize(tf, image, height, width, "area")
    top, left = (height - image_size[0]) // 2, (width - image_size[1]) // 2
    return resized[top : top + image_size[0], left : left + image_size[1]]


@pytest.mark.parametrize("eval_crop", ["shorter_side", "square"])
@pytest.mark.parametrize("image_size", [(224, 224), (448, 448), (224, 448)])
@pytest.mark.parametrize(
    ("shape", "encoding"),
    [
        *itertools.product(SHAPES, ENCODINGS),
        *itertools.product([*SMALL_SHAPES, *ALIGNED_SHAPES], ["PNG"]),
    ],
)
def test_eval_image_matches_tensorflow(
    tf: ModuleType,
    photographs: list[np.ndarray],
    shape: tuple[int, int],
    encoding: str,
    image_size: tuple[int, int],
    eval_crop: str,
) -> None:
    for encoded in encoded_crops(photographs, shape, encoding):
        image = eval_image(encoded, image_size=image_size, eval_crop=eval_crop)
        expected = reference_eval_image(tf, encoded, image_size, eval_crop)
        assert_same_levels(image, expected)


def sample_reference_boxes(
    tf: ModuleType, shape: tuple[int, int], min_area: float, num_samples: int
) -> np.ndarray:
    """Samples boxes (top, left, height, width) with the op and the arguments of the authors."""
    tf.random.set_seed(0)

    def sample_box(_: object) -> object:
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            (*shape, 3),
            tf.zeros((0, 0, 4)),
            area_range=(min_area, 1.0),
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        return tf.concat([begin[:2], size[:2]], axis=0)

    boxes = tf.data.Dataset.range(num_samples).map(sample_box).batch(num_samples)
    return next(boxes.as_numpy_iterator())


def max_cdf_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Computes the Kolmogorov-Smirnov distance of two samples."""
    values = np.concatenate([first, second])
    cdfs = (
        np.searchsorted(np.sort(sample), values, side="right") / len(sample)
        for sample in (first, second)
    )
    return float(np.abs(next(cdfs) - next(cdfs)).max())


@pytest.mark.parametrize("min_area", [0.05, 0.5])
@pytest.mark.parametrize(
    "shape", [(375, 500), (500, 375), (224, 224), (13, 17), (30, 300), (120, 150), (9, 500)]
)
def test_inception_crop_has_tensorflows_distribution(
    tf: ModuleType, shape: tuple[int, int], min_area: float
) -> None:
    num_samples = 5000
    expected = sample_reference_boxes(tf, shape, min_area, num_samples)
    rng = np.random.default_rng(0)
    actual = np.array([sample_inception_crop(*shape, rng, min_area) for _ in range(num_samples)])

    statistics = {
        "top": lambda boxes: boxes[:, 0],
        "left": lambda boxes: boxes[:, 1],
        "area": lambda boxes: boxes[:, 2] * boxes[:, 3],
        "aspect ratio": lambda boxes: boxes[:, 3] / boxes[:, 2],
    }
    for name, statistic in statistics.items():
        # Two samples of one distribution are farther apart than this once in 30,000 times.
        assert max_cdf_distance(statistic(actual), statistic(expected)) < 0.046, name
    whole_images = [np.all(boxes[:, 2:] == shape, axis=1).mean() for boxes in (actual, expected)]
    assert abs(whole_images[0] - whole_images[1]) < 0.02
    lowest, highest = actual.min(axis=0), actual.max(axis=0)
    assert np.all(lowest >= 0)
    assert highest[2] <= shape[0]
    assert highest[3] <= shape[1]
