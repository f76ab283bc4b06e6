"""Tests of saliency: brute force, finite differences, and a class planted in one place."""

from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax.data.decode import BadImageError
from mixer_jax.errors import UserError
from mixer_jax.evaluation.saliency import log_odds, resolve_square
from mixer_jax.inference import Classifier, find_class
from mixer_jax.models.bit_config import BitConfig
from mixer_jax.models.mixer_config import MixerConfig
from mixer_jax.models.vit_config import VitConfig
from tests.helpers.messages import raises
from tests.helpers.planted import corner_task, initial_weights, train
from tests.helpers.random_weights import random_weights

CONFIGS = [MixerConfig(2, 4, 16, 8, 24), VitConfig(1, 4, 16, 24, 2), BitConfig("1,1", 8, "3x3")]
NAMES = tuple("abc")
LOSSES = ["softmax", "sigmoid"]


def make_classifier(
    config: Any = CONFIGS[0], size: tuple[int, int] = (12, 16), **fields: Any
) -> Any:
    weights = random_weights(config, size, NAMES, **fields)
    return Classifier(weights, "float32", "WEIGHTS")


def random_pixels(count: int = 1, height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, height, width, 3), np.uint8)


def exact_log_odds(classifier: Classifier, images: np.ndarray, class_index: int) -> np.ndarray:
    """Computes log-odds from probabilities in float64."""
    logits = np.asarray(classifier(images.astype(np.float32)), np.float64)
    if classifier.model_info.loss == "sigmoid":
        p = 1 / (1 + np.exp(-logits))
    else:
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return np.log(p[:, class_index]) - np.log(1 - p[:, class_index])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_occlusion_equals_a_loop_over_pixels_and_squares(config: Any, loss: str) -> None:
    classifier = make_classifier(config, loss=loss)
    (pixels,) = random_pixels()
    (saliency,) = classifier.saliency(pixels, "b", square_size=5, stride=3, batch_size=8)
    image = pixels / 127.5 - 1
    tops, lefts = [0, 3, 6, 7], [0, 3, 6, 9, 11]
    squares = [(top, left) for top in tops for left in lefts]
    occluded = np.repeat(image[None], len(squares) + 1, axis=0)
    for copy, (top, left) in zip(occluded[1:], squares, strict=True):
        copy[top : top + 5, left : left + 5] = image.mean((0, 1))
    scores = exact_log_odds(classifier, occluded, 1)
    for row in range(12):
        for column in range(16):
            covering = [
                scores[0] - score
                for score, (top, left) in zip(scores[1:], squares, strict=True)
                if top <= row < top + 5 and left <= column < left + 5
            ]
            np.testing.assert_allclose(
                saliency.values[row, column], np.mean(covering), rtol=1e-3, atol=1e-4
            )
    assert np.abs(saliency.values).max() > 0.01


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_gradient_equals_finite_differences(config: Any, loss: str) -> None:
    classifier = make_classifier(config, loss=loss)
    (pixels,) = random_pixels()
    (saliency,) = classifier.saliency(pixels, "c", "gradient")
    image, epsilon = pixels / 127.5 - 1, 1e-2
    for row, column in [(0, 0), (5, 9), (11, 15)]:
        shifted = np.repeat(image[None], 6, axis=0)
        for channel in range(3):
            shifted[2 * channel, row, column, channel] += epsilon
            shifted[2 * channel + 1, row, column, channel] -= epsilon
        above, below = exact_log_odds(classifier, shifted, 2).reshape(3, 2).T
        expected = np.abs(above - below).max() / (2 * epsilon)
        np.testing.assert_allclose(saliency.values[row, column], expected, rtol=0.03, atol=2e-3)
    assert saliency.values.max() > 0.01


@pytest.mark.slow
def test_occlusion_finds_the_planted_corner() -> None:
    weights = train(
        initial_weights(MixerConfig(1, 4, 16, 16, 32), 2), corner_task(2_000, 0), num_steps=150
    )
    classifier = Classifier(weights, "float32")
    task = corner_task(100, 1)
    predictions = classifier(task.images / np.float32(127.5) - 1).argmax(1)
    assert (predictions == task.labels).mean() > 0.97
    saliencies = classifier.saliency(task.images, square_size=4, stride=2, batch_size=56)
    peaks = [np.unravel_index(s.values.argmax(), s.values.shape) for s in saliencies]
    inside = np.mean([min(peak) >= 12 for peak in peaks])
    print(f"peak in the planted patch: {inside:.1%} of 100 images")
    assert inside >= 0.95
    # Without training, peaks are anywhere: the patch is a sixteenth of the image.
    untrained = initial_weights(MixerConfig(1, 4, 16, 16, 32), 2)
    kernel = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    untrained.params["head"]["kernel"] = kernel
    others = Classifier(untrained, "float32").saliency(task.images[:30], square_size=4, stride=2)
    peaks = [np.unravel_index(s.values.argmax(), s.values.shape) for s in others]
    assert np.mean([min(peak) >= 12 for peak in peaks]) < 0.6


