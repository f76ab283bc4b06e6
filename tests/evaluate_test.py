"""Tests of `python -m mixer_jax.evaluate`."""

import csv
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import cv2
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.metrics import average_precision_score, classification_report

from mixer_jax import evaluate
from mixer_jax.checkpoints.weights import PretrainedWeights, replace_head, resize
from mixer_jax.cli import common
from mixer_jax.errors import UserError
from mixer_jax.inference import Classifier
from mixer_jax.models.bit_config import BitConfig
from mixer_jax.models.vit_config import VitConfig
from tests.helpers import shapes
from tests.helpers.html_pages import check_stands_alone
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


@pytest.fixture
def photos(tmp_path: Path) -> str:
    """Folder of images whose names contain markup, formulas and other scripts."""
    for index in range(COUNT):
        for split in ("train", "test"):
            folder = tmp_path / "photos" / split / PHOTO_CLASSES[index % 4]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index} <i>.png").write_bytes(encoded(index))
    return f"folder:{tmp_path / 'photos'}"


PHOTO_CLASSES = ("<script>alert(1)<", "\"'><img src=x>", "שלום", "🐝")


def report_flags(checkpoint: str, dataset: str, report: Path) -> list[str]:
    data = [f"--dataset={dataset}", "--split=test"]
    return [f"--checkpoint={checkpoint}", *data, f"--report={report}"]


