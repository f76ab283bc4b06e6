"""Tests of the Classifier and of load_pretrained: logits, probabilities, names, batches, files."""

from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixer_jax
from mixer_jax.checkpoints.weights import PretrainedWeights, replace_head
from mixer_jax.data.decode import BadImageError
from mixer_jax.data.image_files import expand_image_paths
from mixer_jax.data.preprocess import eval_image
from mixer_jax.errors import UserError
from mixer_jax.inference import Classifier, Prediction
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import DIGITS, assert_params_equal, random_weights, save_run

PHOTO_SIZES = [(16, 16), (40, 24), (17, 31), (8, 8), (100, 60)]


@pytest.fixture(scope="module")
def weights() -> PretrainedWeights:
    return random_weights(image_size=(16, 24), eval_crop="shorter_side")


@pytest.fixture(scope="module")
def classifier(weights: PretrainedWeights) -> Classifier:
    return Classifier(weights)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Image files of several sizes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    paths = []
    for index, (height, width) in enumerate(PHOTO_SIZES):
        paths.append(folder / f"{index}.png")
        cv2.imwrite(str(paths[-1]), rng.integers(0, 256, (height, width, 3), np.uint8))
    return paths


def reference_probabilities(
    weights: PretrainedWeights, path: Path, loss: str = "softmax"
) -> np.ndarray:
    """Computes the probabilities of all classes of one image with the model alone."""
    info = weights.model_info
    pixels = eval_image(path.read_bytes(), image_size=info.image_size, eval_crop=info.eval_crop)
    images = jnp.asarray(pixels[None], jnp.float32) / 127.5 - 1.0
    logits = np.asarray(info.build_model().apply({"params": weights.params}, images))[0]
    if loss == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    odds = np.exp(logits - logits.max())
    return odds / odds.sum()


def class_indices(predictions: list[Prediction]) -> list[list[int]]:
    return [[entry.class_index for entry in prediction.classes] for prediction in predictions]


