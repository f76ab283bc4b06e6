"""Tests of `python -m mixer_jax.evaluate` with weights and data of every kind."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from mixer_jax import evaluate
from mixer_jax.checkpoints.formats.npz import write_npz
from mixer_jax.checkpoints.layouts import GOOGLE, layout_views
from mixer_jax.checkpoints.load import PretrainedWeights, replace_head, resize
from mixer_jax.checkpoints.tree import flatten
from mixer_jax.cli import common
from mixer_jax.errors import UserError
from mixer_jax.inference import Classifier
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import random_weights, save_run

NAMES = ("ant", "bee", "cat", "dog")
COUNT = 12
# Several right answers, one, or none.
REAL = [
    [index % 4, (index + 1) % 4] if index % 3 == 0 else [2][: index % 3 - 1]
    for index in range(COUNT)
]
LABEL = tfds.features.ClassLabel(names=NAMES)


def image(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)


def encoded(index: int) -> bytes:
    return cv2.imencode(".png", image(index)[..., ::-1])[1].tobytes()


class MixerScored(tfds.core.GeneratorBasedBuilder):
    """Some images with their labels."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES: ClassVar[Any] = {"image": tfds.features.Image(shape=(None, None, 3)), "label": LABEL}

    def _info(self) -> Any:
        features = tfds.features.FeaturesDict(self.FEATURES)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"validation": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(COUNT):
            example = {"label": index % 4, "original_label": index % 4, "real_label": REAL[index]}
            example |= {"image": encoded(index), "file_name": f"{index}.JPEG"}
            yield index, {name: example[name] for name in self.FEATURES}


class MixerScoredReal(MixerScored):
    """The same images with ReaL's labels."""

    FEATURES: ClassVar[Any] = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "original_label": LABEL,
        "real_label": tfds.features.Sequence(LABEL),
        "file_name": tfds.features.Text(),
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tfds")
    for name in ("mixer_scored", "mixer_scored_real"):
        builder = tfds.builder(name, data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
    return str(folder)


@pytest.fixture(scope="module")
def weights() -> PretrainedWeights:
    return random_weights(class_names=NAMES)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The door in this process keeps the settings of the tests."""
    monkeypatch.setattr(common, "configure_jax", lambda compilation_cache: None)


def answers(weights: PretrainedWeights) -> list[int]:
    """What the model says of each image, without any of the code that scores."""
    height, width = weights.model_info.image_size
    images = [cv2.resize(image(index), (width, height)) for index in range(COUNT)]
    pixels = np.stack(images).astype(np.float32) / 127.5 - 1.0
    return np.asarray(Classifier(weights)(pixels)).argmax(1).tolist()


def score(
    source: str, data_dir: str, capsys: pytest.CaptureFixture[str], *arguments: str
) -> dict[str, Any]:
    data = [f"--data_dir={data_dir}", "--dataset=mixer_scored", "--split=validation", "--json"]
    assert evaluate.main([f"--checkpoint={source}", *data, *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def export(weights: PretrainedWeights, path: Path, said: dict[str, Any]) -> str:
    write_npz(str(path), layout_views(dict(flatten(weights.params)), GOOGLE), said)
    return str(path)


def test_real_labels_are_scored_beside_the_first_ones(
    weights: PretrainedWeights, data_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(weights, tmp_path)
    told = score(run, data_dir, capsys, "--real")
    said = answers(weights)
    right = [answer == index % 4 for index, answer in enumerate(said)]
    assert told["top1"] == pytest.approx(np.mean(right))
    assert told["num_examples"] == COUNT
    labelled = [(answer, real) for answer, real in zip(said, REAL, strict=True) if real]
    real = told["real"]
    assert real["top1"] == pytest.approx(np.mean([answer in ok for answer, ok in labelled]))
    assert real["num_examples"] == len(labelled) < COUNT
    assert real["num_unlabelled"] == COUNT - len(labelled)
    assert "real" not in score(run, data_dir, capsys)

    data = [f"--data_dir={data_dir}", "--dataset=mixer_scored", "--split=validation"]
    assert evaluate.main([f"--checkpoint={run}", *data, "--real"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert any(mentions(line, "ReaL", f"{real['top1']:.2%}") for line in table)
    # Those that count, and those that are left out.
    counts = (str(len(labelled)), str(COUNT - len(labelled)))
    assert any(mentions(line, *counts) for line in table)


def test_published_weights_are_scored_as_what_they_are(
    weights: PretrainedWeights, data_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = export(weights, tmp_path / "named.npz", weights.model_info.to_dict())
    told = score(path, data_dir, capsys)
    assert told["top1"] == pytest.approx(
        np.mean([answer == index % 4 for index, answer in enumerate(answers(weights))])
    )
    assert (told["step"], told["image_size"], told["resolution"]) == (None, [16, 16], "")
    # Without names, classes are taken to be the data's, if they are as many.
    nameless = export(weights, tmp_path / "nameless.npz", {"eval_crop": "resize"})
    assert score(nameless, data_dir, capsys)["top1"] == told["top1"]
    fewer = export(replace_head(weights, 3), tmp_path / "fewer.npz", {})
    with pytest.raises(UserError) as caught:
        score(fewer, data_dir, capsys)
    # The path may have numbers in it.
    assert mentions(str(caught.value).replace(str(tmp_path), ""), "fewer.npz", "4", "3")
    headless = export(replace_head(weights, 0), tmp_path / "headless.npz", {})
    with raises(UserError, headless, "head"):
        score(headless, data_dir, capsys)
    with raises(UserError, path, "--dataset"):
        evaluate.main([f"--checkpoint={path}"])


def test_another_image_size(
    weights: PretrainedWeights, data_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = score(save_run(weights, tmp_path), data_dir, capsys, "--image_size=32x48")
    assert told["image_size"] == [32, 48]
    assert mentions(told["resolution"], "16")
    assert "Appendix C" not in told["resolution"]
    said = answers(resize(weights, (32, 48)))
    assert told["top1"] == pytest.approx(np.mean([a == i % 4 for i, a in enumerate(said)]))


def test_in_the_type_that_is_asked_for(
    weights: PretrainedWeights, data_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(weights, tmp_path)
    exact, rounded = (
        score(run, data_dir, capsys, *arguments) for arguments in ([], ["--dtype=bfloat16"])
    )
    assert exact == score(run, data_dir, capsys, "--dtype=float32")
    assert rounded["log_likelihood"] != exact["log_likelihood"]
    assert rounded["log_likelihood"] == pytest.approx(exact["log_likelihood"], rel=0.02)


def test_a_set_without_real_labels_says_so(
    weights: PretrainedWeights, digits_dir: str, tmp_path: Path
) -> None:
    run = save_run(random_weights(), tmp_path)
    arguments = [f"--checkpoint={run}", f"--data_dir={digits_dir}", "--dataset=digits", "--real"]
    with raises(UserError, "digits_real"):
        evaluate.main(arguments)
