"""Tests of the report of an evaluation."""

import csv
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import classification_report, confusion_matrix

from mixer_jax.data.source import Example, Source
from mixer_jax.errors import DiskFullError, RunError
from mixer_jax.evaluation.classification import (
    ClassificationMetrics,
    ExampleMetrics,
    aggregate,
    calibration_error,
)
from mixer_jax.evaluation.predictions import (
    MAX_ALL_CLASSES,
    NUM_TOP,
    Predictions,
    worst_mistakes,
)
from mixer_jax.visualization.evaluation_report import write_report
from tests.helpers.file_size_limit import file_size_limit
from tests.helpers.html_pages import Page, check_stands_alone
from tests.helpers.messages import raises

NAMES = ("<script>alert(1)</script>", "\"'><img src=x>", "שלום", "🐝 bee", "=1+1", "-2")


def make_source(count: int, class_names: tuple[str, ...], side: int = 16) -> Source:
    """Creates a source of noise; every image has its own."""
    rng = np.random.default_rng(0)
    labels = rng.integers(len(class_names), size=count).tolist()
    images = [
        cv2.imencode(".jpg", rng.integers(0, 256, (side, side, 3), np.uint8))[1].tobytes()
        for _ in range(min(count, 64))
    ]
    examples = [
        Example(image=images[i % 64], labels=(label,), name=f"{class_names[label]}/{i}.jpg")
        for i, label in enumerate(labels)
    ]
    return Source("photos test", examples, class_names)


def make_predictions(source: Source, accuracy: float = 0.7) -> Predictions:
    """Creates random predictions, of which a fraction are correct."""
    rng = np.random.default_rng(1)
    count, num_classes = len(source), source.num_classes
    labels = np.array([example["labels"][0] for example in source.examples], np.int32)
    logits = rng.normal(size=(count, num_classes)).astype(np.float32)
    logits[np.arange(count), labels] += np.where(rng.random(count) < accuracy, 8.0, 0.0)
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    order = np.argsort(-probabilities, axis=1, kind="stable")
    rank = np.argmax(order == labels[:, None], axis=1)
    kept = order[:, : num_classes if num_classes <= MAX_ALL_CLASSES else NUM_TOP]
    mask = np.ones(count, bool)
    return Predictions(
        [example["name"] for example in source.examples],
        labels,
        mask,
        kept.astype(np.int32),
        np.take_along_axis(probabilities, kept, axis=1),
        rank.astype(np.int32),
        np.log(probabilities[np.arange(count), labels]),
        probabilities.max(axis=1),
        {},
    )


def make_metrics(predictions: Predictions) -> ClassificationMetrics:
    columns = (predictions.rank, predictions.log_likelihood, predictions.confidence)
    return aggregate(ExampleMetrics(*map(jnp.asarray, (*columns, predictions.mask))))


def write(path: Path, source: Source, predictions: Predictions) -> Page:
    metrics = make_metrics(predictions)
    write_report(
        path, "w on photos", "Mixer", source, metrics, predictions, {"dataset": "photos"}, False
    )
    assert {file.name for file in path.iterdir()} == {
        "index.html",
        "metrics.json",
        "predictions.csv",
    }
    return check_stands_alone((path / "index.html").read_text("utf-8"))


