"""Tests of `python -m mixer_jax.evaluate`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from mixer_jax import evaluate
from mixer_jax.checkpoints.weights import PretrainedWeights, replace_head, resize
from mixer_jax.cli import common
from mixer_jax.errors import UserError
from mixer_jax.inference import Classifier
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import random_weights, save_npz, save_run

NAMES = ("ant", "bee", "cat", "dog")
COUNT = 12
# Several correct classes, one, or none.
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
    """A few images with one label each."""

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
    """The same images with ReaL labels."""

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
def keep_jax_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps JAX's settings when the command runs in this process."""
    monkeypatch.setattr(common, "configure_jax", lambda compilation_cache: None)


def predict(weights: PretrainedWeights) -> list[int]:
    """Predicts the class of each image without the code under test."""
    height, width = weights.model_info.image_size
    images = [cv2.resize(image(index), (width, height)) for index in range(COUNT)]
    pixels = np.stack(images).astype(np.float32) / 127.5 - 1.0
    return np.asarray(Classifier(weights)(pixels)).argmax(1).tolist()


def evaluate_json(
    checkpoint: str, data_dir: str, capsys: pytest.CaptureFixture[str], *flags: str
) -> dict[str, Any]:
    data = [f"--data_dir={data_dir}", "--dataset=mixer_scored", "--split=validation", "--json"]
    assert evaluate.main([f"--checkpoint={checkpoint}", *data, *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_with_real_labels(
    weights: PretrainedWeights, data_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(weights, tmp_path)
    result = evaluate_json(run, data_dir, capsys, "--real")
    predictions = predict(weights)
    is_correct = [predicted == index % 4 for index, predicted in enumerate(predictions)]
    assert result["top1"] == pytest.approx(np.mean(is_correct))
    assert result["num_examples"] == COUNT
    labeled = [
        (predicted, labels) for predicted, labels in zip(predictions, REAL, strict=True) if labels
    ]
    real = result["real"]
    assert real["top1"] == pytest.approx(
        np.mean([predicted in labels for predicted, labels in labeled])
    )
    assert real["num_examples"] == len(labeled) < COUNT
    assert real["num_unlabeled"] == COUNT - len(labeled)
    assert "real" not in evaluate_json(run, data_dir, capsys)

    data = [f"--data_dir={data_dir}", "--dataset=mixer_scored", "--split=validation"]
    assert evaluate.main([f"--checkpoint={run}", *data, "--real"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert any(mentions(line, "ReaL", f"{real['top1']:.2%}") for line in table)
    # Examples counted and skipped.
    counts = (str(len(labeled)), str(COUNT - len(labeled)))
    assert any(mentions(line, *counts) for line in table)


def test_evaluate_published_weights(
    weights: PretrainedWeights, data_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_npz(weights, tmp_path / "named.npz", weights.model_info.to_dict())
    result = evaluate_json(path, data_dir, capsys)
    assert result["top1"] == pytest.approx(
        np.mean([predicted == index % 4 for index, predicted in enumerate(predict(weights))])
    )
    assert (result["step"], result["image_size"], result["resolution"]) == (None, [16, 16], "")
    # Without names, the classes are the dataset's if their numbers agree.
    nameless = save_npz(weights, tmp_path / "nameless.npz", {"eval_crop": "resize"})
    assert evaluate_json(nameless, data_dir, capsys)["top1"] == result["top1"]
    three = random_weights(class_names=("1", "2", "3"))
    fewer = save_npz(three, tmp_path / "fewer.npz", {})
    with pytest.raises(UserError) as caught:
        evaluate_json(fewer, data_dir, capsys)
    # The path may have numbers in it.
    assert mentions(str(caught.value).replace(str(tmp_path), ""), "fewer.npz", "4", "3")
    headless = save_npz(replace_head(weights, 0), tmp_path / "headless.npz", {})
    with raises(UserError, headless, "head"):
        evaluate_json(headless, data_dir, capsys)
    zeroed = save_npz(replace_head(weights, 4), tmp_path / "zeroed.npz", {})
    with raises(UserError, zeroed, "head", "zeros", "--config.init_from", "--suite=few_shot"):
        evaluate_json(zeroed, data_dir, capsys)
    with raises(UserError, path, "--dataset"):
        evaluate.main([f"--checkpoint={path}"])


def test_evaluate_at_another_image_size(
    weights: PretrainedWeights, data_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate_json(save_run(weights, tmp_path), data_dir, capsys, "--image_size=32x48")
    assert result["image_size"] == [32, 48]
    assert mentions(result["resolution"], "16")
    assert "Appendix C" not in result["resolution"]
    predictions = predict(resize(weights, (32, 48)))
    assert result["top1"] == pytest.approx(np.mean([p == i % 4 for i, p in enumerate(predictions)]))


def test_evaluate_in_the_requested_dtype(
    weights: PretrainedWeights, data_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(weights, tmp_path)
    exact, rounded = (
        evaluate_json(run, data_dir, capsys, *flags) for flags in ([], ["--dtype=bfloat16"])
    )
    assert exact == evaluate_json(run, data_dir, capsys, "--dtype=float32")
    assert rounded["log_likelihood"] != exact["log_likelihood"]
    assert rounded["log_likelihood"] == pytest.approx(exact["log_likelihood"], rel=0.02)


def test_evaluate_names_the_missing_real_data_set(
    weights: PretrainedWeights, digits_dir: str, tmp_path: Path
) -> None:
    run = save_run(random_weights(), tmp_path)
    arguments = [f"--checkpoint={run}", f"--data_dir={digits_dir}", "--dataset=digits", "--real"]
    with raises(UserError, "digits_real"):
        evaluate.main(arguments)
