"""Tests of loading files of weights: image size, class names, metadata, and overrides."""

import dataclasses
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.errors import UserError
from mixer_jax.inference import load_pretrained
from tests.helpers.corrupt_files import assert_rejected
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import (
    assert_params_equal,
    random_weights,
    save_npz,
    save_run,
    save_safetensors,
)

THREE_CLASSES = ("class 0", "class 1", "class 2")


def write_metadata(path: str, metadata: Any) -> None:
    """Writes the JSON file next to an npz archive."""
    Path(f"{path}.json").write_text(json.dumps(metadata))


def test_a_thousand_classes_have_imagenet_names(tmp_path: Path) -> None:
    names = tuple(map(str, range(1000)))
    path = save_npz(random_weights(class_names=names), tmp_path / "Mixer.npz")
    loaded = load_checkpoint(path).model_info.class_names
    assert (loaded[0], loaded[-1], len(set(loaded))) == ("n01440764", "n15075141", 1000)
    # Names in the metadata take precedence.
    write_metadata(path, {"class_names": list(names)})
    assert load_checkpoint(path).model_info.class_names == names


def test_tokens_that_are_not_a_square_need_an_image_size(tmp_path: Path) -> None:
    weights = random_weights(image_size=(16, 32))
    path = save_npz(weights, tmp_path / "Mixer.npz")
    assert mentions(assert_rejected(path), "Mixer.npz", "32", "4", "image_size")
    assert mentions(assert_rejected(path, image_size=(16, 16)), "Mixer.npz", "32")
    loaded = load_checkpoint(path, image_size=(16, 32))
    expected = dataclasses.replace(
        weights.model_info, class_names=(), eval_crop="shorter_side", dtype="auto"
    )
    assert loaded.model_info == expected
    assert_params_equal(loaded.params, weights.params)
    tiled = load_checkpoint(path, pretrain_image_size=(16, 32), image_size=(32, 64)).model_info
    assert tiled.image_size == (32, 64)
    assert mentions(tiled.resize_note, "16", "32", "Appendix C")


def test_an_ambiguous_image_size_needs_the_pretraining_size(tmp_path: Path) -> None:
    weights = random_weights(image_size=(8, 32))  # As many tokens as 16 × 16.
    path = save_npz(weights, tmp_path / "Mixer.npz")
    message = assert_rejected(path, image_size=(8, 32))
    assert mentions(message, "Mixer.npz", "16", "4", "8", "32", "pretrain_image_size")
    assert mentions(message, "image_size", "Mixer.npz.json")
    timm_path = save_safetensors(weights, tmp_path / "model.safetensors")
    # Only without metadata of ours does timm's config count.
    message = assert_rejected(timm_path, image_size=(8, 32))
    assert mentions(message, "model.safetensors", "input_size", "config.json")

    own_size = load_checkpoint(path, image_size=(8, 32), pretrain_image_size=(8, 32))
    assert_params_equal(own_size.params, weights.params)
    assert (own_size.model_info.image_size, own_size.model_info.resize_note) == ((8, 32), "")
    resized = load_checkpoint(path, image_size=(8, 32), pretrain_image_size=16).model_info
    assert mentions(resized.resize_note, "16")
    # A size with another number of tokens is not ambiguous.
    assert mentions(load_checkpoint(path, image_size=(16, 32)).model_info.resize_note, "16")


def test_stored_image_size_is_used_unless_overridden(tmp_path: Path) -> None:
    weights = random_weights(image_size=(8, 32))
    path = save_npz(weights, tmp_path / "Mixer.npz", {"image_size": [8, 32]})
    assert_params_equal(load_checkpoint(path, image_size=(8, 32)).params, weights.params)
    assert load_checkpoint(path, pretrain_image_size=16).model_info.image_size == (16, 16)
    message = assert_rejected(path, pretrain_image_size=(16, 32))
    assert mentions(message, "Mixer.npz", "pretrain_image_size", "16", "32", "4")


def test_class_names_are_loaded_in_one_unicode_form(tmp_path: Path) -> None:
    nfc, nfd = ("caf\xe9", "eau", "th\xe9"), ("cafe\u0301", "eau", "the\u0301")
    weights = random_weights(class_names=THREE_CLASSES)
    path = save_npz(weights, tmp_path / "Mixer.npz", {"class_names": nfd})
    assert load_checkpoint(path).model_info.class_names == nfc
    run = save_run(random_weights(class_names=nfd), tmp_path / "run")
    assert load_checkpoint(run).model_info.class_names == nfc


@pytest.mark.parametrize("names", [["one", "two"], "one", [1, 2, 3]], ids=str)
def test_class_names_override_invalid_ones(names: Any, tmp_path: Path) -> None:
    weights = random_weights(class_names=THREE_CLASSES)
    npz = save_npz(weights, tmp_path / "Mixer.npz", {"class_names": names})
    safetensors = save_safetensors(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"label_names": names}))
    for path in (npz, safetensors):
        assert Path(path).name in assert_rejected(path)
        for load in (load_checkpoint, load_pretrained):
            assert load(path, class_names=THREE_CLASSES).model_info.class_names == THREE_CLASSES