def test_report_has_the_numbers_of_scikit_learn_and_every_image(
    photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights(class_names=PHOTO_CLASSES)
    run, report = save_run(weights, tmp_path / "run"), tmp_path / "report"
    assert evaluate.main(report_flags(run, photos, report)) == 0
    table = capsys.readouterr().out
    assert mentions(table, f"{report}/index.html", "top-1")
    page = check_stands_alone((report / "index.html").read_text("utf-8"))
    with (report / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        path = Path(row["image"])
        (expected,) = Classifier(weights).predict(str(path))
        assert row["prediction"] == expected.classes[0].name
        assert row["label"] == path.parent.name
        for entry in expected.classes:
            probability = float(row[f"probability: {entry.name}"])
            assert probability == pytest.approx(entry.probability, rel=1e-3)
        if row["label"] != row["prediction"]:
            # Without the folder that all images share.
            assert page.text.count(f"{path.parent.name}/{path.name}") == 1
    assert len(rows) == COUNT
    metrics = json.loads((report / "metrics.json").read_text("utf-8"))
    labels, predicted = zip(*((row["label"], row["prediction"]) for row in rows), strict=True)
    expected_report = classification_report(labels, predicted, output_dict=True, zero_division=0)
    for name in {*labels, *predicted}:
        values = metrics["per_class"][name]
        assert values["precision"] == expected_report[name]["precision"]
        assert values["recall"] == expected_report[name]["recall"]
        assert values["f1"] == expected_report[name]["f1-score"]
        assert values["support"] == expected_report[name]["support"]
    assert metrics["macro average"]["f1"] == expected_report["macro avg"]["f1-score"]
    # The same as without a report.
    assert evaluate.main([*report_flags(run, photos, report)[:3], "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain.pop("image_size") == metrics["image_size"]
    assert plain == pytest.approx({name: metrics[name] for name in plain})


def test_report_lists_unusable_images(photos: str, tmp_path: Path) -> None:
    run = save_run(random_weights(class_names=PHOTO_CLASSES), tmp_path / "run")
    bad = tmp_path / "photos" / "test" / PHOTO_CLASSES[2] / "bad.png"
    bad.write_bytes(encoded(0)[:40])
    flags = report_flags(run, photos, tmp_path / "report")
    with raises(UserError, "bad.png"):
        evaluate.main(flags)
    assert not (tmp_path / "report").exists()
    assert evaluate.main([*flags, "--skip_bad_images", "--batch_size=4"]) == 0
    with (tmp_path / "report" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        errors = {row["image"]: row["error"] for row in csv.DictReader(file)}
    assert [name for name, error in errors.items() if error] == [str(bad)]
    assert len(errors) == COUNT + 1


def test_report_of_published_weights_and_real_labels(
    weights: PretrainedWeights, data_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nameless = save_npz(weights, tmp_path / "nameless.npz", {"eval_crop": "resize"})
    report = tmp_path / "report"
    result = evaluate_json(nameless, data_dir, capsys, f"--report={report}", "--real")
    metrics = json.loads((report / "metrics.json").read_text("utf-8"))
    assert {name: metrics[name] for name in result} == result
    assert {*metrics["per_class"]} <= {*NAMES}
    assert sum(values["support"] for values in metrics["per_class"].values()) == COUNT
    # Several labels per image.
    data = [f"--data_dir={data_dir}", "--dataset=mixer_scored_real", "--split=validation"]
    with raises(UserError, "--report", "mixer_scored_real"):
        evaluate.main([f"--checkpoint={nameless}", *data, f"--report={tmp_path}/another"])


@pytest.fixture(scope="module")
def multi_label_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    weights = random_weights(class_names=shapes.NAMES, loss="sigmoid", multi_label=True)
    return save_run(weights, tmp_path_factory.mktemp("multi_label"))


def evaluate_shapes(run: str, data_dir: str, *flags: str) -> None:
    data = [f"--data_dir={data_dir}", "--dataset=mixer_shapes", "--split=test"]
    assert evaluate.main([f"--checkpoint={run}", *data, *flags]) == 0


def test_evaluate_a_multi_label_model(
    multi_label_run: str, shapes_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_shapes(multi_label_run, shapes_dir)
    table = capsys.readouterr().out.splitlines()
    report = tmp_path / "report"
    evaluate_shapes(multi_label_run, shapes_dir, "--json", f"--report={report}")
    result = json.loads(capsys.readouterr().out)
    count = shapes.COUNTS["test"]
    assert (result["num_examples"], result["num_scored_classes"]) == (count, 3)
    with (report / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count
    labels = np.array([[name in row["labels"].split("|") for name in shapes.NAMES] for row in rows])
    start = shapes.COUNTS["train"]
    assert (
        labels.sum(0).tolist()
        == np.bincount(
            [label for index in range(start, start + count) for label in shapes.draw(index)[1]],
            minlength=4,
        ).tolist()
    )
    probabilities = np.array(
        [[float(row[f"probability: {name}"]) for name in shapes.NAMES] for row in rows]
    )
    precisions = average_precision_score(labels[:, :3], probabilities[:, :3], average=None)
    metrics = json.loads((report / "metrics.json").read_text("utf-8"))
    expected_report = classification_report(
        labels, probabilities > 0.5, output_dict=True, zero_division=0
    )
    for index, name in enumerate(shapes.NAMES[:3]):
        values = metrics["classes"][name]
        assert result["classes"][name].items() <= values.items()
        # Probabilities in the file are rounded.
        assert values["average_precision"] == pytest.approx(precisions[index], abs=1e-3)
        assert values["recall"] == pytest.approx(expected_report[str(index)]["recall"], abs=1e-3)
        assert values["num_images"] == expected_report[str(index)]["support"]
        # Named with its average precision.
        assert any(mentions(line, name, f"{values['average_precision']:.2%}") for line in table)
    assert result["classes"]["unicorn"]["average_precision"] is None
    mean = result["mean_average_precision"]
    assert mean == pytest.approx(precisions.mean(), abs=1e-3)
    assert any(mentions(line, "mAP", f"{mean:.2%}") for line in table)
    page = check_stands_alone((report / "index.html").read_text("utf-8"))
    assert f"{mean:.2%}" in page.text
    predicted = {name: sum(name in row["predictions"] for row in rows) for name in shapes.NAMES}
    assert (probabilities > 0.5).sum(0).tolist() == list(predicted.values())


def test_a_report_of_one_label_is_refused_for_several(shapes_dir: str, tmp_path: Path) -> None:
    run = save_run(random_weights(class_names=shapes.NAMES), tmp_path / "run")
    with raises(UserError, "--report", "mixer_shapes"):
        evaluate_shapes(run, shapes_dir, f"--report={tmp_path}/report")


def test_a_multi_label_model_has_no_real_accuracy(multi_label_run: str, shapes_dir: str) -> None:
    with raises(UserError, "--real", multi_label_run):
        evaluate_shapes(multi_label_run, shapes_dir, "--real")


@pytest.mark.parametrize("config", [VitConfig(1, 4, 16, 24, 2), BitConfig("1,1", 8)])
def test_report_of_other_families(config: Any, tmp_path: Path) -> None:
    weights = random_weights(config, image_size=(32, 32))
    run, report = save_run(weights, tmp_path / "run"), tmp_path / "report"
    evaluate.main(report_flags(run, "synthetic", report))
    page = check_stands_alone((report / "index.html").read_text("utf-8"))
    # Classes of synthetic data have indices as names.
    metrics = json.loads((report / "metrics.json").read_text("utf-8"))
    assert all(str(v["class_index"]) == name for name, v in metrics["per_class"].items())
    assert weights.model_info.name in page.text


def test_report_is_refused_before_the_evaluation(
    weights: PretrainedWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(weights, tmp_path / "run")
    (tmp_path / "file").touch()
    (tmp_path / "full" / "folder").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for name, parts in {
        "file": ["file", "folder"],
        "full": ["full"],
        "absent/report": ["absent"],
        "file/report": ["file"],
    }.items():
        with raises(UserError, "--report", *parts):
            evaluate.main(report_flags(run, "synthetic", tmp_path / name))
    with raises(UserError, "--report", "gs://bucket/report"):
        evaluate.main([f"--checkpoint={run}", "--report=gs://bucket/report"])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with raises(UserError, "--report", "2"):
        evaluate.main(report_flags(run, "synthetic", tmp_path / "report"))
    assert sorted(tmp_path.rglob("*")) == before


def test_report_needs_a_writable_folder(
    weights: PretrainedWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with raises(UserError, "--report", str(tmp_path), "Permission denied"):
        evaluate.main(report_flags("weights.npz", "synthetic", tmp_path / "report"))
