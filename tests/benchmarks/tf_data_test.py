"""Tests that the tf.data baseline does the same work as mixer_jax's pipeline."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_sample_images

from mixer_jax.benchmarks import tf_data
from mixer_jax.benchmarks.pipelines import sample_jpegs
from mixer_jax.data import randaugment
from mixer_jax.data.decode import decode
from mixer_jax.data.preprocess import resize

# Wrong operations show on photographs; AutoContrast shows on a range that is not full.
CHINA, FLOWER = (
    (20 + 0.8 * cv2.resize(photo, (224, 224), interpolation=cv2.INTER_AREA)).astype(np.uint8)
    for photo in load_sample_images().images
)
IMAGES = {"china": CHINA, "flower": FLOWER, "constant": np.full_like(CHINA, (17, 128, 250))}
FACTORS: list[tuple[float, ...]] = [(0.1,), (0.55,), (1.0,), (2.8,)]
ARGUMENTS: dict[str, list[tuple[float, ...]]] = {
    "auto_contrast": [()],
    "equalize": [()],
    "invert": [()],
    "posterize": [(1,), (3,), (6,), (8,)],
    "solarize": [(0,), (76,), (128,), (384,)],
    "solarize_add": [(33,), (165,), (300,)],
    "color": FACTORS,
    "contrast": FACTORS,
    "brightness": FACTORS,
    "sharpness": FACTORS,
}
AFFINE_ARGUMENTS: dict[str, list[tuple[float, ...]]] = {
    "rotate": [(17.3,), (45.0,), (-45.0,)],
    "shear_x": [(0.45,), (-0.3,)],
    "shear_y": [(0.45,), (-0.3,)],
    "translate_x": [(30.3,), (-150.0,)],
    "translate_y": [(30.3,), (-150.0,)],
}


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest) -> np.ndarray:
    return IMAGES[request.param]


def difference_of(name: str, image: np.ndarray, arguments: tuple[float, ...]) -> np.ndarray:
    """Returns the absolute difference between TensorFlow's result and mixer_jax's."""
    theirs = getattr(tf_data, name)(tf.constant(image), *arguments).numpy()
    ours = getattr(randaugment, name)(image, *arguments)
    assert theirs.dtype == ours.dtype == np.uint8
    assert theirs.shape == ours.shape
    return np.abs(theirs.astype(int) - ours)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_operations_agree(image: np.ndarray, name: str) -> None:
    for arguments in ARGUMENTS[name]:
        difference = difference_of(name, image, arguments)
        assert difference.max() <= 1, arguments
        assert difference.mean() < 0.5, arguments


@pytest.mark.parametrize("name", AFFINE_ARGUMENTS)
def test_affine_operations_agree(image: np.ndarray, name: str) -> None:
    # Where the nearest pixel depends on the last bit, either may be chosen.
    for arguments in AFFINE_ARGUMENTS[name]:
        assert difference_of(name, image, arguments).any(axis=-1).mean() < 0.005, arguments


@pytest.mark.parametrize(("row", "column"), [(112, 100), (5, 200), (223, 0)])
def test_cutout_agrees(row: int, column: int) -> None:
    theirs = tf_data.cutout(tf.constant(CHINA), tf.constant(row), tf.constant(column), 60)
    np.testing.assert_array_equal(theirs, randaugment.cutout(CHINA, np.array([row, column]), 60))


def test_operations_have_the_same_strength() -> None:
    assert list(tf_data.OPERATIONS) == list(randaugment.OPERATIONS)
    for name, operation in tf_data.OPERATIONS.items():
        theirs = operation(tf.constant(CHINA), 1.5).numpy().astype(int)
        # With every position or sign that can be sampled; Cutout is compared by its area.
        ours = [
            randaugment.OPERATIONS[name](CHINA, 1.5, np.random.default_rng(seed)).astype(int)
            for seed in range(6)
        ]
        if name == "Cutout":
            assert 60 * 60 <= (theirs != CHINA).any(axis=-1).sum() <= 120 * 120
        else:
            assert min(np.abs(theirs - image).mean() for image in ours) < 0.5, name


def test_rand_augment_samples_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    def adder(number: int) -> Callable[[tf.Tensor, float], tf.Tensor]:
        return lambda image, strength: image + np.uint8(number * strength)

    added = {name: adder(number) for number, name in enumerate(randaugment.OPERATIONS)}
    monkeypatch.setattr(tf_data, "OPERATIONS", added)
    draw = tf.function(lambda image: tf_data.rand_augment(image, 2, 10.0))
    sums = [int(draw(tf.zeros((1, 1, 3), tf.uint8))[0, 0, 0]) for _ in range(300)]
    # Sums of two numbers from 0 to 15 have a mean of 15, here with a std of 6.5 / sqrt(300).
    assert 13 < np.mean(sums) < 17
    assert min(sums) < 5
    assert max(sums) > 25


@pytest.mark.parametrize("box", [(0, 0, 375, 500), (31, 57, 100, 133), (200, 300, 175, 131)])
def test_crop_and_resize_agree(box: tuple[int, int, int, int]) -> None:
    file = sample_jpegs(1)[0]
    ours = decode(file, lambda height, width: box)
    whole = tf_data.crop(tf.constant(file), tf.constant(box), decode_full_image=True)
    part = tf_data.crop(tf.constant(file), tf.constant(box), decode_full_image=False)
    np.testing.assert_array_equal(whole, ours)
    # Without pixels outside of the crop, colors at its edges are interpolated differently.
    np.testing.assert_array_equal(part[2:-2, 2:-2], ours[2:-2, 2:-2])
    theirs = tf.cast(tf_data.resize(whole, 224), tf.uint8).numpy().astype(int)
    assert np.abs(theirs - resize(ours, 224, 224)).max() <= 1


def test_random_sign_has_both_values() -> None:
    draw = tf.function(tf_data._random_sign)
    assert {float(draw()) for _ in range(100)} == {-1.0, 1.0}


@pytest.fixture
def add_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces every operation by the addition of four times its strength."""
    added = {
        name: lambda image, strength: image + np.uint8(4 * strength)
        for name in randaugment.OPERATIONS
    }
    monkeypatch.setattr(tf_data, "OPERATIONS", added)


