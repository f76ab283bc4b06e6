"""Tests of published layouts: names, shapes, and what is inferred from them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.weights import replace_head, resize
from mixer_jax.inference import Classifier, load_pretrained
from mixer_jax.models.mixer_config import VARIANTS
from tests.helpers import pretrained_files
from tests.helpers.random_weights import (
    TINY,
    assert_params_equal,
    random_weights,
    save_npz,
    save_safetensors,
)

THREE_CLASSES = ("class 0", "class 1", "class 2")


@pytest.mark.parametrize(
    "layout", [pretrained_files.google, pretrained_files.google_legacy], ids=["google", "legacy"]
)
def test_google_layouts_give_the_same_params_and_logits(layout: Callable, tmp_path: Path) -> None:
    weights = random_weights()
    path = tmp_path / "Mixer.npz"
    np.savez(path, **layout(weights.params))
    assert_params_equal(load_checkpoint(path).params, weights.params)
    images = np.random.default_rng(1).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
    logits = load_pretrained(path)(images)
    assert np.ptp(logits) > 1
    np.testing.assert_array_equal(logits, Classifier(weights)(images))


def test_google_layout_round_trip(tmp_path: Path) -> None:
    weights = random_weights(image_size=(16, 32), gelu="exact", loss="sigmoid")
    path = save_npz(weights, tmp_path / "ours.npz", weights.model_info.to_dict())
    with np.load(path) as archive:
        assert_params_equal(dict(archive), pretrained_files.google(weights.params))
    loaded = load_checkpoint(path)
    assert_params_equal(loaded.params, weights.params)
    assert loaded.model_info == weights.model_info


def test_timm_layout_round_trip(tmp_path: Path) -> None:
    weights = random_weights(image_size=(16, 32), eval_crop="square")
    path = save_safetensors(weights, tmp_path / "ours.safetensors", weights.model_info.to_dict())
    assert_params_equal(load_file(path), pretrained_files.timm(weights.params))
    loaded = load_checkpoint(path)
    assert_params_equal(loaded.params, weights.params)
    assert loaded.model_info == weights.model_info


def test_config_is_inferred_from_shapes(tmp_path: Path) -> None:
    weights = random_weights(VARIANTS["S/32"], (64, 64), class_names=THREE_CLASSES)
    info = load_checkpoint(save_npz(weights, tmp_path / "Mixer.npz")).model_info
    assert (info.family, info.variant, info.config) == ("mixer", "S/32", VARIANTS["S/32"])
    assert (info.image_size, info.num_classes, info.class_names) == ((64, 64), 3, ())
    assert (info.gelu, info.eval_crop) == ("tanh", "shorter_side")


def test_tiled_weights_keep_their_variant(tmp_path: Path) -> None:
    weights = resize(random_weights(VARIANTS["S/32"], (64, 64)), (128, 128))
    info = load_checkpoint(save_npz(weights, tmp_path / "Mixer.npz")).model_info
    assert info.config.tokens_mlp_dim == 4 * VARIANTS["S/32"].tokens_mlp_dim
    assert (info.variant, info.image_size) == ("S/32", (128, 128))


def test_timm_layout_implies_exact_gelu_and_bicubic_crop(tmp_path: Path) -> None:
    path = save_safetensors(random_weights(), tmp_path / "model.safetensors")
    info = load_checkpoint(path).model_info
    assert (info.variant, info.gelu, info.eval_crop) == ("custom", "exact", "bicubic")
    info = load_checkpoint(path, gelu="tanh", eval_crop="resize").model_info
    assert (info.gelu, info.eval_crop) == ("tanh", "resize")


@pytest.mark.parametrize(("bias", "loss"), [(-6.9, "sigmoid"), (0.0, "softmax")])
def test_loss_is_inferred_from_the_bias_of_the_head(bias: float, loss: str, tmp_path: Path) -> None:
    weights = random_weights()
    weights.params["head"]["bias"] += np.float32(bias)
    assert load_checkpoint(save_npz(weights, tmp_path / "Mixer.npz")).model_info.loss == loss


def test_weights_without_a_head_give_features(tmp_path: Path) -> None:
    weights = replace_head(random_weights(), 0)
    classifier = load_pretrained(save_npz(weights, tmp_path / "Mixer.npz"))
    assert (classifier.model_info.num_classes, classifier.model_info.loss) == (0, "softmax")
    images = np.zeros((1, 16, 16, 3), np.float32)
    assert classifier(images).shape == (1, TINY.hidden_dim)
