"""Tests of a model ready to use: logits, probabilities, names, batches, files."""

from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixer_jax
from mixer_jax.checkpoints.load import PretrainedWeights, replace_head
from mixer_jax.checkpoints.to_device import model_from_info
from mixer_jax.data.decode import BadImageError
from mixer_jax.data.image_files import expand_image_paths
from mixer_jax.data.preprocess import eval_image
from mixer_jax.errors import UserError
from mixer_jax.inference import Classifier, Prediction
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import DIGITS, assert_params_equal, random_weights, save_run

SIZES = [(16, 16), (40, 24), (17, 31), (8, 8), (100, 60)]


@pytest.fixture(scope="module")
def weights() -> PretrainedWeights:
    return random_weights(image_size=(16, 24), eval_crop="shorter_side")


@pytest.fixture(scope="module")
def classifier(weights: PretrainedWeights) -> Classifier:
    return Classifier(weights)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of several sizes, in files."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    paths = []
    for number, (height, width) in enumerate(SIZES):
        paths.append(folder / f"{number}.png")
        cv2.imwrite(str(paths[-1]), rng.integers(0, 256, (height, width, 3), np.uint8))
    return paths


def expected(weights: PretrainedWeights, path: Path, loss: str = "softmax") -> np.ndarray:
    """Probabilities of all classes, one image at a time, by the model alone."""
    about = weights.model_info
    pixels = eval_image(path.read_bytes(), image_size=about.image_size, eval_crop=about.eval_crop)
    images = jnp.asarray(pixels[None], jnp.float32) / 127.5 - 1.0
    logits = np.asarray(model_from_info(about).apply({"params": weights.params}, images))[0]
    if loss == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    odds = np.exp(logits - logits.max())
    return odds / odds.sum()