def read_predictions(path: Path) -> list[dict[str, str]]:
    with (path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_metrics(path: Path) -> dict[str, Any]:
    return json.loads((path / "metrics.json").read_text("utf-8"))


def test_numbers_equal_those_of_scikit_learn(tmp_path: Path) -> None:
    source = make_source(200, tuple("abcdefg"))
    predictions = make_predictions(source)
    write(tmp_path / "report", source, predictions)
    metrics = read_metrics(tmp_path / "report")
    expected = classification_report(
        [source.class_names[label] for label in predictions.labels],
        [source.class_names[label] for label in predictions.predicted],
        output_dict=True,
    )

    def renamed(values: dict[str, float]) -> dict[str, float]:
        return {"f1" if key == "f1-score" else key: value for key, value in values.items()}

    for index, name in enumerate(source.class_names):
        assert metrics["per_class"][name] == {"class_index": index, **renamed(expected[name])}
    assert metrics["macro average"] == renamed(expected["macro avg"])
    assert metrics["weighted average"] == renamed(expected["weighted avg"])
    matrix = confusion_matrix(predictions.labels, predictions.predicted)
    pairs = {
        (pair["label"], pair["predicted"]): pair["num_images"] for pair in metrics["confused_pairs"]
    }
    assert pairs == {
        (source.class_names[i], source.class_names[j]): count
        for (i, j), count in np.ndenumerate(matrix)
        if i != j and count
    }
    assert list(pairs.values()) == sorted(pairs.values(), reverse=True)
    bins = metrics["calibration_bins"]
    gaps = [abs(bin["confidence"] - bin["num_correct"]) for bin in bins]
    error = calibration_error(predictions.confidence, predictions.rank == 0)
    assert sum(gaps) / 200 == pytest.approx(error)
    assert sum(bin["num_examples"] for bin in bins) == 200


def test_predictions_have_every_image_and_all_probabilities(tmp_path: Path) -> None:
    source = make_source(30, NAMES)
    predictions = make_predictions(source)
    write(tmp_path / "report", source, predictions)
    rows = read_predictions(tmp_path / "report")
    names = [name if name != "=1+1" else "'=1+1" for name in NAMES]
    for index, row in enumerate(rows):
        label, predicted = predictions.labels[index], predictions.predicted[index]
        assert row["image"].removeprefix("'") == predictions.names[index]
        assert (row["label"], row["prediction"]) == (names[label], names[predicted])
        values = [float(row[f"probability: {name}"]) for name in NAMES]
        assert sum(values) == pytest.approx(1, abs=1e-5)
        assert int(np.argmax(values)) == predicted
        assert float(row["label_probability"]) == pytest.approx(values[label], rel=1e-5)
        # Spreadsheet programs would run these; numbers are harmless.
        assert not any(cell.startswith(("=", "@")) for cell in row.values())
    assert len(rows) == 30
    assert "-2" in {row["label"] for row in rows}


def test_unusable_images_are_listed_without_a_prediction(tmp_path: Path) -> None:
    source = make_source(10, ("a", "b", "c"))
    predictions = make_predictions(source)
    predictions.mask[[2, 7]] = False
    predictions = predictions._replace(errors={2: "empty <file>", 7: "damaged"})
    page = write(tmp_path / "report", source, predictions)
    rows = read_predictions(tmp_path / "report")
    assert [row["image"] for row in rows] == predictions.names
    assert [index for index, row in enumerate(rows) if row["error"]] == [2, 7]
    assert rows[2]["error"] == "empty <file>"
    assert {rows[2]["prediction"], rows[2]["label"], rows[2]["probability: a"]} == {""}
    assert "empty <file>" in page.text
    supports = [
        entry["support"] for entry in read_metrics(tmp_path / "report")["per_class"].values()
    ]
    assert sum(supports) == 8


def test_names_are_shown_as_text(tmp_path: Path) -> None:
    source = make_source(60, NAMES)
    predictions = make_predictions(source, accuracy=0.2)
    num_mistakes = len(worst_mistakes(predictions, 60))
    page = write(tmp_path / "report", source, predictions)
    for name in NAMES:
        # In the gallery, and in the tables of classes and of confusions.
        assert page.text.count(name) > 10
    # Of mistakes and of the calibration; a name does not add one.
    assert len(page.attributes("img", "src")) == 1 + min(48, num_mistakes)
    # Names in other scripts are kept apart from the text around them.
    assert page.attributes("td", "dir").count("auto") >= len(NAMES)


def test_classes_that_are_wordnet_ids_are_shown_in_words(tmp_path: Path) -> None:
    names = ("n02012849", "n03126707", "cat")
    source = make_source(60, names)
    predictions = make_predictions(source, accuracy=0.2)
    page = write(tmp_path / "report", source, predictions)
    for wnid in names[:2]:
        # In the gallery, the header and a row of the matrix, and the tables of pairs and classes.
        assert page.text.count(f"crane ({wnid})") > 20
        assert page.text.count(wnid) == page.text.count(f"crane ({wnid})") + sum(
            predictions.names[index].startswith(wnid) for index in worst_mistakes(predictions, 48)
        )
    # Files for programs have the names themselves.
    assert {row["label"] for row in read_predictions(tmp_path / "report")} == {*names}
    assert {*read_metrics(tmp_path / "report")["per_class"]} == {*names}


def test_confusion_matrix_has_the_classes_that_occur(tmp_path: Path) -> None:
    source = make_source(60, tuple(f"class {i}" for i in range(1000)))
    predictions = make_predictions(source)
    predictions = predictions._replace(
        labels=predictions.labels % 3 * 400, top_classes=predictions.top_classes % 4 * 200
    )
    page = write(tmp_path / "report", source, predictions)
    cells = [attributes for tag, attributes in page.elements if "style" in attributes]
    # Classes 0, 200, 400, 600 and 800.
    assert len(cells) == 25


@pytest.mark.parametrize(("num_classes", "num_pictures"), [(3, 1), (30, 2), (210, 1)])
def test_confusion_matrix_is_a_table_or_a_picture(
    num_classes: int, num_pictures: int, tmp_path: Path
) -> None:
    source = make_source(2_000, tuple(f"class {i}" for i in range(num_classes)))
    page = write(tmp_path / "report", source, make_predictions(source))
    uris = page.attributes("img", "src")
    assert len(uris) - min(48, len(worst_mistakes(make_predictions(source), 2_000))) == num_pictures
    cells = [
        attributes for tag, attributes in page.elements if tag == "td" and "style" in attributes
    ]
    assert len(cells) == (num_classes**2 if num_classes == 3 else 0)
    row = read_predictions(tmp_path / "report")[0]
    if num_classes > MAX_ALL_CLASSES:
        assert list(row)[5:7] == ["class_1", "probability_1"]
        assert row["class_1"] == row["prediction"]
        values = [float(row[f"probability_{k}"]) for k in range(1, NUM_TOP + 1)]
        assert values == sorted(values, reverse=True)


def test_worst_mistakes_are_sorted_by_confidence_and_shown(tmp_path: Path) -> None:
    source = make_source(50, tuple("abc"))
    predictions = make_predictions(source)
    worst = worst_mistakes(predictions, 5)
    is_wrong = predictions.predicted != predictions.labels
    confidence = predictions.confidence
    assert confidence[worst].tolist() == sorted(confidence[is_wrong].tolist())[::-1][:5]
    page = write(tmp_path / "report", source, predictions)
    shown = [page.text.index(predictions.names[index]) for index in worst]
    assert shown == sorted(shown)


def test_mistakes_whose_images_were_deleted_since_are_shown_without_them(tmp_path: Path) -> None:
    source = make_source(50, tuple("abc"))
    predictions = make_predictions(source)
    (first,) = worst_mistakes(predictions, 1)
    source.examples[first]["image"] = b""
    page = write(tmp_path / "report", source, predictions)
    is_wrong = predictions.predicted != predictions.labels
    # One image less, and the calibration.
    assert len(page.attributes("img", "src")) == is_wrong.sum()
    assert page.text.count(predictions.names[first]) == 1


def test_page_has_no_path_of_the_disk(tmp_path: Path) -> None:
    source = make_source(50, tuple("abc"))
    predictions = make_predictions(source)
    names = predictions.names
    absolute = predictions._replace(names=[f"/home/ada/photos/{name}" for name in names])
    page = write(tmp_path / "report", source, absolute)
    assert "ada" not in page.text
    (worst,) = worst_mistakes(predictions, 1)
    assert names[worst] in page.text
    rows = read_predictions(tmp_path / "report")
    assert [row["image"] for row in rows] == absolute.names


def test_perfect_predictions_have_no_mistakes(tmp_path: Path) -> None:
    source = make_source(20, tuple("abc"))
    predictions = make_predictions(source, accuracy=1.0)
    page = write(tmp_path / "report", source, predictions)
    # The calibration diagram only.
    assert len(page.attributes("img", "src")) == 1


def test_report_replaces_an_empty_folder_and_nothing_else(tmp_path: Path) -> None:
    source = make_source(10, tuple("abc"))
    predictions = make_predictions(source)
    (tmp_path / "report").mkdir()
    write(tmp_path / "report", source, predictions)
    before = {file.name: file.read_bytes() for file in (tmp_path / "report").iterdir()}
    with raises(RunError, str(tmp_path / "report")):
        write(tmp_path / "report", source, make_predictions(source, accuracy=0.0))
    assert {file.name: file.read_bytes() for file in (tmp_path / "report").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["report"]
    # The same permissions as other new folders have.
    (tmp_path / "other").mkdir()
    modes = {stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("report", "other")}
    assert len(modes) == 1


@pytest.mark.parametrize("limit", [1000, 25_000])
def test_report_on_a_full_disk_leaves_nothing(limit: int, tmp_path: Path) -> None:
    source = make_source(500, tuple("abc"))
    predictions = make_predictions(source)
    # Compiled programs are written to a cache, whose files must not be limited.
    make_metrics(predictions)
    with file_size_limit(limit), raises(DiskFullError, str(tmp_path / "report"), "File too large"):
        write(tmp_path / "report", source, predictions)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_report_of_a_thousand_classes_is_small_and_quick(tmp_path: Path) -> None:
    source = make_source(50_000, tuple(f"n{i:08d} {'name ' * 4}" for i in range(1000)), side=400)
    predictions = make_predictions(source)
    start = time.monotonic()
    write(tmp_path / "report", source, predictions)
    assert time.monotonic() - start < 60
    assert (tmp_path / "report" / "index.html").stat().st_size < 10_000_000
    assert len(read_predictions(tmp_path / "report")) == 50_000