def test_call_gives_the_logits_of_the_model(
    weights: PretrainedWeights, classifier: Classifier
) -> None:
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 16, 24, 3)), jnp.float32)
    logits = classifier(images)
    assert logits.dtype == jnp.float32
    expected = classifier.model.apply({"params": weights.params}, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(classifier(np.asarray(images)), logits)


@pytest.mark.parametrize(
    ("images", "parts"),
    [
        (np.zeros((16, 24, 3), np.float32), ["(16, 24, 3)", "images[None]"]),
        (np.zeros((1, 16, 24, 1), np.float32), ["(1, 16, 24, 1)", "(n, height, width, 3)"]),
        (np.zeros((1, 16, 24, 3), np.uint8), ["uint8", "images / 127.5 - 1"]),
        (np.zeros((1, 32, 32, 3), np.float32), ["32", "16", "24", "image_size", "(32, 32)"]),
        (np.zeros((1, 17, 24, 3), np.float32), ["image_size", "17", "patch_size", "4"]),
    ],
)
def test_call_rejects_other_shapes_and_dtypes(
    classifier: Classifier, images: np.ndarray, parts: list[str]
) -> None:
    with raises(UserError, *parts):
        classifier(images)


def test_predict_rejects_a_single_image_and_a_negative_topk(
    classifier: Classifier, photos: list[Path]
) -> None:
    with raises(UserError, "images", "[image]"):
        classifier.predict(str(photos[0]))
    with raises(UserError, "topk", "-1"):
        classifier.predict(photos, topk=-1)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_predict_gives_names_and_probabilities(loss: str, photos: list[Path]) -> None:
    weights = random_weights(image_size=(16, 24), eval_crop="shorter_side", loss=loss)
    predictions = Classifier(weights).predict(photos, topk=10, batch_size=2)
    assert [prediction.image for prediction in predictions] == [str(path) for path in photos]
    for path, prediction in zip(photos, predictions, strict=True):
        expected = reference_probabilities(weights, path, loss)
        order = np.argsort(-expected, kind="stable")
        assert class_indices([prediction]) == [order.tolist()]
        assert [entry.name for entry in prediction.classes] == [DIGITS[index] for index in order]
        probabilities = [entry.probability for entry in prediction.classes]
        np.testing.assert_allclose(probabilities, expected[order], rtol=1e-4)
    total = sum(entry.probability for entry in predictions[0].classes)
    assert (abs(total - 1) < 1e-5) == (loss == "softmax")


def test_predict_does_not_depend_on_the_batch_size(
    classifier: Classifier, photos: list[Path]
) -> None:
    expected = class_indices(classifier.predict(photos, batch_size=1))
    for batch_size in (2, 3, 64):
        assert class_indices(classifier.predict(photos, batch_size=batch_size)) == expected


def test_predict_takes_bytes_and_paths(classifier: Classifier, photos: list[Path]) -> None:
    (from_path,) = classifier.predict([photos[0]])
    (from_bytes,) = classifier.predict([photos[0].read_bytes()])
    assert from_path.classes == from_bytes.classes
    assert from_bytes.image == "image 0"
    assert classifier.predict([]) == []


def test_predict_keeps_the_order_of_many_images(
    weights: PretrainedWeights, classifier: Classifier, photos: list[Path]
) -> None:
    predictions = classifier.predict(photos * 5, topk=1, batch_size=16)
    expected = [[int(reference_probabilities(weights, path).argmax())] for path in photos] * 5
    assert class_indices(predictions) == expected


def test_iter_predictions_reports_bad_images_and_continues(
    classifier: Classifier, photos: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nonsense")
    missing = tmp_path / "missing.png"
    missing.symlink_to(tmp_path / "nowhere")
    names = [str(photos[0]), str(bad), str(missing), str(photos[1])]
    images = expand_image_paths(names)
    predictions = list(classifier.iter_predictions(images, topk=1, batch_size=2))
    assert [prediction.image for prediction in predictions] == names
    errors = [prediction.error for prediction in predictions]
    assert [bool(error) for error in errors] == [False, True, True, False]
    assert errors[1] != errors[2]
    assert [len(prediction.classes) for prediction in predictions] == [1, 0, 0, 1]
    with raises(BadImageError, str(bad), errors[1]):
        classifier.predict([bad])


def test_classes_without_names_are_named_by_index(
    photos: list[Path], weights: PretrainedWeights
) -> None:
    nameless = weights._replace(model_info=replace_head(weights, 10).model_info)
    (prediction,) = Classifier(nameless).predict(photos[:1], topk=3)
    assert all(entry.name == str(entry.class_index) for entry in prediction.classes)


def test_without_a_head_there_are_features_and_no_classes(weights: PretrainedWeights) -> None:
    classifier = Classifier(replace_head(weights, 0))
    assert classifier(jnp.zeros((2, 16, 24, 3))).shape == (2, 16)
    with raises(UserError, "head"):
        classifier.predict([b""])


@pytest.mark.parametrize(
    ("arguments", "num_outputs"),
    [
        ({}, 10),
        ({"num_classes": 10}, 10),
        ({"num_classes": 37}, 37),
        ({"num_classes": 0}, 16),
        ({"num_classes": 2, "class_names": ["cat", "dog"]}, 2),
    ],
)
def test_load_pretrained_replaces_the_head(
    weights: PretrainedWeights, tmp_path: Path, arguments: dict[str, Any], num_outputs: int
) -> None:
    run = save_run(weights, tmp_path)
    classifier = mixer_jax.load_pretrained(run, **arguments)
    logits = classifier(jnp.ones((1, 16, 24, 3)))
    assert logits.shape == (1, num_outputs)
    # A new head is zero. The old one is kept for the same number of classes.
    assert bool(logits.any()) == (num_outputs in (10, 16))
    names = {2: ("cat", "dog"), 10: DIGITS}.get(num_outputs, ())
    assert classifier.model_info.class_names == names


def test_load_pretrained_resizes_and_renames(weights: PretrainedWeights, tmp_path: Path) -> None:
    run = save_run(weights, tmp_path)
    names = [name * 2 for name in DIGITS]
    classifier = mixer_jax.load_pretrained(run, image_size=(32, 48), class_names=names)
    assert mentions(classifier.model_info.resize_note, "16", "24", "Appendix C")
    assert classifier(jnp.zeros((1, 32, 48, 3))).shape == (1, 10)
    assert classifier.model_info.class_names == tuple(names)
    with raises(UserError, run) as caught:
        mixer_jax.load_pretrained(run, class_names=["cat"])
    # The path can contain numbers.
    assert mentions(str(caught.value).replace(run, ""), "10", "1")


def test_load_pretrained_sets_the_dtype(weights: PretrainedWeights, tmp_path: Path) -> None:
    run = save_run(weights, tmp_path)
    assert mixer_jax.load_pretrained(run).model.execution.dtype == "float32"
    assert mixer_jax.load_pretrained(run, dtype="bfloat16").model.execution.dtype == "bfloat16"


@pytest.mark.parametrize("num_images", [1, 8, 11, 16])
def test_call_uses_all_devices(
    weights: PretrainedWeights, classifier: Classifier, num_images: int
) -> None:
    assert jax.device_count() == 8
    leaf = jax.tree.leaves(classifier.params)[0]
    assert len(leaf.sharding.device_set) == 8
    assert_params_equal(classifier.params, weights.params)
    images = np.random.default_rng(1).uniform(-1, 1, (num_images, 16, 24, 3)).astype(np.float32)
    # Images on one device are sent to all of them.
    logits = classifier(jax.device_put(images, jax.devices()[3]))
    expected = classifier.model.apply({"params": weights.params}, jnp.asarray(images))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