def test_logits_are_the_models(weights: PretrainedWeights, classifier: Classifier) -> None:
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 16, 24, 3)), jnp.float32)
    logits = classifier(images)
    assert logits.dtype == jnp.float32
    reference = classifier.model.apply({"params": weights.params}, images)
    np.testing.assert_allclose(logits, reference, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(classifier(np.asarray(images)), logits)


@pytest.mark.parametrize(
    ("images", "parts"),
    [
        (np.zeros((16, 24, 3), np.float32), ["(16, 24, 3)", "images[None]"]),
        (np.zeros((1, 16, 24, 1), np.float32), ["(1, 16, 24, 1)", "(n, height, width, 3)"]),
        (np.zeros((1, 16, 24, 3), np.uint8), ["uint8", "images / 127.5 - 1"]),
    ],
)
def test_arrays_of_another_kind_are_refused(
    classifier: Classifier, images: np.ndarray, parts: list[str]
) -> None:
    with raises(UserError, *parts):
        classifier(images)


def test_one_image_is_not_a_list(classifier: Classifier, photos: list[Path]) -> None:
    with raises(UserError, "images", "[image]"):
        classifier.predict(str(photos[0]))
    with raises(UserError, "topk", "-1"):
        classifier.predict(photos, topk=-1)


def test_images_of_another_size_are_refused(classifier: Classifier) -> None:
    with raises(UserError, "32", "16", "24", "image_size", "(32, 32)"):
        classifier(jnp.zeros((1, 32, 32, 3)))
    with raises(UserError, "image_size", "17", "patch_size", "4"):
        classifier(jnp.zeros((1, 17, 24, 3)))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_probabilities_and_names(loss: str, photos: list[Path]) -> None:
    weights = random_weights(image_size=(16, 24), eval_crop="shorter_side", loss=loss)
    predictions = Classifier(weights).predict(photos, topk=10, batch_size=2)
    assert [prediction.image for prediction in predictions] == [str(path) for path in photos]
    for path, prediction in zip(photos, predictions, strict=True):
        probabilities = expected(weights, path, loss)
        order = np.argsort(-probabilities, kind="stable")
        assert [one.class_index for one in prediction.classes] == order.tolist()
        assert [one.name for one in prediction.classes] == [DIGITS[label] for label in order]
        ours = [one.probability for one in prediction.classes]
        np.testing.assert_allclose(ours, probabilities[order], rtol=1e-4)
    total = sum(one.probability for one in predictions[0].classes)
    assert (abs(total - 1) < 1e-5) == (loss == "softmax")


def test_the_size_of_batches_changes_nothing(classifier: Classifier, photos: list[Path]) -> None:
    def labels(batch_size: int) -> list[list[int]]:
        predictions = classifier.predict(photos, batch_size=batch_size)
        return [[one.class_index for one in prediction.classes] for prediction in predictions]

    assert labels(1) == labels(2) == labels(3) == labels(64)


def test_bytes_and_paths_are_alike(classifier: Classifier, photos: list[Path]) -> None:
    by_path, by_bytes = (
        classifier.predict([photos[0]]),
        classifier.predict([photos[0].read_bytes()]),
    )
    assert by_path[0].classes == by_bytes[0].classes
    assert by_bytes[0].image == "image 0"
    assert classifier.predict([]) == []


def test_bad_images_say_why_and_the_rest_is_done(
    classifier: Classifier, photos: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nonsense")
    gone = tmp_path / "gone.png"
    gone.symlink_to(tmp_path / "nowhere")
    names = [str(photos[0]), str(bad), str(gone), str(photos[1])]
    found = list(classifier.iter_predictions(expand_image_paths(names), topk=1, batch_size=2))
    assert [prediction.image for prediction in found] == names
    reasons = [prediction.error for prediction in found]
    assert [bool(reason) for reason in reasons] == [False, True, True, False]
    assert reasons[1] != reasons[2]
    assert [len(prediction.classes) for prediction in found] == [1, 0, 0, 1]
    with raises(BadImageError, str(bad), reasons[1]):
        classifier.predict([bad])


def test_classes_without_names_are_numbers(photos: list[Path], weights: PretrainedWeights) -> None:
    nameless = weights._replace(model_info=replace_head(weights, 10).model_info)
    (prediction,) = Classifier(nameless).predict(photos[:1], topk=3)
    assert [one.name for one in prediction.classes] == [
        str(o.class_index) for o in prediction.classes
    ]


def test_without_a_head_there_are_features_and_no_classes(weights: PretrainedWeights) -> None:
    features = Classifier(replace_head(weights, 0))
    assert features(jnp.zeros((2, 16, 24, 3))).shape == (2, 16)
    with raises(UserError, "head"):
        features.predict([b""])


@pytest.mark.parametrize(
    ("arguments", "outputs"),
    [
        ({}, 10),
        ({"num_classes": 10}, 10),
        ({"num_classes": 37}, 37),
        ({"num_classes": 0}, 16),
        ({"num_classes": 2, "class_names": ["cat", "dog"]}, 2),
    ],
)
def test_load_pretrained_gives_the_head_asked_for(
    weights: PretrainedWeights, tmp_path: Path, arguments: dict[str, Any], outputs: int
) -> None:
    run = save_run(weights, tmp_path)
    classifier = mixer_jax.load_pretrained(run, **arguments)
    logits = classifier(jnp.ones((1, 16, 24, 3)))
    assert logits.shape == (1, outputs)
    # A new head is zero; the old one is kept where it has as many classes.
    assert bool(logits.any()) == (outputs in (10, 16))
    assert classifier.model_info.class_names == {2: ("cat", "dog"), 10: DIGITS}.get(outputs, ())


def test_load_pretrained_resizes_and_renames(weights: PretrainedWeights, tmp_path: Path) -> None:
    run = save_run(weights, tmp_path)
    names = [name * 2 for name in DIGITS]
    classifier = mixer_jax.load_pretrained(run, image_size=(32, 48), class_names=names)
    assert mentions(classifier.model_info.resize_note, "16", "24", "Appendix C")
    assert classifier(jnp.zeros((1, 32, 48, 3))).shape == (1, 10)
    assert classifier.model_info.class_names == tuple(names)
    with raises(UserError, run) as caught:
        mixer_jax.load_pretrained(run, class_names=["cat"])
    # The path may have numbers in it.
    assert mentions(str(caught.value).replace(run, ""), "10", "1")


def test_dtype_is_that_of_the_weights_unless_told(
    weights: PretrainedWeights, tmp_path: Path
) -> None:
    run = save_run(weights, tmp_path)
    assert mixer_jax.load_pretrained(run).model.execution.dtype == "float32"
    assert mixer_jax.load_pretrained(run, dtype="bfloat16").model.execution.dtype == "bfloat16"


@pytest.mark.parametrize("count", [1, 8, 11, 16])
def test_all_devices_work(weights: PretrainedWeights, classifier: Classifier, count: int) -> None:
    assert jax.device_count() == 8
    leaf = jax.tree.leaves(classifier.params)[0]
    assert len(leaf.sharding.device_set) == 8
    assert_params_equal(classifier.params, weights.params)
    images = np.random.default_rng(1).uniform(-1, 1, (count, 16, 24, 3)).astype(np.float32)
    # On one device or not, the images come to all of them.
    logits = classifier(jax.device_put(images, jax.devices()[3]))
    reference = classifier.model.apply({"params": weights.params}, jnp.asarray(images))
    np.testing.assert_allclose(logits, reference, rtol=1e-5, atol=1e-5)


def test_many_images_keep_their_order(
    weights: PretrainedWeights, classifier: Classifier, photos: list[Path]
) -> None:
    predictions: list[Prediction] = classifier.predict(photos * 5, batch_size=16)
    expected_labels = [int(expected(weights, path).argmax()) for path in photos] * 5
    assert [prediction.classes[0].class_index for prediction in predictions] == expected_labels
