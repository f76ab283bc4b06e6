"""Tests of loading a run's checkpoint: what it lacks, what it says, and at another image size."""

import inspect
import json
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
    assert old.config == new.config
    assert old.config is not None
    # What it does say stands.
    assert old.config["preprocess"]["eval_crop"] == "resize"


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
    assert loaded.about == weights.about
    assert loaded.step == 7
    assert loaded.config is None
    assert_params_equal(loaded.params, weights.params)


def test_the_caller_has_the_last_word(runs: dict[int, str]) -> None:
    about = load_checkpoint(runs[NEW], gelu="exact", eval_crop="square").about
    assert (about.gelu, about.eval_crop) == ("exact", "square")
    names = tuple("abcdefghij")
    assert (
        load_checkpoint(runs[NEW], class_names=names, pretrain_image_size=16).about.class_names
        == names
    )


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({}, "does not say what its weights are"),
        ({"gelu": "relu"}, "says gelu='relu'; it can be tanh or exact"),
        ({"image_size": [16]}, r"says image_size=\[16\]; it is two whole numbers"),
        ({"class_names": "abc"}, "says class_names that are no list"),
        ({"resolution": 3}, "says resolution=3; it is a text"),
    ],
)
def test_a_run_that_says_nonsense_is_refused(
    weights: PretrainedWeights, tmp_path: Path, about: dict[str, Any], message: str
) -> None:
    told = weights.about.to_json() | about if about else {}
    run = save_run(weights, tmp_path / "other", about=told)
    with pytest.raises(UserError, match=message):
        load_checkpoint(run)


def test_an_image_size_resizes_and_says_so(
    runs: dict[int, str], weights: PretrainedWeights
) -> None:
    grown = load_checkpoint(runs[NEW], image_size=32)
    assert grown.about.image_size == (32, 32)
    assert grown.about.resolution == "grown from 16 px (the paper's Appendix C)"
    other = load_checkpoint(runs[NEW], image_size=(20, 16))
    assert other.about.resolution == "interpolated from 16 px, which the paper does not do"
    assert other.about.name == "Mixer-custom at 20 × 16 px"
    again = resize(other, (32, 16)).about.resolution
    assert again.count("interpolated from") == 2
    assert load_checkpoint(runs[NEW], image_size=16).about == weights.about
    with pytest.raises(UserError, match="image_size 18 is not divisible by patch_size 4"):
        load_checkpoint(runs[NEW], image_size=18)


@pytest.mark.parametrize("side", [100_000, 100_001 * 4], ids=["grown", "interpolated"])
def test_a_size_beyond_the_machines_memory_is_refused_before_any_is_taken(
    side: int, weights: PretrainedWeights
) -> None:
    message = rf"at {side} px would take [\d,]+ GB .* this machine has [\d,]+ GB; pass a smaller"
    with pytest.raises(UserError, match=message):
        resize(weights, (side, side))


def test_a_machine_that_does_not_tell_its_memory_is_taken_to_have_64_gib(
    weights: PretrainedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.sysconf")
    with pytest.raises(UserError, match="this machine has 68 GB"):
        resize(weights, (100_000, 100_000))
    assert resize(weights, (32, 32)).about.image_size == (32, 32)


@pytest.mark.parametrize(
    "size", [32, [32, 32], (np.int64(32), 32), np.int32(32)], ids=lambda size: type(size).__name__
)
def test_an_image_size_may_be_of_any_whole_type(size: Any, runs: dict[int, str]) -> None:
    about = load_checkpoint(runs[NEW], image_size=size).about
    assert about.image_size == (32, 32)
    assert {type(side) for side in about.image_size} == {int}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": (3, 32, 32)}, r"image_size=\(3, 32, 32\) is no size; pass a side or"),
        ({"image_size": "224"}, "image_size='224' is no size"),
        ({"image_size": ("a", "b")}, "is no size"),
        ({"image_size": 22.4}, "image_size=22.4 is no size"),
        ({"image_size": 0}, "image_size=0 is no size"),
        ({"image_size": (16, -16)}, r"image_size=\(16, -16\) is no size"),
        ({"pretrain_image_size": "16"}, "pretrain_image_size='16' is no size"),
        (
            {"pretrain_image_size": 32},
            r"was trained at 16 px; leave out pretrain_image_size=\(32, 32\)",
        ),
        ({"class_names": "0123456789"}, "the caller says class_names that are no list of texts"),
        ({"class_names": [1, 2]}, "the caller says class_names that are no list of texts"),
        ({"class_names": ["one"]}, "has 10 classes, and 1 names are given"),
        ({"source": None}, "source=None names no weights; pass a path, a URL or hf:OWNER/NAME"),
        ({"gelu": "fast"}, "the caller says gelu='fast'; it can be tanh or exact"),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(
    arguments: dict[str, Any], message: str, runs: dict[int, str]
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        unchecked(load_checkpoint)(**{"source": runs[NEW], **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": -1}, "num_classes=-1 is no number of classes; pass 0 or more"),
        ({"num_classes": 2.5}, "num_classes=2.5 is no number"),
        ({"num_classes": "10"}, "num_classes='10' is no number"),
        ({"dtype": "int8"}, "says dtype='int8'; it can be auto or float32 or bfloat16"),
        ({"dtype": np.float16}, "says dtype=<class 'numpy.float16'>"),
        ({"class_names": "ab", "num_classes": 2}, "says class_names that are no list of texts"),
        ({"image_size": (3, 32, 32)}, "is no size"),
    ],
)
def test_a_wrong_argument_of_load_pretrained_is_told_before_anything_is_read(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        unchecked(load_pretrained)(**{"source": "nothing there", **arguments})
    assert "\n" not in str(caught.value)


def unchecked(function: Callable) -> Callable:
    """A function without the types that tests check at every call, as users call it."""
    return inspect.unwrap(function)


def test_a_source_may_be_a_path(runs: dict[int, str], weights: PretrainedWeights) -> None:
    assert_params_equal(load_checkpoint(Path(runs[NEW])).params, weights.params)
    names = list("abcdefghij")
    classifier = load_pretrained(Path(runs[NEW]), class_names=names, num_classes=10)
    assert classifier.about.class_names == tuple(names)


def test_heads_and_names(weights: PretrainedWeights) -> None:
    new = replace_head(weights, 3, bias=-2.0, loss="sigmoid")
    assert new.about.num_classes == 3
    assert (new.about.class_names, new.about.loss) == ((), "sigmoid")
    assert not new.params["head"]["kernel"].any()
    np.testing.assert_array_equal(new.params["head"]["bias"], np.full(3, -2.0, np.float32))
    assert "head" not in replace_head(weights, 0).params
    assert weights.about.class_names == DIGITS
    named = set_class_names(new, ["a", "b", "c"], "x")
    assert named.about.class_names == ("a", "b", "c")
    with pytest.raises(UserError, match="x has 3 classes, and 2 names are given"):
        set_class_names(new, ["a", "b"], "x")
