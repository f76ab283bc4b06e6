"""Report of an evaluation: index.html, predictions.csv and metrics.json in one folder."""

import contextlib
import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mixer_jax.data.decode import BadImageError, decode
from mixer_jax.data.source import Source
from mixer_jax.data.wordnet import label_class
from mixer_jax.errors import RunError, disk_failure
from mixer_jax.evaluation.classification import (
    NUM_CALIBRATION_BINS,
    CalibrationBin,
    ClassificationMetrics,
    ClassReport,
    ConfusedPair,
    calibration_bins,
    class_report,
    confused_pairs,
)
from mixer_jax.evaluation.predictions import MAX_ALL_CLASSES, NUM_TOP, Predictions, worst_mistakes
from mixer_jax.files import atomic_folder
from mixer_jax.visualization.figures import make_figure
from mixer_jax.visualization.html import encode_figure, encode_thumbnail, render_page

PAGE, PREDICTIONS, METRICS = "index.html", "predictions.csv", "metrics.json"
# Number of classes that occur, up to which the confusion matrix is a table, or a picture.
_MAX_TABLE_CLASSES, _MAX_PICTURE_CLASSES = 25, 200
_NUM_PAIRS, NUM_MISTAKES, _NUM_ERRORS = 50, 48, 50
# Spreadsheet programs run a cell as a formula if its text begins with one of these.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def write_report(
    path: Path,
    title: str,
    subtitle: str,
    source: Source,
    metrics: ClassificationMetrics,
    predictions: Predictions,
    summary: dict[str, Any],
    exif_orientation: bool,
) -> None:
    """Writes the report of an evaluation as a new folder, completely or not at all.

    Args:
        path: Folder, which must be empty if it exists.
        title: Title of the page.
        subtitle: Line below the title.
        source: Source of the images, of which the worst mistakes are read again.
        metrics: Metrics of the evaluation.
        predictions: Predictions for the source.
        summary: First entries of `metrics.json`.
        exif_orientation: Whether images are rotated by their EXIF orientation.

    Raises:
        RunError: The folder cannot be written.
    """
    mask = predictions.mask
    labels, predicted = predictions.labels[mask], predictions.predicted[mask]
    report = class_report(labels, predicted)
    pairs = confused_pairs(labels, predicted)
    is_correct = predictions.rank[mask] == 0
    bins = calibration_bins(predictions.confidence[mask], is_correct)
    shown = predictions._replace(names=remove_folder(predictions.names))
    names = [label_class(name) for name in source.class_names]
    page = render_page(
        "evaluation.html",
        title=title,
        subtitle=subtitle,
        facts=_format_facts(metrics, report),
        counts=metrics.format_counts(),
        class_rows=_format_classes(report, names),
        num_absent=source.num_classes - len(report.classes),
        matrix=_matrix_rows(labels, predicted, [names[index] for index in report.classes]),
        matrix_picture=_draw_matrix(labels, predicted, list(report.classes)),
        pair_rows=_format_pairs(pairs[:_NUM_PAIRS], report, names),
        num_pairs=f"{len(pairs):,}",
        calibration=encode_figure(draw_calibration(bins)),
        calibration_error=f"{metrics.calibration_error:.2%}",
        num_bins=NUM_CALIBRATION_BINS,
        mistakes=list(_show_mistakes(source, shown, names, exif_orientation)),
        num_mistakes=f"{int((labels != predicted).sum()):,}",
        **list_unusable_images(shown.names, shown.errors),
    )
    summary = summary | {
        "per_class": {
            source.class_names[index]: {"class_index": index} | values._asdict()
            for index, values in report.classes.items()
        },
        **{name: values._asdict() for name, values in report.averages.items()},
        "confused_pairs": [
            pair._asdict()
            | {
                "label": source.class_names[pair.label],
                "predicted": source.class_names[pair.predicted],
            }
            for pair in pairs[:_NUM_PAIRS]
        ],
        "calibration_bins": [bin._asdict() for bin in bins],
    }
    write_files(path, page, summary, _prediction_rows(predictions, source.class_names))