def test_metadata_of_an_archive_is_used(tmp_path: Path) -> None:
    metadata = {
        "image_size": [32, 16],
        "class_names": list(THREE_CLASSES),
        "gelu": "exact",
        "loss": "sigmoid",
        "eval_crop": "square",
        "exif_orientation": True,
        "dtype": "bfloat16",
        "multi_label": True,
    }
    weights = random_weights(image_size=(16, 32), class_names=THREE_CLASSES)
    path = save_npz(weights, tmp_path / "Mixer.npz", metadata)
    info = load_checkpoint(path).model_info.to_dict()
    assert {name: info[name] for name in metadata} == metadata
    # Metadata of older versions does not know several labels.
    del metadata["multi_label"]
    path = save_npz(weights, tmp_path / "Mixer.npz", metadata)
    assert not load_checkpoint(path).model_info.multi_label


@pytest.mark.parametrize(
    ("metadata", "parts"),
    [
        ({"image_size": [16, 32]}, ["image_size", "16", "32", "4"]),
        ({"image_size": 18}, ["image_size", "18", "16", "4"]),
        ({"image_size": "large"}, ["image_size", "large"]),
        ({"image_size": [16.0, 16.0]}, ["image_size", "16.0"]),
        ({"image_size": [-16, -16]}, ["image_size", "-16"]),
        ({"image_size": [True, True]}, ["image_size", "True"]),
        ({"class_names": ["one", "two"]}, ["3", "2"]),
        ({"class_names": "one"}, ["class_names"]),
        ({"class_names": [1, 2, 3]}, ["class_names"]),
        ({"gelu": "fast"}, ["gelu", "fast", "tanh", "exact"]),
        ({"gelu": ["tanh"]}, ["gelu", "['tanh']", "exact"]),
        ({"eval_crop": "none"}, ["eval_crop", "none"]),
        ({"loss": 1}, ["loss", "1"]),
        ({"dtype": "int8"}, ["dtype", "int8"]),
        ({"exif_orientation": "yes"}, ["exif_orientation", "yes"]),
        ({"resize_note": 3}, ["resize_note", "3"]),
        ({"multi_label": "yes"}, ["multi_label", "yes"]),
        ({"num_classes": 5}, ["num_classes", "5", "3"]),
        ({"variant": "B/16"}, ["variant", "B/16", "custom"]),
        ({"config": {"num_blocks": 2}}, ["config", "{'num_blocks': 2}"]),
        ({"config": [2]}, ["config", "[2]"]),
        ({"family": "other"}, ["family", "other", "mixer"]),
    ],
)
def test_invalid_metadata_is_rejected(metadata: Any, parts: list[str], tmp_path: Path) -> None:
    weights = random_weights(class_names=THREE_CLASSES)
    path = save_npz(weights, tmp_path / "Mixer.npz", metadata)
    assert mentions(assert_rejected(path), "Mixer.npz", *parts)
    path = save_safetensors(weights, tmp_path / "Mixer.safetensors", metadata)
    assert mentions(assert_rejected(path), "Mixer.safetensors", *parts)


def test_metadata_with_old_names_is_used(tmp_path: Path) -> None:
    weights = random_weights(class_names=THREE_CLASSES)
    config = dataclasses.asdict(weights.model_info.config)
    metadata = {"widths": config, "eval_crop": "whole", "resolution": "grown from 8 px"}
    path = save_npz(weights, tmp_path / "Mixer.npz", metadata)
    info = load_checkpoint(path).model_info
    assert (info.eval_crop, info.resize_note) == ("resize", "grown from 8 px")
    path = save_npz(weights, tmp_path / "Mixer.npz", {"widths": config | {"num_blocks": 3}})
    assert mentions(assert_rejected(path), "num_blocks", "3")


def test_class_names_must_match_the_classes(tmp_path: Path) -> None:
    path = save_npz(random_weights(), tmp_path / "Mixer.npz")
    assert load_pretrained(path, class_names=list("abcdefghij")).model_info.class_names[9] == "j"
    with raises(UserError, "Mixer.npz") as caught:
        load_pretrained(path, class_names=list("abc"))
    assert mentions(str(caught.value).replace(str(tmp_path), ""), "10", "3")


def test_a_variant_with_another_config_is_accepted_if_stored(tmp_path: Path) -> None:
    weights = random_weights(class_names=THREE_CLASSES)
    config = dataclasses.asdict(weights.model_info.config)
    for metadata in (
        {"variant": "B/16", "config": config},
        {"variant": "custom"},
        {"num_classes": 3},
    ):
        path = save_npz(weights, tmp_path / "Mixer.npz", metadata)
        assert load_checkpoint(path).model_info.config == weights.model_info.config


def test_params_of_files_are_aligned_for_jax(tmp_path: Path) -> None:
    loaded = load_checkpoint(save_npz(random_weights(), tmp_path / "Mixer.npz"))
    for section in ("stem", "head"):
        for array in loaded.params[section].values():
            assert array.ctypes.data % 64 == 0
            assert array.dtype == np.float32


def test_a_release_of_torch_that_can_run_code_in_checkpoints_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(b"PK")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"torch": "2.5.1+cpu"}[name])
    message = assert_rejected(str(path))
    assert mentions(message, "torch", "2.6", "2.5.1+cpu", "model.pth", "CVE-2025-32434")
