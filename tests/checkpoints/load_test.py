"""Tests of loading a run's checkpoint: what it lacks, what it says, and at another image size."""

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax import config, evaluate
from mixer_jax.checkpoints.load import (
    PretrainedWeights,
    load_checkpoint,
    replace_head,
    resize,
    set_class_names,
)
from mixer_jax.cli import common
from mixer_jax.errors import UserError
from mixer_jax.inference import load_pretrained
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import DIGITS, assert_params_equal, random_weights, save_run

NEW, OLD = 1, 2


@pytest.fixture(scope="module")
def weights() -> PretrainedWeights:
    return random_weights()


@pytest.fixture(scope="module")
def runs(weights: PretrainedWeights, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The same weights twice: saved with all keys, and when there were fewer."""
    made = config.get_default()
    made.preprocess.eval_crop = "resize"
    new, old = made.to_dict(), made.to_dict()
    for section, key in (("preprocess", "exif_orientation"), ("model", "dtype")):
        del old[section][key]
    del old["loader"]
    return {
        kind: save_run(weights, tmp_path_factory.mktemp("run"), config=saved)
        for kind, saved in ((NEW, new), (OLD, old))
    }


def test_a_checkpoint_says_the_defaults_of_keys_that_it_lacks(runs: dict[int, str]) -> None:
    new, old = (load_checkpoint(runs[kind]) for kind in (NEW, OLD))
    assert old.train_config == new.train_config
    assert old.train_config is not None
    # What it does say stands.
    assert old.train_config["preprocess"]["eval_crop"] == "resize"


def test_a_checkpoint_of_before_a_key_existed_is_scored(
    runs: dict[int, str],
    digits_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(common, "configure_jax", lambda compilation_cache: None)

    def scores(run: str) -> dict[str, Any]:
        data = ["--dataset=digits", f"--data_dir={digits_dir}"]
        assert evaluate.main([f"--checkpoint={run}", "--json", *data]) == 0
        return json.loads(capsys.readouterr().out)

    assert scores(runs[OLD]) == scores(runs[NEW]) | {"checkpoint": runs[OLD]}
    assert scores(runs[OLD])["num_examples"] == 360


def test_the_saved_config_itself_is_not_changed() -> None:
    saved: dict[str, Any] = {"model": {"variant": "S/16"}, "mixture": {"a": {"weight": 2.0}}}
    filled = config.fill_defaults(saved)
    assert saved == {"model": {"variant": "S/16"}, "mixture": {"a": {"weight": 2.0}}}
    assert filled["model"]["variant"] == "S/16"
    assert filled["model"]["gelu"] == "tanh"
    assert filled["mixture"] == {"a": {"dataset": "", "split": "train", "weight": 2.0}}
    assert "evals" not in filled


def test_what_a_run_says_comes_back(tmp_path: Path) -> None:
    weights = random_weights(
        image_size=(8, 20), gelu="exact", loss="sigmoid", exif_orientation=True, dtype="bfloat16"
    )
    loaded = load_checkpoint(save_run(weights, tmp_path, step=7))
    assert loaded.model_info == weights.model_info
    assert loaded.step == 7
    assert loaded.train_config is None
    assert_params_equal(loaded.params, weights.params)


def test_the_caller_has_the_last_word(runs: dict[int, str]) -> None:
    about = load_checkpoint(runs[NEW], gelu="exact", eval_crop="square").model_info
    assert (about.gelu, about.eval_crop) == ("exact", "square")
    names = tuple("abcdefghij")
    assert (
        load_checkpoint(runs[NEW], class_names=names, pretrain_image_size=16).model_info.class_names
        == names
    )


@pytest.mark.parametrize(
    ("about", "parts"),
    [
        ({}, []),
        ({"gelu": "relu"}, ["gelu", "relu", "tanh", "exact"]),
        ({"image_size": [16]}, ["image_size", "[16]"]),
        ({"class_names": "abc"}, ["class_names"]),
        ({"resize_note": 3}, ["resize_note", "3"]),
    ],
)
def test_a_run_that_says_nonsense_is_refused(
    weights: PretrainedWeights, tmp_path: Path, about: dict[str, Any], parts: list[str]
) -> None:
    told = weights.model_info.to_dict() | about if about else {}
    run = save_run(weights, tmp_path / "other", model_info=told)
    with raises(UserError, run) as caught:
        load_checkpoint(run)
    assert mentions(str(caught.value).replace(run, ""), *parts)


def test_an_image_size_resizes_and_says_so(
    runs: dict[int, str], weights: PretrainedWeights
) -> None:
    grown = load_checkpoint(runs[NEW], image_size=32)
    assert grown.model_info.image_size == (32, 32)
    assert mentions(grown.model_info.resize_note, "16", "Appendix C")
    other = load_checkpoint(runs[NEW], image_size=(20, 16))
    assert mentions(other.model_info.resize_note, "16")
    assert "Appendix C" not in other.model_info.resize_note
    assert mentions(other.model_info.name, "Mixer-custom", "20", "16")
    # From the first size, and from the second.
    again = resize(other, (32, 16)).model_info.resize_note
    assert sorted(re.findall(r"\d+", again)) == ["16", "16", "20"]
    assert load_checkpoint(runs[NEW], image_size=16).model_info == weights.model_info
    with raises(UserError, "image_size", "18", "patch_size", "4"):
        load_checkpoint(runs[NEW], image_size=18)


@pytest.mark.parametrize("side", [100_000, 100_001 * 4], ids=["grown", "interpolated"])
def test_a_size_beyond_the_machines_memory_is_refused_before_any_is_taken(
    side: int, weights: PretrainedWeights
) -> None:
    with raises(UserError, str(side), "image_size") as caught:
        resize(weights, (side, side))
    # What it would take, and what there is.
    assert len(re.findall(r"\d Gi?B\b", str(caught.value))) == 2


def test_a_machine_that_does_not_tell_its_memory_is_taken_to_have_64_gib(
    weights: PretrainedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.sysconf")
    with raises(UserError, "68 GB"):
        resize(weights, (100_000, 100_000))
    assert resize(weights, (32, 32)).model_info.image_size == (32, 32)


@pytest.mark.parametrize(
    "size", [32, [32, 32], (np.int64(32), 32), np.int32(32)], ids=lambda size: type(size).__name__
)
def test_an_image_size_may_be_of_any_whole_type(size: Any, runs: dict[int, str]) -> None:
    about = load_checkpoint(runs[NEW], image_size=size).model_info
    assert about.image_size == (32, 32)
    assert {type(side) for side in about.image_size} == {int}


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
def test_a_wrong_argument_is_told_in_one_line(
    arguments: dict[str, Any], parts: list[str], runs: dict[int, str]
) -> None:
    with pytest.raises(UserError) as caught:
        unchecked(load_checkpoint)(**{"source": runs[NEW], **arguments})
    # The path may have numbers in it.
    message = str(caught.value).replace(runs[NEW], "")
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
def test_a_wrong_argument_of_load_pretrained_is_told_before_anything_is_read(
    arguments: dict[str, Any], parts: list[str]
) -> None:
    with raises(UserError, *parts) as caught:
        unchecked(load_pretrained)(**{"source": "nothing there", **arguments})
    assert "\n" not in str(caught.value)


def unchecked(function: Callable) -> Callable:
    """A function without the types that tests check at every call, as users call it."""
    return inspect.unwrap(function)


def test_a_source_may_be_a_path(runs: dict[int, str], weights: PretrainedWeights) -> None:
    assert_params_equal(load_checkpoint(Path(runs[NEW])).params, weights.params)
    names = list("abcdefghij")
    classifier = load_pretrained(Path(runs[NEW]), class_names=names, num_classes=10)
    assert classifier.model_info.class_names == tuple(names)


def test_heads_and_names(weights: PretrainedWeights) -> None:
    new = replace_head(weights, 3, bias=-2.0, loss="sigmoid")
    assert new.model_info.num_classes == 3
    assert (new.model_info.class_names, new.model_info.loss) == ((), "sigmoid")
    assert not new.params["head"]["kernel"].any()
    np.testing.assert_array_equal(new.params["head"]["bias"], np.full(3, -2.0, np.float32))
    assert "head" not in replace_head(weights, 0).params
    assert weights.model_info.class_names == DIGITS
    named = set_class_names(new, ["a", "b", "c"], "x")
    assert named.model_info.class_names == ("a", "b", "c")
    with raises(UserError, "x", "3", "2"):
        set_class_names(new, ["a", "b"], "x")
