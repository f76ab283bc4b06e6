"""Tests of ViT's published layouts: names, axes, class token, and what is inferred from them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixer_jax.checkpoints.export import export_weights
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.errors import UserError
from mixer_jax.inference import Classifier, load_pretrained
from mixer_jax.models.vit_config import VARIANTS, VitConfig
from tests.helpers import pretrained_files
from tests.helpers.messages import raises
from tests.helpers.random_weights import (
    TINY,
    assert_params_equal,
    random_weights,
    save_npz,
    save_safetensors,
)

VIT = VitConfig(num_blocks=2, patch_size=4, hidden_dim=12, mlp_dim=20, num_heads=3)
CONFIGS = {
    "token": VIT,
    "gap": dataclasses.replace(VIT, pooling="gap"),
    "map": dataclasses.replace(VIT, pooling="map"),
    "pre_logits": dataclasses.replace(VIT, pre_logits=True),
    "sincos2d": dataclasses.replace(VIT, pooling="gap", pos_embedding="sincos2d"),
}
TIMM_CONFIGS = ("token", "gap", "map")


def images(size: tuple[int, int] = (16, 16)) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (3, *size, 3)).astype(np.float32)


def linen(params: Any) -> dict[str, Any]:
    return pretrained_files.google_vit(params, pretrained_files.LINEN_NAMES)


@pytest.mark.parametrize("layout", [pretrained_files.google_vit, linen], ids=["older", "linen"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
def test_google_layout_is_read(config: str, layout: Callable, prefix: str, tmp_path: Path) -> None:
    weights = random_weights(CONFIGS[config])
    path = tmp_path / "ViT.npz"
    np.savez(path, **{prefix + name: t for name, t in layout(weights.params).items()})
    loaded = load_checkpoint(path)
    assert_params_equal(loaded.params, weights.params)
    info = loaded.model_info
    assert (info.family, info.config, info.gelu) == ("vit", CONFIGS[config], "tanh")
    # Without an embedding, the weights fit any size.
    assert info.image_size == ((16, 16) if config != "sincos2d" else (224, 224))


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("config", CONFIGS)
def test_google_layout_round_trip(config: str, num_classes: int, tmp_path: Path) -> None:
    """Tensors of an npz file are the same after loading and exporting, bit for bit."""
    weights = random_weights(CONFIGS[config], class_names=("a", "b", "c")[:num_classes])
    tensors = pretrained_files.google_vit(weights.params)
    np.savez(tmp_path / "theirs.npz", **tensors)
    loaded = load_checkpoint(tmp_path / "theirs.npz", image_size=(16, 16))
    export_weights(loaded, "google", str(tmp_path / "ours.npz"))
    with np.load(tmp_path / "ours.npz") as archive:
        assert_params_equal(dict(archive), tensors)
    assert load_checkpoint(tmp_path / "ours.npz").model_info == loaded.model_info


@pytest.mark.parametrize("config", TIMM_CONFIGS)
def test_timm_layout_round_trip(config: str, tmp_path: Path) -> None:
    """Tensors of timm are the same after loading and exporting, bit for bit."""
    weights = random_weights(CONFIGS[config], image_size=(16, 24))
    tensors = pretrained_files.timm_vit(weights.params)
    save_file(tensors, tmp_path / "theirs.safetensors")
    (tmp_path / "config.json").write_text('{"model_args": {"num_heads": 3, "img_size": [16, 24]}}')
    loaded = load_checkpoint(tmp_path / "theirs.safetensors")
    assert_params_equal(loaded.params, weights.params)
    assert loaded.model_info.config == CONFIGS[config]
    export_weights(loaded, "timm", str(tmp_path / "ours.safetensors"))
    assert_params_equal(load_file(tmp_path / "ours.safetensors"), tensors)
    # The number of heads is stored with the weights.
    (tmp_path / "config.json").unlink()
    assert load_checkpoint(tmp_path / "ours.safetensors").model_info == loaded.model_info


def test_heads_of_timms_weights_are_those_of_the_variant(tmp_path: Path) -> None:
    shallow = random_weights(VIT)
    with raises(UserError, "num_heads", "12", "config.json"):
        load_checkpoint(save_safetensors(shallow, tmp_path / "model.safetensors"))
    weights = random_weights(VARIANTS["Ti/16"], (32, 32), ("a",))
    info = load_checkpoint(save_safetensors(weights, tmp_path / "model.safetensors")).model_info
    assert (info.variant, info.config) == ("Ti/16", VARIANTS["Ti/16"])
    assert (info.gelu, info.eval_crop, info.eval_crop_fraction) == ("exact", "bicubic", 0.9)


def test_crop_of_timms_weights_depends_on_the_image_size(tmp_path: Path) -> None:
    weights = random_weights(dataclasses.replace(VIT, patch_size=32), (384, 384))
    path = save_safetensors(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_args": {"num_heads": 3}}')
    assert load_checkpoint(path).model_info.eval_crop_fraction == 1.0


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("prefix", ["params/", "params/img/"])
def test_big_vision_layout_is_read(config: str, stacked: bool, prefix: str, tmp_path: Path) -> None:
    """A class token has no entry in the embedding, which is the same as an entry of zeros."""
    weights = random_weights(CONFIGS[config])
    if weights.model_info.config.has_class_token:
        weights.params["pos_embedding"][:, 0] = 0
    tensors = pretrained_files.big_vision(weights.params, stacked)
    names = {prefix + name: tensor for name, tensor in tensors.items()}
    if "img" in prefix:
        names |= {"params/txt/head/kernel": np.zeros((3, 3)), "params/t": np.zeros(1)}
    np.savez(tmp_path / "vit.npz", **names)
    loaded = load_checkpoint(tmp_path / "vit.npz", image_size=(16, 16))
    assert_params_equal(loaded.params, weights.params)
    assert loaded.model_info.config == CONFIGS[config]
    assert loaded.model_info.eval_crop == "shorter_side"


def test_folded_class_entry_computes_the_same(tmp_path: Path) -> None:
    """big_vision reads vt's files by adding the class token's entry to the class token."""
    weights = random_weights(VIT)
    expected = Classifier(weights, "float32")(images())
    folded = {name: np.copy(value) if name in ("cls", "pos_embedding") else value
              for name, value in weights.params.items()}  # fmt: skip
    folded["cls"] += folded["pos_embedding"][:, :1]
    folded["pos_embedding"][:, 0] = 0
    tensors = pretrained_files.big_vision(folded, stacked=True)
    assert tensors["pos_embedding"].shape == (1, 16, 12)
    np.savez(tmp_path / "vit.npz", **tensors)
    logits = load_pretrained(tmp_path / "vit.npz", dtype="float32")(images())
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_bfloat16_arrays_of_two_bytes_are_read(tmp_path: Path) -> None:
    weights = random_weights(VIT)
    tensors = {
        name: tensor.astype(ml_dtypes.bfloat16).view("V2")
        for name, tensor in pretrained_files.big_vision(weights.params, stacked=True).items()
    }
    np.savez(tmp_path / "vit.npz", **tensors)
    loaded = load_checkpoint(tmp_path / "vit.npz").params["blocks"]["attention"]["query"]["kernel"]
    expected = weights.params["blocks"]["attention"]["query"]["kernel"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(loaded, expected.astype(np.float32))


def test_optimizer_next_to_weights_is_skipped(tmp_path: Path) -> None:
    weights = random_weights(VIT)
    google = pretrained_files.google_vit(weights.params)
    moments = {f"opt/state/param_states/{name}/grad_ema": t * 9 for name, t in google.items()}
    np.savez(tmp_path / "ViT.npz", **moments, **google)
    assert_params_equal(load_checkpoint(tmp_path / "ViT.npz").params, weights.params)


def test_zeroed_head_is_kept_but_not_used(tmp_path: Path) -> None:
    """The published files imagenet21k/ViT-*.npz have such a head."""
    weights = random_weights(CONFIGS["pre_logits"], class_names=(), num_classes=21_843)
    for array in weights.params["head"].values():
        array[:] = 0
    classifier = load_pretrained(save_npz(weights, tmp_path / "ViT.npz"))
    assert (classifier.model_info.num_classes, classifier.model_info.loss) == (21_843, "sigmoid")
    with raises(UserError, "head", "zeros", "--config.init_from"):
        classifier.predict(np.zeros((16, 16, 3), np.uint8))
    export_weights(load_checkpoint(tmp_path / "ViT.npz"), "google", str(tmp_path / "copy.npz"))
    assert_params_equal(load_checkpoint(tmp_path / "copy.npz").params, weights.params)
    features = load_pretrained(tmp_path / "ViT.npz", num_classes=0)(images())
    assert 0.1 < np.abs(features).max() <= 1


def test_other_functions_are_rejected(tmp_path: Path) -> None:
    tensors = pretrained_files.timm_vit(random_weights(CONFIGS["gap"]).params)
    tensors["fc_norm.weight"], tensors["fc_norm.bias"] = np.ones(12), np.zeros(12)
    del tensors["norm.weight"], tensors["norm.bias"]
    save_file(tensors, tmp_path / "avg.safetensors")
    with raises(UserError, "avg.safetensors", "'fc_norm.weight'", "global_pool"):
        load_checkpoint(tmp_path / "avg.safetensors")
    google = pretrained_files.google_vit(random_weights(VIT).params)
    google["conv_root/kernel"] = np.ones((7, 7, 3, 64))
    np.savez(tmp_path / "hybrid.npz", **google)
    with raises(UserError, "hybrid.npz", "'conv_root/kernel'", "hybrid"):
        load_checkpoint(tmp_path / "hybrid.npz")


def test_position_embedding_of_timm_is_learned_and_has_an_entry_for_the_class_token(
    tmp_path: Path,
) -> None:
    tensors = pretrained_files.timm_vit(random_weights(VIT).params)
    without = {name: tensor for name, tensor in tensors.items() if name != "pos_embed"}
    save_file(without, tmp_path / "rope.safetensors")
    with raises(UserError, "rope.safetensors", "'pos_embed'", "missing"):
        load_checkpoint(tmp_path / "rope.safetensors")
    with raises(UserError, "timm", "pos_embedding", "--to=orbax"):
        export_weights(random_weights(CONFIGS["sincos2d"]), "timm", f"{tmp_path}/t.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["rope.safetensors"]
    tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    save_file(tensors, tmp_path / "deit3.safetensors")
    config = tmp_path / "config.json"
    config.write_text('{"model_args": {"num_heads": 3}}')
    with raises(UserError, "deit3.safetensors", "15 tokens", "no_embed_class"):
        load_checkpoint(tmp_path / "deit3.safetensors")
    config.write_text('{"model_args": {"num_heads": 3, "no_embed_class": true}}')
    with raises(UserError, "deit3.safetensors", "no_embed_class", "class token"):
        load_checkpoint(tmp_path / "deit3.safetensors", pretrain_image_size=(12, 20))


def test_parameters_without_a_place_in_timm_are_named(tmp_path: Path) -> None:
    with raises(UserError, "timm", "pre_logits", "--to=orbax"):
        export_weights(random_weights(CONFIGS["pre_logits"]), "timm", f"{tmp_path}/t.safetensors")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"cls": None}, ["17 tokens"]),
        ({"Transformer/encoder_norm/bias": np.zeros(13)}, ["encoder_norm/bias", "13", "12"]),
        ({"Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias": None}, ["encoderblock_1"]),
        ({"extra": np.zeros(3)}, ["'extra'", "Google"]),
    ],
)
def test_bad_tensors_are_named(changes: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    tensors = pretrained_files.google_vit(random_weights(VIT).params) | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    np.savez(tmp_path / "ViT.npz", **tensors)
    with raises(UserError, *parts):
        load_checkpoint(tmp_path / "ViT.npz")


def test_files_of_another_family_are_named(tmp_path: Path) -> None:
    """Metadata of one family next to the weights of another."""
    mixer = random_weights(TINY)
    path = save_npz(random_weights(VIT), tmp_path / "ViT.npz", mixer.model_info.to_dict())
    with raises(UserError, "ViT.npz", "family", "vit", "mixer"):
        load_checkpoint(path)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_stablehlo_export(config: str, tmp_path: Path) -> None:
    """The program is compared with the model on batches of several sizes."""
    weights = random_weights(CONFIGS[config])
    assert "bit-identical" in export_weights(weights, "stablehlo", f"{tmp_path}/vit.stablehlo")
