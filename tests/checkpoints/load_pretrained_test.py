"""Tests of what published weights are taken for, from their names and shapes and what they say."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mixer_jax.checkpoints import tree
from mixer_jax.checkpoints.formats.npz import write_npz
from mixer_jax.checkpoints.formats.safetensors import write_safetensors
from mixer_jax.checkpoints.layouts import layout_views
from mixer_jax.checkpoints.load import PretrainedWeights, load_checkpoint, replace_head, resize
from mixer_jax.errors import UserError
from mixer_jax.inference import Classifier, load_pretrained
from mixer_jax.models.mixer_config import VARIANTS
from mixer_jax.models.mixer_layouts import GOOGLE, TIMM
from tests.helpers import pretrained_files
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import TINY, assert_params_equal, random_weights

LAYOUTS = {"google": pretrained_files.google, "older": pretrained_files.google_older}
FEW = tuple(f"class {label}" for label in range(3))


def save_npz(
    path: Path, weights: PretrainedWeights, layout: Callable = pretrained_files.google
) -> str:
    np.savez(path, **layout(weights.params))
    return str(path)


def save_timm(path: Path, weights: PretrainedWeights, said: dict[str, Any] | None = None) -> str:
    from safetensors.numpy import save_file

    save_file(pretrained_files.timm(weights.params), path, said)
    return str(path)


def refusal(source: str, **wanted: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_checkpoint(source, **wanted)
    assert "\n" not in str(caught.value)
    # Its folder may have numbers in its name.
    return str(caught.value).replace(f"{Path(source).parent}/", "")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_layouts_of_google_give_the_parameters_and_logits(layout: str, tmp_path: Path) -> None:
    weights = random_weights()
    path = save_npz(tmp_path / "Mixer.npz", weights, LAYOUTS[layout])
    assert_params_equal(load_checkpoint(path).params, weights.params)
    images = np.random.default_rng(1).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
    logits = load_pretrained(path)(images)
    assert np.ptp(logits) > 1
    np.testing.assert_array_equal(logits, Classifier(weights)(images))


def test_weights_are_exported_with_the_names_of_google_and_imported_again(tmp_path: Path) -> None:
    weights = random_weights(image_size=(16, 32), gelu="exact", loss="sigmoid")
    path = tmp_path / "ours.npz"
    views = layout_views(dict(tree.flatten(weights.params)), GOOGLE)
    write_npz(str(path), views, weights.model_info.to_dict())
    with np.load(path) as archive:
        assert_params_equal(dict(archive), pretrained_files.google(weights.params))
    again = load_checkpoint(str(path))
    assert_params_equal(again.params, weights.params)
    assert again.model_info == weights.model_info


def test_weights_are_exported_with_the_names_of_timm_and_imported_again(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    weights = random_weights(image_size=(16, 32), eval_crop="square")
    path = tmp_path / "ours.safetensors"
    views = layout_views(dict(tree.flatten(weights.params)), TIMM)
    write_safetensors(str(path), views, weights.model_info.to_dict())
    assert_params_equal(load_file(path), pretrained_files.timm(weights.params))
    again = load_checkpoint(str(path))
    assert_params_equal(again.params, weights.params)
    assert again.model_info == weights.model_info


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, ">f4"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numbers_of_any_floating_type_are_read(dtype: Any, save: Callable, tmp_path: Path) -> None:
    tensors = pretrained_files.google(random_weights().params)
    given = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    save(tmp_path / "Mixer.npz", **given)
    found = pretrained_files.google(load_checkpoint(str(tmp_path / "Mixer.npz")).params)
    assert_params_equal(found, {name: tensor.astype(np.float32) for name, tensor in given.items()})


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numbers_in_the_order_of_fortran_are_read(save: Callable, tmp_path: Path) -> None:
    weights = random_weights()
    tensors = pretrained_files.google(weights.params)
    save(tmp_path / "Mixer.npz", **{name: np.asfortranarray(t) for name, t in tensors.items()})
    assert_params_equal(load_checkpoint(str(tmp_path / "Mixer.npz")).params, weights.params)


def test_shapes_tell_the_model(tmp_path: Path) -> None:
    weights = random_weights(VARIANTS["S/32"], (64, 64), class_names=FEW)
    about = load_checkpoint(save_npz(tmp_path / "Mixer.npz", weights)).model_info
    assert (about.variant, about.config) == ("S/32", VARIANTS["S/32"])
    assert (about.image_size, about.num_classes, about.class_names) == ((64, 64), 3, ())
    assert (about.gelu, about.eval_crop) == ("tanh", "shorter_side")
    # Grown for images twice as large, it is the same variant.
    grown = resize(weights, (128, 128))
    about = load_checkpoint(save_npz(tmp_path / "Mixer.npz", grown)).model_info
    assert about.config.tokens_mlp_dim == 4 * VARIANTS["S/32"].tokens_mlp_dim
    assert (about.variant, about.image_size) == ("S/32", (128, 128))


def test_names_tell_the_gelu_and_the_crop(tmp_path: Path) -> None:
    path = save_timm(tmp_path / "model.safetensors", random_weights())
    about = load_checkpoint(path).model_info
    assert (about.variant, about.gelu, about.eval_crop) == ("custom", "exact", "bicubic")
    about = load_checkpoint(path, gelu="tanh", eval_crop="resize").model_info
    assert (about.gelu, about.eval_crop) == ("tanh", "resize")


@pytest.mark.parametrize(("bias", "loss"), [(-6.9, "sigmoid"), (0.0, "softmax")])
def test_the_bias_of_the_head_tells_the_loss(bias: float, loss: str, tmp_path: Path) -> None:
    weights = random_weights()
    weights.params["head"]["bias"] += np.float32(bias)
    assert load_checkpoint(save_npz(tmp_path / "Mixer.npz", weights)).model_info.loss == loss


def test_weights_without_a_head_give_features(tmp_path: Path) -> None:
    weights = replace_head(random_weights(), 0)
    path = save_npz(tmp_path / "Mixer.npz", weights)
    loaded = load_pretrained(path)
    assert (loaded.model_info.num_classes, loaded.model_info.loss) == (0, "softmax")
    images = np.zeros((1, 16, 16, 3), np.float32)
    assert loaded(images).shape == (1, TINY.hidden_dim)


def test_a_thousand_classes_are_those_of_imagenet(tmp_path: Path) -> None:
    weights = random_weights(class_names=tuple(map(str, range(1000))))
    path = save_npz(tmp_path / "Mixer.npz", weights)
    names = load_checkpoint(path).model_info.class_names
    assert (names[0], names[-1], len(set(names))) == ("n01440764", "n15075141", 1000)
    # Unless the file says otherwise.
    write_said(path, {"class_names": list(weights.model_info.class_names)})
    assert load_checkpoint(path).model_info.class_names == weights.model_info.class_names


def test_tokens_that_make_no_square_need_the_image_size(tmp_path: Path) -> None:
    weights = random_weights(image_size=(16, 32))
    path = save_npz(tmp_path / "Mixer.npz", weights)
    message = refusal(path)
    assert mentions(message, "Mixer.npz", "32", "4", "image_size")
    assert mentions(refusal(path, image_size=(16, 16)), "Mixer.npz", "32")
    loaded = load_checkpoint(path, image_size=(16, 32))
    assert loaded.model_info == dataclasses.replace(
        weights.model_info, class_names=(), eval_crop="shorter_side"
    )
    assert_params_equal(loaded.params, weights.params)


def test_a_wanted_size_that_may_be_the_weights_own_needs_the_size_they_were_trained_at(
    tmp_path: Path,
) -> None:
    weights = random_weights(image_size=(8, 32))
    path = save_npz(tmp_path / "Mixer.npz", weights)
    message = refusal(path, image_size=(8, 32))
    assert mentions(message, "Mixer.npz", "16", "4", "8", "32", "pretrain_image_size")
    assert mentions(message, "image_size", "Mixer.npz.json")
    timm = save_timm(tmp_path / "model.safetensors", weights)
    message = refusal(timm, image_size=(8, 32))
    assert mentions(message, "model.safetensors", "input_size", "config.json")

    own = load_checkpoint(path, image_size=(8, 32), pretrain_image_size=(8, 32))
    assert_params_equal(own.params, weights.params)
    assert (own.model_info.image_size, own.model_info.resize_note) == ((8, 32), "")
    other = load_checkpoint(path, image_size=(8, 32), pretrain_image_size=16).model_info
    assert mentions(other.resize_note, "16")
    # Other sizes tell nothing, and what stands beside the file is believed.
    assert mentions(load_checkpoint(path, image_size=(16, 32)).model_info.resize_note, "16")
    write_said(path, {"image_size": [8, 32]})
    assert_params_equal(load_checkpoint(path, image_size=(8, 32)).params, weights.params)
    # But less than the caller.
    assert load_checkpoint(path, pretrain_image_size=16).model_info.image_size == (16, 16)
    message = refusal(path, pretrain_image_size=(16, 32))
    assert mentions(message, "Mixer.npz", "pretrain_image_size", "16", "32", "4")


def test_tokens_that_make_no_square_may_be_told_by_the_size_trained_at(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "Mixer.npz", random_weights(image_size=(16, 32)))
    grown = load_checkpoint(path, pretrain_image_size=(16, 32), image_size=(32, 64)).model_info
    assert grown.image_size == (32, 64)
    assert mentions(grown.resize_note, "16", "32", "Appendix C")


@pytest.mark.parametrize("said", [["one", "two"], "one", [1, 2, 3]], ids=str)
def test_names_that_cannot_be_are_replaced_by_the_callers(said: Any, tmp_path: Path) -> None:
    weights = random_weights(class_names=FEW)
    path = save_npz(tmp_path / "Mixer.npz", weights)
    write_said(path, {"class_names": said})
    assert "Mixer.npz" in refusal(path)
    assert load_checkpoint(path, class_names=FEW).model_info.class_names == FEW
    assert load_pretrained(path, class_names=FEW).model_info.class_names == FEW
    path = save_timm(tmp_path / "model.safetensors", weights)
    (tmp_path / "config.json").write_text(json.dumps({"label_names": said}))
    assert "model.safetensors" in refusal(path)
    assert load_checkpoint(path, class_names=FEW).model_info.class_names == FEW
    assert load_pretrained(path, class_names=FEW).model_info.class_names == FEW


def write_said(path: str, said: Any) -> None:
    Path(f"{path}.json").write_text(json.dumps(said))


def test_the_file_beside_an_archive_is_believed(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "Mixer.npz", random_weights(image_size=(16, 32), class_names=FEW))
    said = {"image_size": [32, 16], "class_names": list(FEW), "gelu": "exact", "loss": "sigmoid"}
    said |= {"eval_crop": "square", "exif_orientation": True, "dtype": "bfloat16"}
    write_said(path, said)
    about = load_checkpoint(path).model_info.to_dict()
    assert {name: about[name] for name in said} == said


@pytest.mark.parametrize(
    ("said", "parts"),
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
        ({"num_classes": 5}, ["num_classes", "5", "3"]),
        ({"variant": "B/16"}, ["variant", "B/16", "custom"]),
        ({"config": {"num_blocks": 2}}, ["config", "{'num_blocks': 2}"]),
        ({"config": [2]}, ["config", "[2]"]),
    ],
)
def test_what_cannot_be_so_is_refused(said: Any, parts: list[str], tmp_path: Path) -> None:
    weights = random_weights(class_names=FEW)
    path = save_npz(tmp_path / "Mixer.npz", weights)
    write_said(path, said)
    assert mentions(refusal(path), "Mixer.npz", *parts)
    # A safetensors file says the same in its header.
    header = {"mixer_jax": json.dumps(said)}
    path = save_timm(tmp_path / "Mixer.safetensors", weights, header)
    assert mentions(refusal(path), "Mixer.safetensors", *parts)


def test_class_names_are_one_for_every_class(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "Mixer.npz", random_weights())
    assert load_pretrained(path, class_names=list("abcdefghij")).model_info.class_names[9] == "j"
    with raises(UserError, "Mixer.npz") as caught:
        load_pretrained(path, class_names=list("abc"))
    assert mentions(str(caught.value).replace(str(tmp_path), ""), "10", "3")


def test_a_variant_may_have_other_widths_if_they_are_said(tmp_path: Path) -> None:
    weights = random_weights(class_names=FEW)
    path = save_npz(tmp_path / "Mixer.npz", weights)
    widths = dataclasses.asdict(weights.model_info.config)
    for said in ({"variant": "B/16", "config": widths}, {"variant": "custom"}, {"num_classes": 3}):
        write_said(path, said)
        assert load_checkpoint(path).model_info.config == weights.model_info.config
