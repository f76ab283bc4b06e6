"""Tests of runs on images with any number of labels, and of runs with class weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.config.schema import EvalConfig, RunConfig
from mixer_jax.errors import UserError
from mixer_jax.evaluation.multi_label import MultiLabelMetrics
from mixer_jax.inference import load_pretrained
from mixer_jax.training import loop
from mixer_jax.training.loop import train_and_evaluate
from mixer_jax.training.metrics import read_metrics
from tests.helpers import shapes
from tests.helpers.images import encode
from tests.helpers.lines import some_line_mentions
from tests.helpers.messages import raises
from tests.helpers.processes import final_arrays, untimed_metrics
from tests.helpers.tiny_run import small_config

SETTINGS: dict[str, Any] = {
    "dataset__name": "mixer_shapes",
    "recipe__loss": "sigmoid",
    "recipe__mixup": 0.2,
    "model__patch_size": 2,
    "model__num_blocks": 1,
    "tensorboard": False,
    "evals__test__every_steps": 0,
}


def shapes_config(data_dir: str, **changes: Any) -> RunConfig:
    return small_config(data_dir, **SETTINGS | changes)


def assert_same_result(workdir: Path, expected: Path, step: int) -> None:
    assert untimed_metrics(workdir) == untimed_metrics(expected)
    for item, arrays in final_arrays(expected, step).items():
        for a, b in zip(arrays, final_arrays(workdir, step)[item], strict=True):
            np.testing.assert_array_equal(a, b)


class StoppedError(Exception):
    """Raised in the middle of a run."""


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function that makes the next run end abruptly after a step."""

    def arrange(last: int) -> None:
        take_step = loop.TrainLoop.take_step

        def take(self: Any, step: int, batch: Any) -> None:
            if step > last:
                monkeypatch.setattr(loop.TrainLoop, "take_step", take_step)
                raise StoppedError
            take_step(self, step, batch)

        monkeypatch.setattr(loop.TrainLoop, "take_step", take)

    return arrange


