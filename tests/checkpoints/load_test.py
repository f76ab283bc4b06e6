"""Tests of loading checkpoints of runs: metadata, overrides, other image sizes, other heads."""

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax import config, evaluate
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.weights import (
    PretrainedWeights,
    replace_head,
    resize,
    set_class_names,
)
from mixer_jax.cli import common
from mixer_jax.errors import UserError
from mixer_jax.inference import load_pretrained
from mixer_jax.models.vit_config import VitConfig
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import DIGITS, assert_params_equal, random_weights, save_run


@pytest.fixture(scope="module")
def weights() -> PretrainedWeights:
    return random_weights()


@pytest.fixture(scope="module")
def run(weights: PretrainedWeights, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Workdir of a run that saved its whole config."""
    saved = config.get_default()
    saved.preprocess.eval_crop = "resize"
    return save_run(weights, tmp_path_factory.mktemp("run"), config=saved.to_dict())


@pytest.fixture(scope="module")
def old_run(weights: PretrainedWeights, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Workdir of the same run, saved by a version with fewer config keys."""
    saved = config.get_default()
    saved.preprocess.eval_crop = "resize"
    saved = saved.to_dict()
    for section, key in (("preprocess", "exif_orientation"), ("model", "dtype")):
        del saved[section][key]
    del saved["loader"]
    return save_run(weights, tmp_path_factory.mktemp("old_run"), config=saved)


def test_missing_config_keys_get_their_defaults(run: str, old_run: str) -> None:
    old_config = load_checkpoint(old_run).train_config
    assert old_config is not None
    assert old_config == load_checkpoint(run).train_config
    assert old_config["preprocess"]["eval_crop"] == "resize"


def test_a_checkpoint_with_fewer_config_keys_can_be_evaluated(
    run: str,
    old_run: str,
    digits_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(common, "configure_jax", lambda compilation_cache: None)

    def metrics(workdir: str) -> dict[str, Any]:
        data = ["--dataset=digits", f"--data_dir={digits_dir}"]
        assert evaluate.main([f"--checkpoint={workdir}", "--json", *data]) == 0
        return json.loads(capsys.readouterr().out)

    assert metrics(old_run) == metrics(run) | {"checkpoint": old_run}
    assert metrics(old_run)["num_examples"] == 360


def test_fill_defaults_does_not_change_its_argument() -> None:
    saved: dict[str, Any] = {"model": {"variant": "S/16"}, "mixture": {"a": {"weight": 2.0}}}
    filled = config.fill_defaults(saved)
    assert saved == {"model": {"variant": "S/16"}, "mixture": {"a": {"weight": 2.0}}}
    assert filled["model"]["variant"] == "S/16"
    assert filled["model"]["gelu"] == "tanh"
    assert filled["mixture"] == {"a": {"dataset": "", "split": "train", "weight": 2.0}}
    assert "evals" not in filled


def test_load_checkpoint_restores_model_info_and_params(tmp_path: Path) -> None:
    weights = random_weights(
        image_size=(8, 20), gelu="exact", loss="sigmoid", exif_orientation=True, dtype="bfloat16"
    )
    loaded = load_checkpoint(save_run(weights, tmp_path, step=7))
    assert loaded.model_info == weights.model_info
    assert loaded.step == 7
    assert loaded.train_config is None
    assert_params_equal(loaded.params, weights.params)


def test_arguments_override_metadata(run: str) -> None:
    info = load_checkpoint(run, gelu="exact", eval_crop="square").model_info
    assert (info.gelu, info.eval_crop) == ("exact", "square")
    names = tuple("abcdefghij")
    info = load_checkpoint(run, class_names=names, pretrain_image_size=16).model_info
    assert info.class_names == names


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({}, []),
        ({"gelu": "relu"}, ["gelu", "relu", "tanh", "exact"]),
        ({"image_size": [16]}, ["image_size", "[16]"]),
        ({"class_names": "abc"}, ["class_names"]),
        ({"resize_note": 3}, ["resize_note", "3"]),
        ({"family": "resnet"}, ["family", "resnet", "mixer"]),
        ({"config": {"num_blocks": 2}}, ["patch_size"]),
    ],
)
def test_invalid_model_info_is_rejected(
    weights: PretrainedWeights, tmp_path: Path, fields: dict[str, Any], parts: list[str]
) -> None:
    model_info = weights.model_info.to_dict() | fields if fields else {}
    workdir = save_run(weights, tmp_path / "other", model_info=model_info)
    with raises(UserError, workdir) as caught:
        load_checkpoint(workdir)
    assert mentions(str(caught.value).replace(workdir, ""), *parts)


def test_resize_changes_model_info(run: str, weights: PretrainedWeights) -> None:
    tiled = load_checkpoint(run, image_size=32)
    assert tiled.model_info.image_size == (32, 32)
    assert mentions(tiled.model_info.resize_note, "16", "Appendix C")
    interpolated = load_checkpoint(run, image_size=(20, 16))
    assert mentions(interpolated.model_info.resize_note, "16")
    assert "Appendix C" not in interpolated.model_info.resize_note
    assert mentions(interpolated.model_info.name, "Mixer-custom", "20", "16")
    # Resized twice: from the first size, and from the second.
    note = resize(interpolated, (32, 16)).model_info.resize_note
    assert sorted(re.findall(r"\d+", note)) == ["16", "16", "20"]
    assert load_checkpoint(run, image_size=16).model_info == weights.model_info
    with raises(UserError, "image_size", "18", "patch_size", "4"):
        load_checkpoint(run, image_size=18)