@pytest.mark.parametrize(("decode_full_image", "num_threads"), [(True, 1), (False, 3)])
def test_train_batches(decode_full_image: bool, num_threads: int) -> None:
    batches = tf_data.train_batches(
        sample_jpegs(2),
        num_batches=2,
        batch_size=3,
        image_size=32,
        min_area=0.05,
        decode_full_image=decode_full_image,
        randaugment_layers=0,
        randaugment_magnitude=0.0,
        num_threads=num_threads,
    )
    assert batches.options().threading.private_threadpool_size == num_threads
    images = np.concatenate([batch.numpy() for batch in batches])
    assert images.shape == (6, 32, 32, 3)
    assert images.dtype == np.uint8
    # Two files, three times each, with six different crops.
    assert len({image.tobytes() for image in images}) == 6
    assert images.std(axis=(1, 2, 3)).min() > 1


@pytest.mark.usefixtures("add_strength")
@pytest.mark.parametrize("decode_full_image", [True, False])
@pytest.mark.parametrize(("layers", "total"), [(0, 0), (1, 6), (2, 12)])
def test_train_batches_are_augmented(decode_full_image: bool, layers: int, total: int) -> None:
    black = cv2.imencode(".jpg", np.zeros((48, 64, 3), np.uint8))[1].tobytes()
    batches = tf_data.train_batches(
        [black],
        num_batches=1,
        batch_size=2,
        image_size=8,
        min_area=0.05,
        decode_full_image=decode_full_image,
        randaugment_layers=layers,
        randaugment_magnitude=15.0,
        num_threads=1,
    )
    (images,) = batches.as_numpy_iterator()
    np.testing.assert_array_equal(images, np.full((2, 8, 8, 3), total, np.uint8), strict=True)


@pytest.mark.usefixtures("add_strength")
@pytest.mark.parametrize("num_threads", [1, 3])
def test_augmented_batches(num_threads: int) -> None:
    batches = tf_data.augmented_batches(
        np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 100)]),
        num_batches=2,
        batch_size=3,
        randaugment_layers=2,
        randaugment_magnitude=15.0,
        num_threads=num_threads,
    )
    assert batches.options().threading.private_threadpool_size == num_threads
    images = np.concatenate(list(batches.as_numpy_iterator()))
    # Two layers add six each; the two images are repeated three times.
    values = np.array([12, 112, 12, 112, 12, 112], np.uint8)
    expected = np.broadcast_to(values[:, None, None, None], (6, 8, 8, 3))
    np.testing.assert_array_equal(images, expected, strict=True)
