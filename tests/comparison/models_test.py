"""Tests of the models of a comparison as a user names them."""

from pathlib import Path

import pytest

from mixer_jax.comparison.models import ModelSource, parse_models
from mixer_jax.errors import UserError
from tests.helpers.messages import mentions


def test_models_are_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "a=b").mkdir()
    arguments = [
        "digits:low",
        "configs/digits.py",
        "Mixer-B/16",
        "runs/x",
        "runs/y/checkpoints/7",
        "weights/Mixer-L_16.npz",
        "hf:timm/mixer_b16",
        "mine",
        "a=b",
        "small=digits:high",
        "zoo/model.safetensors",
    ]
    assert parse_models(arguments) == (
        ModelSource("digits_low", "config", "digits:low"),
        ModelSource("digits", "config", "configs/digits.py"),
        ModelSource("Mixer-B/16", "architecture", "Mixer-B/16"),
        ModelSource("x", "checkpoint", "runs/x"),
        ModelSource("y_7", "checkpoint", "runs/y/checkpoints/7"),
        ModelSource("Mixer-L_16", "checkpoint", "weights/Mixer-L_16.npz"),
        ModelSource("mixer_b16", "checkpoint", "hf:timm/mixer_b16"),
        ModelSource("mine", "checkpoint", "mine"),
        ModelSource("a=b", "checkpoint", "a=b"),
        ModelSource("small", "config", "digits:high"),
        ModelSource("zoo", "checkpoint", "zoo/model.safetensors"),
    )


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["digts"], ["digts", "Did you mean digits"]),
        (["Mixer-B/61"], ["Mixer-B/61", "Did you mean Mixer-B/16"]),
        (["none.py"], ["none.py", "does not exist"]),
        (["configs/digts.py"], ["digts.py", "digits.py"]),
        (["digits", "digits"], ["'digits' twice", "LABEL=MODEL"]),
        (["=digits"], ["LABEL=MODEL"]),
        (["results.csv=digits"], ["results.csv", "LABEL=MODEL"]),
        (["a=digits", "runs/a"], ["'a' twice"]),
    ],
)
def test_errors_name_the_model(arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse_models(arguments)
    assert mentions(str(error.value), *parts)


def test_folders_are_in_the_workdir() -> None:
    labels = ("..", ".", ".hidden", "a..b")
    models = parse_models([f"{label}=digits" for label in labels[1:]])
    assert [model.folder for model in models] == ["_", "_hidden", "a..b"]
    assert parse_models(["..=digits"])[0].folder == "_"


def test_labels_with_the_same_folder_are_refused() -> None:
    with pytest.raises(UserError, match="'a b' and 'a_b'"):
        parse_models(["a b=digits", "a_b=digits"])