def write_files(
    path: Path, page: str, summary: dict[str, Any], rows: Iterable[Sequence[str]]
) -> None:
    """Writes the files of a report as a new folder, completely or not at all.

    Args:
        path: Folder, which must be empty if it exists.
        page: HTML of the page.
        summary: Content of `metrics.json`.
        rows: Lines of `predictions.csv`.

    Raises:
        RunError: The folder cannot be written.
    """
    try:
        with atomic_folder(path.absolute()) as folder:
            (folder / PAGE).write_text(page, encoding="utf-8")
            (folder / METRICS).write_text(
                json.dumps(summary, ensure_ascii=False, indent=1) + "\n",
                encoding="utf-8",
                errors="backslashreplace",
            )
            with (folder / PREDICTIONS).open(
                "w", encoding="utf-8", errors="backslashreplace", newline=""
            ) as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
    except OSError as error:
        problem = f"report {str(path)!r} cannot be written"
        failure = disk_failure(problem, error)
        raise failure or RunError(f"{problem} ({error.strerror or error}).") from error


def draw_calibration(bins: Sequence[CalibrationBin]) -> Any:
    """Draws a reliability diagram: accuracy by confidence, above the number of images."""
    figure = make_figure(5, 5, constrained=True)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    centers = (np.arange(len(bins)) + 0.5) / len(bins)
    counts = np.array([bin.num_examples for bin in bins])
    used = counts > 0
    accuracy = np.array([bin.num_correct for bin in bins])[used] / counts[used]
    confidence = np.array([bin.confidence for bin in bins])[used] / counts[used]
    width = 0.94 / len(bins)
    upper.bar(centers[used], accuracy, width, color="tab:blue", label="accuracy")
    upper.plot(confidence, accuracy, "o", color="black", markersize=4, label="at mean confidence")
    upper.plot([0, 1], [0, 1], "--", color="gray", label="perfect calibration")
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    upper.legend(loc="upper left")
    lower.bar(centers, counts, width, color="tab:gray")
    lower.set(xlabel="confidence", ylabel="images")
    return figure


def _draw_matrix(
    labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], indices: Sequence[int]
) -> str:
    """Draws the confusion matrix of many classes, whose names have no room; else returns ""."""
    if not _MAX_TABLE_CLASSES < len(indices) <= _MAX_PICTURE_CLASSES:
        return ""
    from sklearn.metrics import confusion_matrix

    figure = make_figure(8, 7, constrained=True)
    axes = figure.subplots()
    shares = _confusion_shares(confusion_matrix(labels, predicted))
    image = axes.imshow(shares, cmap="magma_r", vmin=0, vmax=1)
    ticks = range(0, len(indices), math.ceil(len(indices) / 10))
    texts = [str(indices[tick]) for tick in ticks]
    axes.set_xticks(ticks, texts)
    axes.set_yticks(ticks, texts)
    axes.set(xlabel="predicted class, by index", ylabel="class, by index")
    figure.colorbar(image, label="fraction of the class's images")
    return encode_figure(figure, "png")


class MatrixRow(NamedTuple):
    """Row of the confusion matrix of few classes.

    Attributes:
        cells: Number of images, and fraction of the row, per predicted class.
    """

    name: str
    cells: list[tuple[int, str]]


def _matrix_rows(
    labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], names: Sequence[str]
) -> list[MatrixRow]:
    """Formats the confusion matrix of few classes, those that occur; [] for more."""
    if len(names) > _MAX_TABLE_CLASSES:
        return []
    from sklearn.metrics import confusion_matrix

    matrix = confusion_matrix(labels, predicted)
    shares = _confusion_shares(matrix)
    return [
        MatrixRow(name, [(n, f"{s:.2f}") for n, s in zip(counts, row, strict=True)])
        for name, counts, row in zip(names, matrix.tolist(), shares.tolist(), strict=True)
    ]


def _confusion_shares(matrix: Int[np.ndarray, "classes classes"]) -> Any:
    """Divides each row by the number of images of its class, if there are any."""
    return matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)


def _format_facts(metrics: ClassificationMetrics, report: ClassReport) -> list[tuple[str, str]]:
    return [
        ("images", f"{metrics.num_examples:,}"),
        ("top-1 accuracy", f"{metrics.top1:.2%}"),
        ("top-5 accuracy", f"{metrics.top5:.2%}"),
        ("macro F1", f"{report.averages['macro average'].f1:.2%}"),
        ("log-likelihood", f"{metrics.log_likelihood:.4f}"),
        ("calibration error", f"{metrics.calibration_error:.2%}"),
    ]


def _format_classes(report: ClassReport, names: Sequence[str]) -> list[list[str]]:
    """Formats the averages and the classes, lowest F1 first."""
    worst = sorted(report.classes.items(), key=lambda item: (item[1].f1, item[0]))
    rows = [(name, "", values) for name, values in report.averages.items()]
    rows += [(names[index], str(index), values) for index, values in worst]
    return [
        [name, index, *(f"{value:.2%}" for value in values[:3]), f"{values.support:,}"]
        for name, index, values in rows
    ]