@pytest.fixture(scope="module")
def multi_label_run(shapes_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("multi_label")
    train_and_evaluate(shapes_config(shapes_dir), str(workdir))
    return workdir


def test_run_resumes_bit_exactly_and_knows_that_it_is_multi_label(
    multi_label_run: Path, shapes_dir: str, tmp_path: Path, stop_after: Any
) -> None:
    config = shapes_config(shapes_dir)
    stop_after(12)
    with pytest.raises(StoppedError):
        train_and_evaluate(config, str(tmp_path))
    scores = train_and_evaluate(config, str(tmp_path)).scores["test"]
    assert_same_result(tmp_path, multi_label_run, 20)
    # Images without any shape count.
    assert (scores.num_examples, scores.num_bad) == (256, 0)
    last = read_metrics(str(tmp_path))[-1]
    assert last["test/mean_average_precision"] == scores.as_dict()["mean_average_precision"]
    assert load_checkpoint(str(tmp_path)).model_info.multi_label


def test_predictions_are_independent_probabilities(multi_label_run: Path) -> None:
    classifier = load_pretrained(str(multi_label_run))
    image, _ = shapes.draw(0)
    (prediction,) = classifier.predict(image, topk=4)
    logits = np.asarray(classifier(classifier.preprocess(image)))[0]
    expected = 1 / (1 + np.exp(-logits.astype(float)))
    found = {entry.name: entry.probability for entry in prediction.classes}
    assert [found[name] for name in shapes.NAMES] == pytest.approx(expected.tolist(), rel=1e-5)
    assert abs(sum(found.values()) - 1) > 0.01


@pytest.mark.slow
def test_run_learns_which_shapes_a_picture_shows(shapes_dir: str, tmp_path: Path) -> None:
    config = shapes_config(
        shapes_dir, num_steps=250, batch_size=128, model__hidden_dim=48, checkpoint__every_steps=0
    )
    metrics = train_and_evaluate(config, str(tmp_path)).scores["test"]
    assert isinstance(metrics, MultiLabelMetrics)
    # Chance is the fraction of pictures with a shape, 0.44.
    assert metrics.mean_average_precision > 0.9
    assert metrics.num_scored_classes == 3


@pytest.mark.slow
def test_one_device_and_eight_have_the_same_losses_and_metrics(
    shapes_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shapes_config(shapes_dir, recipe__grad_accum_steps=2)
    eight = train_and_evaluate(config, str(tmp_path / "eight"))
    device = jax.devices()[:1]
    monkeypatch.setattr(
        loop,
        "build_experiment",
        lambda *args, _build=loop.build_experiment, **kw: _build(*args, devices=device, **kw),
    )
    one = train_and_evaluate(config, str(tmp_path / "one"))
    a, b = (
        [line["loss"] for line in read_metrics(str(tmp_path / name)) if "loss" in line]
        for name in ("one", "eight")
    )
    assert a == pytest.approx(b, rel=1e-4)
    assert one.metrics == pytest.approx(eight.metrics, rel=1e-3)


def test_fine_tuning_to_and_from_several_labels(
    multi_label_run: Path, digits_dir: str, shapes_dir: str, tmp_path: Path
) -> None:
    start: dict[str, Any] = {
        "init_from": str(multi_label_run),
        "model__variant": "init_from",
        "num_steps": 2,
    }
    start |= dict.fromkeys(
        (f"model__{name}" for name in ("num_blocks", "patch_size", "hidden_dim")), 0
    ) | {"model__tokens_mlp_dim": 0, "model__channels_mlp_dim": 0}
    # Also with a loss that several labels do not have.
    single = small_config(digits_dir, **start | {"recipe__loss": "softmax"})
    scores = train_and_evaluate(single, str(tmp_path / "single")).scores
    assert "top1" in scores["test"].as_dict()
    info = load_checkpoint(str(tmp_path / "single")).model_info
    assert (info.multi_label, info.num_classes) == (False, 10)
    start["init_from"] = str(tmp_path / "single")
    several = shapes_config(shapes_dir, **start)
    train_and_evaluate(several, str(tmp_path / "several"))
    assert load_checkpoint(str(tmp_path / "several")).model_info.multi_label


def test_probes_of_several_labels_are_refused(shapes_dir: str, tmp_path: Path) -> None:
    config = dataclasses.replace(shapes_config(shapes_dir), evals={"knn": EvalConfig("knn")})
    with raises(UserError, "config.evals.knn", "mixer_shapes"):
        train_and_evaluate(config, str(tmp_path))


@pytest.fixture(scope="module")
def imbalanced(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folders of a common class and a rare one, which overlap, the latter 1 in 20."""
    folder = tmp_path_factory.mktemp("imbalanced")
    rng = np.random.default_rng(0)
    for split, counts in {"train": (380, 20), "test": (100, 100)}.items():
        for name, count, mean in zip(("common", "rare"), counts, (110, 145), strict=True):
            path = folder / split / name
            path.mkdir(parents=True)
            for index in range(count):
                gray = np.clip(rng.normal(mean, 20), 0, 255)
                image = np.clip(rng.normal(gray, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
                (path / f"{index}.png").write_bytes(encode(image, "PNG"))
    return f"folder:{folder}"


def imbalanced_config(name: str, **changes: Any) -> RunConfig:
    base = {"dataset__name": name, "recipe__class_weights": "balanced", "recipe__loss": "softmax"}
    return shapes_config("", **base | changes)


def test_class_weights_are_printed_and_kept_in_the_checkpoint(
    imbalanced: str,
    tmp_path: Path,
    stop_after: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = imbalanced_config(imbalanced)
    train_and_evaluate(config, str(tmp_path / "whole"))
    assert some_line_mentions(capsys.readouterr().out, "0.5263", "common", "10", "rare")
    stop_after(12)
    with pytest.raises(StoppedError):
        train_and_evaluate(config, str(tmp_path / "killed"))
    # A run that resumes does not count the labels again.
    monkeypatch.delattr(loop, "balanced_class_weights")
    train_and_evaluate(config, str(tmp_path / "killed"))
    assert_same_result(tmp_path / "killed", tmp_path / "whole", 20)
    assert some_line_mentions(capsys.readouterr().out, "0.5263", "common", "10", "rare")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_class_weights_raise_the_recall_of_a_rare_class(
    imbalanced: str, loss: str, tmp_path: Path
) -> None:
    recalls = {}
    for weights in ("none", "balanced"):
        config = imbalanced_config(
            imbalanced, recipe__class_weights=weights, recipe__loss=loss, num_steps=150
        )
        train_and_evaluate(config, str(tmp_path / weights))
        classifier = load_pretrained(str(tmp_path / weights))
        folder = Path(imbalanced.removeprefix("folder:")) / "test" / "rare"
        predictions = classifier.predict(sorted(folder.iterdir()), topk=1)
        recalls[weights] = np.mean([p.classes[0].name == "rare" for p in predictions])
    print(json.dumps(recalls))
    assert recalls["balanced"] > recalls["none"] + 0.2
