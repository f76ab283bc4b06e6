"""Tests of the Classifier and of load_pretrained: logits, probabilities, names, batches, files."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

import mixer_jax
from mixer_jax.checkpoints.weights import PretrainedWeights, replace_head
from mixer_jax.data.decode import BadImageError
from mixer_jax.data.image_files import expand_image_paths
from mixer_jax.data.preprocess import eval_image
from mixer_jax.errors import UserError
from mixer_jax.inference import Classifier, Prediction
from mixer_jax.models.bit_config import BitConfig
from mixer_jax.models.stack import forward_intermediates
from mixer_jax.models.vit_config import VitConfig
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import (
    DIGITS,
    TINY,
    assert_params_equal,
    random_weights,
    save_run,
)

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


def test_call_without_images_gives_no_logits(
    weights: PretrainedWeights, classifier: Classifier
) -> None:
    for images in (np.zeros((0, 16, 24, 3), np.float32), jnp.zeros((0, 16, 24, 3))):
        logits = classifier(images)
        assert (logits.shape, logits.dtype) == ((0, 10), jnp.float32)
    features = Classifier(replace_head(weights, 0))(np.zeros((0, 16, 24, 3), np.float32))
    assert features.shape == (0, 16)


@pytest.mark.parametrize(("topk", "batch_size"), [(-1, 5), (5, 0), (5, -1)])
def test_predict_rejects_arguments_that_are_not_positive(
    classifier: Classifier, photos: list[Path], topk: int, batch_size: int
) -> None:
    with raises(UserError, f"topk={topk}", f"batch_size={batch_size}"):
        classifier.predict(photos, topk=topk, batch_size=batch_size)


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


def photograph(orientation: int, format: str = "PNG") -> bytes:
    """Returns a file with an EXIF orientation."""
    levels = np.random.default_rng(1).integers(0, 256, (40, 24, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(levels).save(file, format, exif=exif)
    return file.getvalue()


def test_predict_takes_images_of_any_type(
    classifier: Classifier, photos: list[Path], tmp_path: Path
) -> None:
    (expected,) = classifier.predict([photos[1]])
    encoded = photos[1].read_bytes()
    image = Image.open(photos[1])
    pixels = np.asarray(image)
    alpha = np.dstack([pixels, np.zeros_like(pixels[..., :1])])
    singles = [
        photos[1],
        str(photos[1]),
        encoded,
        bytearray(encoded),
        memoryview(encoded),
        image,
        Image.open(photos[1]),
        Image.fromarray(alpha, "RGBA"),
        pixels,
        jnp.asarray(pixels),
        alpha,
        pixels[::-1][::-1],
    ]
    for single in singles:
        for images in (single, [single], (single, single)):
            for prediction in classifier.predict(images):
                assert prediction.classes == expected.classes, type(single)
    assert len(classifier.predict(singles, topk=1)) == len(singles)
    batch = classifier.predict(np.stack([pixels, pixels[::-1]]))
    assert [prediction.image for prediction in batch] == ["image 0", "image 1"]
    assert batch[0].classes == expected.classes
    assert batch[1].classes != expected.classes
    assert classifier.predict(image)[0].image == str(photos[1])
    assert classifier.predict(np.array([str(photos[1])]))[0].classes == expected.classes
    assert classifier.predict(path for path in photos[1:2])[0].classes == expected.classes


def test_predict_takes_gray_arrays(classifier: Classifier) -> None:
    gray = np.random.default_rng(1).integers(0, 256, (40, 24), np.uint8)
    (expected,) = classifier.predict(np.dstack([gray] * 3))
    for image in (gray, gray[..., None], Image.fromarray(gray)):
        assert classifier.predict(image)[0].classes == expected.classes


def test_predict_of_no_images_is_empty(classifier: Classifier) -> None:
    empty: list[Any] = [
        [],
        (),
        np.zeros((0, 16, 24, 3), np.uint8),
        jnp.zeros((0, 9, 9, 3), "uint8"),
    ]
    for images in empty:
        assert classifier.predict(images) == []


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_predict_rotates_photographs(
    orientation: int, format: str, classifier: Classifier, tmp_path: Path
) -> None:
    encoded = photograph(orientation, format)
    (tmp_path / "photo").write_bytes(encoded)
    # What the command predicts, and the same pixels rotated by Pillow.
    (expected,) = classifier.iter_predictions(
        expand_image_paths([str(tmp_path / "photo")]), topk=5, batch_size=1, exif_orientation=True
    )
    assert classifier.predict(encoded)[0].classes == expected.classes
    image = Image.open(io.BytesIO(encoded))
    upright = ImageOps.exif_transpose(image)
    (from_pillow,) = classifier.predict(upright)
    assert classifier.predict(image)[0].classes == from_pillow.classes
    assert classifier.predict(np.asarray(upright.convert("RGB")))[0].classes == from_pillow.classes
    if format != "JPEG":  # Decoded by the fast DCT, which Pillow does not use.
        assert from_pillow.classes == expected.classes
    (stored,) = classifier.predict(encoded, exif_orientation=False)
    if format != "TIFF":  # Always rotated.
        assert (stored.classes == expected.classes) == (orientation == 1)
        prediction = classifier.predict([image, image], exif_orientation=False)[1]
        assert (prediction.classes == from_pillow.classes) == (orientation == 1)


@pytest.mark.parametrize(
    ("images", "parts"),
    [
        (np.zeros((4, 5, 3), np.float32), ["image 0", "float32", "uint8"]),
        (np.zeros((0, 4, 5, 3), np.float32), ["images", "float32", "uint8"]),
        (np.zeros((4, 5, 3), bool), ["image 0", "bool", "uint8"]),
        (np.zeros((3, 4, 5), np.uint8), ["image 0", "(3, 4, 5)", "(height, width, 3)"]),
        (np.zeros((2, 3, 4, 5), np.uint8), ["images", "(2, 3, 4, 5)"]),
        (np.zeros(3, np.uint8), ["image 0", "(3,)"]),
        (np.zeros((0, 5, 3), np.uint8), ["image 0", "(0, 5, 3)"]),
        (np.zeros((5, 0), np.uint8), ["image 0", "(5, 0)"]),
        (np.zeros((2, 5, 0, 3), np.uint8), ["images", "(2, 5, 0, 3)"]),
        ([np.zeros((1, 4, 5, 3), np.uint8)], ["image 0", "(1, 4, 5, 3)"]),
        ([b"", 3], ["image 1", "int"]),
        ([None], ["image 0", "NoneType"]),
        (None, ["images", "sequence"]),
        ({"a": 3}, ["images", "sequence"]),
    ],
    ids=str,
)
def test_predict_rejects_other_images(
    images: Any, parts: list[str], classifier: Classifier
) -> None:
    with raises(UserError, *parts) as caught:
        classifier.predict(images)
    assert "\n" not in str(caught.value)


def test_predict_names_bad_images_of_pillow(classifier: Classifier, tmp_path: Path) -> None:
    encoded = photograph(1, "JPEG")
    image = Image.open(io.BytesIO(encoded[:-200]))
    with raises(BadImageError, "image 1"):
        classifier.predict([photograph(1), image])
    with raises(BadImageError, "image 0", "32"):
        classifier.predict(Image.fromarray(np.zeros((4, 4), np.float32)))
    with raises(BadImageError, "image 0"):
        classifier.predict(Image.new("RGB", (0, 4)))


def test_predict_leaves_images_of_pillow_unchanged(classifier: Classifier) -> None:
    image = Image.new("P", (30, 20), 3)
    image.info["transparency"] = 3
    classifier.predict([image] * 20)
    assert (image.mode, image.info) == ("P", {"transparency": 3})


_QUIET = """
import sys, mixer_jax
classifier = mixer_jax.load_pretrained(sys.argv[1])
import absl.logging
print(classifier.model_info.num_classes)
absl.logging.warning("of the program")
"""


def test_loading_prints_no_warnings_of_libraries(
    weights: PretrainedWeights, tmp_path: Path
) -> None:
    run = save_run(weights, tmp_path / "run")
    process = subprocess.run(
        [sys.executable, "-W", "always", "-c", _QUIET, run],
        # The TPU compiler, which the tests install, warns where it finds no TPU.
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == "10\n"
    assert process.stderr == "WARNING:absl:of the program\n"


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
    assert mentions(errors[2], os.strerror(errno.ENOENT))
    assert [len(prediction.classes) for prediction in predictions] == [1, 0, 0, 1]
    for path, error in ((bad, errors[1]), (missing, errors[2])):
        with raises(BadImageError, str(path), error):
            classifier.predict([path])


def test_classes_without_names_are_named_by_index(
    photos: list[Path], weights: PretrainedWeights
) -> None:
    nameless = weights._replace(model_info=replace_head(weights, 10).model_info)
    (prediction,) = Classifier(nameless).predict(photos[:1], topk=3)
    assert all(entry.name == str(entry.class_index) for entry in prediction.classes)


def test_without_a_head_there_are_features_and_no_classes(weights: PretrainedWeights) -> None:
    classifier = Classifier(replace_head(weights, 0))
    assert classifier(jnp.zeros((2, 16, 24, 3))).shape == (2, 16)
    for images in ([b""], []):
        with raises(UserError, "head"):
            classifier.predict(images)


@pytest.mark.parametrize("config", [TINY, VitConfig(2, 4, 16, 24, 2), BitConfig("1,1", 8, "3x3")])
def test_features_are_those_of_the_module(config: Any, photos: list[Path]) -> None:
    classifier = Classifier(random_weights(config))
    images = jnp.asarray(classifier.preprocess(photos))
    _, expected = forward_intermediates(classifier.model, classifier.params, images)
    layers = [name for name in classifier.layers if name != "logits"]
    found = classifier.features(photos, layers, batch_size=2)
    assert list(found) == layers
    for name, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    (pooled,) = classifier.features(photos[0]).values()
    np.testing.assert_allclose(pooled, expected["pre_logits"][:1], rtol=1e-5, atol=1e-5)
    logits = classifier.features(photos, "logits")["logits"]
    np.testing.assert_allclose(logits, classifier(images), rtol=1e-5, atol=1e-5)


def test_features_without_images_or_with_invalid_arguments(
    classifier: Classifier, tmp_path: Path
) -> None:
    assert classifier.features([], "blocks.1")["blocks.1"].shape == (0, 24, 16)
    with raises(UserError, "block1", "blocks.1"):
        classifier.features([], "block1")
    with raises(UserError, "layers", "stem"):
        classifier.features([], [])
    with raises(UserError, "batch_size", "0"):
        classifier.features([], batch_size=0)
    (tmp_path / "bad.png").write_text("not an image")
    with raises(BadImageError, str(tmp_path / "bad.png")):
        classifier.features([tmp_path / "bad.png"])


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