@pytest.mark.parametrize("method", ["occlusion", "gradient"])
def test_saliency_of_several_images_is_that_of_each(method: Any) -> None:
    classifier = make_classifier()
    images = random_pixels(5)
    together = classifier.saliency(images, method=method)
    predictions = classifier.predict(images, topk=1)
    for pixels, saliency, prediction in zip(images, together, predictions, strict=True):
        (alone,) = classifier.saliency(pixels, method=method)
        np.testing.assert_array_equal(saliency.values, alone.values)
        np.testing.assert_array_equal(saliency.pixels, pixels)
        assert saliency.values.shape == (12, 16)
        assert saliency[2:4] == prediction.classes[0][:2]
        assert saliency.probability == pytest.approx(prediction.classes[0].probability, rel=1e-5)
    assert [saliency.image for saliency in together] == [f"image {i}" for i in range(5)]
    assert classifier.saliency(images[:0], method=method) == []


@pytest.mark.parametrize("batch_size", [1, 7, 1_000])
def test_occlusion_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    classifier, images = make_classifier(), random_pixels()
    (saliency,) = classifier.saliency(images)
    (other,) = classifier.saliency(images, batch_size=batch_size)
    np.testing.assert_allclose(saliency.values, other.values, rtol=1e-3, atol=1e-5)


def test_saliency_crops_images_like_predict() -> None:
    classifier = make_classifier(eval_crop="shorter_side")
    image = random_pixels(1, 50, 90)
    (saliency,) = classifier.saliency(image, method="gradient")
    inputs = classifier.preprocess(image)[0]
    np.testing.assert_allclose(saliency.pixels / 127.5 - 1, inputs, atol=1e-6)


@pytest.mark.parametrize(("target", "index"), [("b", 1), ("2", 2), (0, 0), (np.int64(1), 1)])
def test_classes_are_found_by_name_and_index(target: Any, index: int) -> None:
    assert find_class(make_classifier().model_info, target) == index


def test_classes_are_found_by_words() -> None:
    info = random_weights(class_names=("n01440764", "n02012849", "n03126707")).model_info
    assert find_class(info, "tench") == find_class(info, "n01440764") == 0
    with raises(UserError, "'crane'", "n02012849", "n03126707"):
        find_class(info, "crane")
    with raises(UserError, "'tensh'", "tench"):
        find_class(info, "tensh")


def test_names_that_are_numbers_come_before_indices() -> None:
    info = random_weights(class_names=("7", "8", "1")).model_info
    assert (find_class(info, "1"), find_class(info, 1)) == (2, 1)


@pytest.mark.parametrize(
    ("fields", "target", "parts"),
    [
        ({"class_names": ("tabby", "tiger cat")}, "taby", ("'taby'", "tabby")),
        ({"class_names": ("tabby", "tiger cat")}, 2, ("'2'", "0", "1", "tabby")),
        ({"class_names": ("tabby", "tiger cat")}, "-1", ("'-1'", "0", "1")),
        ({"class_names": (), "num_classes": 3}, "tabby", ("'tabby'", "0", "2")),
    ],
)
def test_unknown_classes_are_refused(fields: Any, target: Any, parts: tuple[str, ...]) -> None:
    with raises(UserError, *parts):
        find_class(random_weights(**fields).model_info, target)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"square_size": 13}, ("square_size", "1", "12", "13")),
        ({"square_size": 0}, ("square_size", "0")),
        ({"square_size": 4, "stride": 5}, ("stride", "4", "5")),
        ({"stride": 0}, ("stride", "0")),
        ({"method": "lime"}, ("method", "occlusion", "gradient", "'lime'")),
        ({"batch_size": 0}, ("batch_size", "0")),
        ({"target": "d"}, ("class", "'d'")),
    ],
)
def test_invalid_arguments_are_refused(arguments: Any, parts: tuple[str, ...]) -> None:
    with raises(UserError, *parts):
        make_classifier().saliency(random_pixels(), **arguments)


def test_unreadable_images_and_models_without_a_head_are_refused() -> None:
    with raises(BadImageError, "image 1"):
        make_classifier().saliency([random_pixels()[0], b"no image"])
    headless = Classifier(random_weights(class_names=(), num_classes=0), source="WEIGHTS")
    with raises(UserError, "WEIGHTS", "head"):
        headless.saliency(random_pixels())


@pytest.mark.parametrize(
    ("square_size", "stride", "size", "resolved"),
    [
        (None, None, (224, 224), (32, 16)),
        (None, None, (4, 9), (1, 1)),
        (3, None, (28, 28), (3, 1)),
        (None, 2, (28, 56), (4, 2)),
    ],
)
def test_square_defaults_to_a_seventh_of_the_shorter_side(
    square_size: Any, stride: Any, size: Any, resolved: tuple[int, int]
) -> None:
    assert resolve_square(square_size, stride, size) == resolved


def test_log_odds_of_a_single_class_are_its_logit() -> None:
    logits = jax.numpy.array([[2.0], [-1.0]])
    np.testing.assert_array_equal(log_odds(logits, np.zeros(2, np.int64), "softmax"), [2.0, -1.0])


def test_log_odds_are_finite_for_confident_predictions() -> None:
    logits = jax.numpy.array([[200.0, 0.0, 0.0]])
    (value,) = log_odds(logits, np.zeros(1, np.int64), "softmax")
    assert value == pytest.approx(200 - np.log(2))
