"""Tests of published layouts: names, shapes, and what is inferred from them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.weights import replace_head, resize
from mixer_jax.errors import UserError
from mixer_jax.inference import Classifier, load_pretrained
from mixer_jax.models.mixer_config import VARIANTS
from tests.helpers import pretrained_files
from tests.helpers.messages import raises
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


PREFIXES = [
    "module.",
    "_orig_mod.",
    "model.",
    "model._orig_mod.",
    "module._orig_mod.module.",
    "ema_model.module.",
    "params/",
    "opt/target/",
    "params/img/",
    "opt/target/params/",
    "state_dict/module.",
    "model_state_dict/",
    "model_ema/module.",
]
LAYOUTS = {
    "google": pretrained_files.google,
    "legacy": pretrained_files.google_legacy,
    "timm": pretrained_files.timm,
}


def save_tensors(tensors: dict[str, Any], path: Path) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **tensors)
    else:
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, path)
    return path


@pytest.mark.parametrize("file", ["model.npz", "model.safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefixes_of_names_are_skipped(layout: str, prefix: str, file: str, tmp_path: Path) -> None:
    weights = random_weights()
    tensors = {prefix + name: t for name, t in LAYOUTS[layout](weights.params).items()}
    loaded = load_checkpoint(save_tensors(tensors, tmp_path / file))
    assert_params_equal(loaded.params, weights.params)
    assert loaded.model_info.num_classes == 10


def optimizer_of(params: Any) -> dict[str, Any]:
    """Returns the tensors that big_vision saves next to parameters: moments, counters and times."""
    google = pretrained_files.google(params)
    return {
        **{f"opt/0/mu/{name}": (t * 9).astype(ml_dtypes.bfloat16) for name, t in google.items()},
        **{f"opt/0/nu/{name}": t * 9 for name, t in google.items()},
        "opt/0/count": np.array(3),
        "chrono/accum_train_time": np.array(1.5),
        "chrono/empty": np.zeros((0, 3), np.float32),
    }


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("prefix", ["params/", "params/img/"])
def test_training_checkpoints_of_big_vision_are_read(
    prefix: str, save: Callable, tmp_path: Path
) -> None:
    weights = random_weights()
    tensors = {f"{prefix}{name}": t for name, t in pretrained_files.google(weights.params).items()}
    text_tower = {"params/txt/head/kernel": np.zeros((3, 3)), "params/t": np.zeros(1)}
    path = tmp_path / "checkpoint.npz"
    save(path, **optimizer_of(weights.params), **tensors, **(text_tower if "img" in prefix else {}))
    assert_params_equal(load_checkpoint(path).params, weights.params)


def test_checkpoints_with_an_optimizer_of_flax_are_read(tmp_path: Path) -> None:
    weights = random_weights()
    google = pretrained_files.google(weights.params)
    tensors = {f"opt/target/{name}": t for name, t in google.items()}
    moments = {f"opt/state/param_states/{name}/grad_ema": t * 9 for name, t in google.items()}
    path = save_tensors(tensors | moments | {"opt/state/step": np.array(3)}, tmp_path / "old.npz")
    assert_params_equal(load_checkpoint(path).params, weights.params)


def test_an_optimizer_alone_is_not_taken_for_weights(tmp_path: Path) -> None:
    path = save_tensors(optimizer_of(random_weights().params), tmp_path / "optimizer.npz")
    with raises(UserError, "optimizer.npz", "'opt/0/mu/'", "'params/'"):
        load_checkpoint(path)


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    weights, averaged = random_weights(seed=0), random_weights(seed=1)
    tensors = {f"model.{name}": t for name, t in pretrained_files.timm(weights.params).items()}
    path = save_tensors(tensors | {"loss.weight": np.ones(3)}, tmp_path / "model.safetensors")
    assert_params_equal(load_checkpoint(path).params, weights.params)
    tensors |= {
        f"ema_model.module.{name}": t for name, t in pretrained_files.timm(averaged.params).items()
    }
    path = save_tensors(tensors, tmp_path / "model.safetensors")
    assert_params_equal(load_checkpoint(path).params, averaged.params)


def test_compiled_blocks_are_read(tmp_path: Path) -> None:
    weights = random_weights()
    tensors = {
        re.sub(r"(blocks\.\d+\.)", r"\1_orig_mod.", name): t
        for name, t in pretrained_files.timm(weights.params).items()
    }
    assert "blocks.1._orig_mod.norm1.weight" in tensors
    path = save_tensors(tensors, tmp_path / "model.safetensors")
    assert_params_equal(load_checkpoint(path).params, weights.params)


def test_bad_tensors_are_named_with_their_prefix(tmp_path: Path) -> None:
    tensors = {
        f"params/{name}": t for name, t in pretrained_files.google(random_weights().params).items()
    }
    for changes, parts in (
        ({"params/head/bias": np.zeros(10, np.int32)}, ["params/head/bias", "int32"]),
        ({"params/head/bias": np.zeros(0, np.float32)}, ["params/head/bias", "0"]),
        ({"params/head/bias": np.zeros(11, np.float32)}, ["params/head/bias", "11", "10"]),
        ({"params/extra": np.zeros(11, np.float32)}, ["params/extra"]),
    ):
        with raises(UserError, *(f"'{p}'" if "/" in p else p for p in parts)):
            load_checkpoint(save_tensors(tensors | changes, tmp_path / "bad.npz"))
    del tensors["params/head/bias"]
    with raises(UserError, "'params/head/bias'"):
        load_checkpoint(save_tensors(tensors, tmp_path / "bad.npz"))


@pytest.mark.parametrize("prefix", ["student.", "backbone/"])
def test_unknown_prefixes_are_named(prefix: str, tmp_path: Path) -> None:
    tensors = {prefix + k: t for k, t in pretrained_files.timm(random_weights().params).items()}
    with raises(UserError, f"'{prefix}'", "'module.'"):
        load_checkpoint(save_tensors(tensors, tmp_path / "model.safetensors"))