def _format_pairs(
    pairs: Sequence[ConfusedPair], report: ClassReport, names: Sequence[str]
) -> list[list[str]]:
    rows = []
    for label, predicted, num_images in pairs:
        share = f"{num_images / report.classes[label].support:.2%}"
        rows.append([names[label], names[predicted], f"{num_images:,}", share])
    return rows


def remove_folder(names: list[str]) -> list[str]:
    """Removes the folder that all paths share, so that the page can be sent to others."""
    if len(names) < 2 or not all(map(os.path.isabs, names)):
        return [os.path.basename(name) if os.path.isabs(name) else name for name in names]
    folder = os.path.commonpath(names)
    return [os.path.relpath(name, folder) for name in names]


def list_unusable_images(names: Sequence[str], errors: Mapping[int, str]) -> dict[str, Any]:
    """Lists the first unusable images with their errors, and their number, for the page."""
    rows = [[names[index], reason] for index, reason in list(errors.items())[:_NUM_ERRORS]]
    return {"error_rows": rows, "num_errors": f"{len(errors):,}"}


def _show_mistakes(
    source: Source, predictions: Predictions, names: Sequence[str], exif_orientation: bool
) -> Iterator[dict[str, Any]]:
    """Lists the most confident mistakes with their images, except those deleted since."""
    for index in worst_mistakes(predictions, NUM_MISTAKES).tolist():
        label, predicted = predictions.labels[index], predictions.predicted[index]
        probability = math.exp(predictions.log_likelihood[index])
        yield {
            "uri": read_thumbnail(source, index, exif_orientation),
            "name": predictions.names[index],
            "predicted": names[predicted],
            "confidence": f"{predictions.confidence[index]:.1%}",
            "label": names[label],
            "probability": f"{probability:.1%}",
        }


def read_thumbnail(source: Source, index: int, exif_orientation: bool) -> str:
    """Reads an image as the URI of its thumbnail; "" if it has been deleted."""
    with contextlib.suppress(BadImageError):
        encoded = source.examples[index]["image"]
        return encode_thumbnail(decode(encoded, exif_orientation=exif_orientation))
    return ""


def _prediction_rows(predictions: Predictions, class_names: Sequence[str]) -> Iterator[list[str]]:
    """Yields one line per image, with the probabilities of all or of the most probable classes."""
    names = [escape_formula(name) for name in class_names]
    header = ["image", "label", "prediction", "label_probability", "error"]
    header += probability_titles(class_names)
    likelihood = np.exp(predictions.log_likelihood)
    yield header
    for index, image in enumerate(predictions.names):
        row = [escape_formula(image)]
        if not predictions.mask[index]:
            yield [*row, "", "", "", predictions.errors[index]] + [""] * (len(header) - 5)
            continue
        classes = predictions.top_classes[index]
        row += [
            names[predictions.labels[index]],
            names[classes[0]],
            f"{likelihood[index]:.6g}",
            "",
        ]
        yield row + format_probabilities(names, classes, predictions.top_probabilities[index])


def probability_titles(class_names: Sequence[str]) -> list[str]:
    """Lists the titles of the columns of `format_probabilities`."""
    if len(class_names) <= MAX_ALL_CLASSES:
        return [f"probability: {name}" for name in class_names]
    return [f"{part}_{k}" for k in range(1, NUM_TOP + 1) for part in ("class", "probability")]


def format_probabilities(
    names: Sequence[str], classes: Int[np.ndarray, " k"], probabilities: Float[np.ndarray, " k"]
) -> list[str]:
    """Formats the probabilities of all classes, or names and probabilities of the first ones.

    Args:
        names: Name of each class.
        classes: All classes up to `MAX_ALL_CLASSES`, otherwise `NUM_TOP`; the most probable first.
        probabilities: Their probabilities.
    """
    if len(names) <= MAX_ALL_CLASSES:
        return [f"{p:.6g}" for p in probabilities[np.argsort(classes)].tolist()]
    pairs = zip(classes.tolist(), probabilities.tolist(), strict=True)
    return [cell for k, p in pairs for cell in (names[k], f"{p:.6g}")]


def escape_formula(text: str) -> str:
    """Prefixes an apostrophe to a text that spreadsheet programs would run as a formula."""
    if not text.startswith(_FORMULA_STARTS):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