@pytest.mark.parametrize("side", [100_000, 100_001 * 4], ids=["tiled", "interpolated"])
def test_resize_checks_memory_before_it_allocates(side: int, weights: PretrainedWeights) -> None:
    with raises(UserError, str(side), "image_size") as caught:
        resize(weights, (side, side))
    # What is needed, and what the machine has.
    assert len(re.findall(r"\d Gi?B\b", str(caught.value))) == 2


def test_memory_limit_defaults_to_64_gib(
    weights: PretrainedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.sysconf")
    with raises(UserError, "68 GB"):
        resize(weights, (100_000, 100_000))
    assert resize(weights, (32, 32)).model_info.image_size == (32, 32)


@pytest.mark.parametrize(
    "size", [32, [32, 32], (np.int64(32), 32), np.int32(32)], ids=lambda size: type(size).__name__
)
def test_image_size_can_have_any_integer_type(size: Any, run: str) -> None:
    image_size = load_checkpoint(run, image_size=size).model_info.image_size
    assert image_size == (32, 32)
    assert {type(length) for length in image_size} == {int}


def unchecked(function: Callable) -> Callable:
    """Returns a function without the type checks of the test suite, as users call it."""
    return inspect.unwrap(function)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"image_size": (3, 32, 32)}, ["image_size", "(3, 32, 32)"]),
        ({"image_size": "224"}, ["image_size", "224"]),
        ({"image_size": ("a", "b")}, ["image_size", "('a', 'b')"]),
        ({"image_size": 22.4}, ["image_size", "22.4"]),
        ({"image_size": 0}, ["image_size", "0"]),
        ({"image_size": (16, -16)}, ["image_size", "(16, -16)"]),
        ({"pretrain_image_size": "16"}, ["pretrain_image_size", "16"]),
        ({"pretrain_image_size": 32}, ["pretrain_image_size", "16", "32"]),
        ({"class_names": "0123456789"}, ["class_names"]),
        ({"class_names": [1, 2]}, ["class_names"]),
        ({"class_names": ["one"]}, ["10", "1"]),
        ({"source": None}, ["source", "None", "hf:OWNER/NAME"]),
        ({"gelu": "fast"}, ["gelu", "fast", "tanh", "exact"]),
    ],
)
def test_load_checkpoint_rejects_invalid_arguments(
    arguments: dict[str, Any], parts: list[str], run: str
) -> None:
    with pytest.raises(UserError) as caught:
        unchecked(load_checkpoint)(**{"source": run, **arguments})
    message = str(caught.value).replace(run, "")  # Its path can contain numbers.
    assert mentions(message, *parts)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"num_classes": -1}, ["num_classes", "-1", "0"]),
        ({"num_classes": 2.5}, ["num_classes", "2.5"]),
        ({"num_classes": "10"}, ["num_classes", "10"]),
        ({"dtype": "int8"}, ["dtype", "int8", "auto", "float32", "bfloat16"]),
        ({"dtype": np.float16}, ["dtype", "numpy.float16"]),
        ({"class_names": "ab", "num_classes": 2}, ["class_names"]),
        ({"image_size": (3, 32, 32)}, ["image_size", "(3, 32, 32)"]),
    ],
)
def test_load_pretrained_checks_arguments_before_it_reads(
    arguments: dict[str, Any], parts: list[str]
) -> None:
    with raises(UserError, *parts) as caught:
        unchecked(load_pretrained)(**{"source": "nothing there", **arguments})
    assert "\n" not in str(caught.value)


def test_source_can_be_a_path(run: str, weights: PretrainedWeights) -> None:
    assert_params_equal(load_checkpoint(Path(run)).params, weights.params)
    names = list("abcdefghij")
    classifier = load_pretrained(Path(run), class_names=names, num_classes=10)
    assert classifier.model_info.class_names == tuple(names)


def test_replace_head_starts_from_zeros(weights: PretrainedWeights) -> None:
    replaced = replace_head(weights, 3, bias=-2.0, loss="sigmoid")
    info = replaced.model_info
    assert (info.num_classes, info.class_names, info.loss) == (3, (), "sigmoid")
    assert replaced.params["head"]["kernel"].shape == (16, 3)
    assert not replaced.params["head"]["kernel"].any()
    np.testing.assert_array_equal(replaced.params["head"]["bias"], np.full(3, -2.0, np.float32))
    assert "head" not in replace_head(weights, 0).params
    # The argument is unchanged.
    assert weights.model_info.class_names == DIGITS
    assert weights.params["head"]["kernel"].any()


def test_replace_head_drops_the_hidden_layer_of_a_head() -> None:
    weights = random_weights(VitConfig(1, 4, 16, 24, 2, pre_logits=True))
    replaced = replace_head(weights, 3)
    assert "pre_logits" not in replaced.params
    assert not replaced.model_info.config.pre_logits
    # Without a new head, its output is the features.
    assert "pre_logits" in replace_head(weights, 0).params
    assert replace_head(weights, 0).model_info.config.pre_logits


def test_set_class_names_needs_one_name_per_class(weights: PretrainedWeights) -> None:
    weights = replace_head(weights, 3)
    assert set_class_names(weights, ["a", "b", "c"], "x").model_info.class_names == ("a", "b", "c")
    with raises(UserError, "x", "3", "2"):
        set_class_names(weights, ["a", "b"], "x")
