"""Report of the evaluation of a multi-label model: the files of `evaluation_report`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from mixer_jax.data.source import Source
from mixer_jax.data.wordnet import label_class
from mixer_jax.evaluation.classification import ClassMetrics, class_metrics
from mixer_jax.evaluation.multi_label import MultiLabelMetrics
from mixer_jax.evaluation.predictions import MAX_ALL_CLASSES, NUM_TOP, MultiLabelPredictions
from mixer_jax.visualization.evaluation_report import (
    NUM_MISTAKES,
    escape_formula,
    format_probabilities,
    list_unusable_images,
    probability_titles,
    read_thumbnail,
    remove_folder,
    write_files,
)
from mixer_jax.visualization.html import render_page

# Between the labels of an image in predictions.csv.
_SEPARATOR = "|"


def write_multi_label_report(
    path: Path,
    title: str,
    subtitle: str,
    source: Source,
    metrics: MultiLabelMetrics,
    predictions: MultiLabelPredictions,
    summary: dict[str, Any],
    exif_orientation: bool,
) -> None:
    """Writes the report of an evaluation as a new folder; see `evaluation_report.write_report`."""
    mask = predictions.mask
    labels, predicted = predictions.labels[mask], predictions.predicted[mask]
    thresholded = class_metrics(labels, predicted)
    names = [label_class(name) for name in source.class_names]
    shown = predictions._replace(names=remove_folder(predictions.names))
    page = render_page(
        "multi_label_evaluation.html",
        title=title,
        subtitle=subtitle,
        facts=[
            ("images", f"{metrics.num_examples:,}"),
            ("mAP", f"{metrics.mean_average_precision:.2%}"),
            ("micro AP", f"{metrics.micro_average_precision:.2%}"),
            ("loss", f"{metrics.loss:.4f}"),
            ("labels per image", f"{labels.sum(axis=1).mean():.2f}"),
        ],
        counts=metrics.format_counts(),
        class_rows=_format_classes(metrics, thresholded, names),
        num_absent=len(names) - metrics.num_scored_classes,
        false_positives=list(_show_errors(source, shown, names, exif_orientation, is_label=False)),
        num_false_positives=f"{int((predicted & ~labels).sum()):,}",
        missed=list(_show_errors(source, shown, names, exif_orientation, is_label=True)),
        num_missed=f"{int((labels & ~predicted).sum()):,}",
        **list_unusable_images(shown.names, shown.errors),
    )
    for name, values in zip(source.class_names, thresholded, strict=True):
        scores = {"precision": values.precision, "recall": values.recall, "f1": values.f1}
        summary["classes"][name] |= scores
    write_files(path, page, summary, _prediction_rows(predictions, source.class_names))


def worst_images(
    predictions: MultiLabelPredictions, is_label: bool, count: int
) -> list[tuple[int, int]]:
    """Finds the images with the worst errors, and the class of the worst error of each.

    Args:
        predictions: Predictions for a source.
        is_label: Whether to find labels that are missed, the least probable first; otherwise,
            predictions that are no labels, the most probable first.
        count: Number of images.
    """
    wrong = predictions.labels if is_label else ~predictions.labels
    wrong = wrong & (predictions.predicted != predictions.labels) & predictions.mask[:, None]
    errors: Float[np.ndarray, "n classes"] = np.where(
        wrong, np.abs(predictions.labels - predictions.probabilities), -1.0
    )
    classes = errors.argmax(axis=1)
    worst = errors.max(axis=1)
    order = np.argsort(-worst, kind="stable")[:count]
    return [(index, int(classes[index])) for index in order.tolist() if worst[index] >= 0]


def _show_errors(
    source: Source,
    predictions: MultiLabelPredictions,
    names: Sequence[str],
    exif_orientation: bool,
    is_label: bool,
) -> Iterator[dict[str, Any]]:
    """Lists images of `worst_images` with the class, its probability and all labels."""
    for index, class_index in worst_images(predictions, is_label, NUM_MISTAKES // 2):
        labels = [names[k] for k in np.flatnonzero(predictions.labels[index]).tolist()]
        yield {
            "uri": read_thumbnail(source, index, exif_orientation),
            "name": predictions.names[index],
            "class_name": names[class_index],
            "probability": f"{predictions.probabilities[index, class_index]:.1%}",
            "labels": ", ".join(labels) or "none",
        }


def _format_classes(
    metrics: MultiLabelMetrics, thresholded: Sequence[ClassMetrics], names: Sequence[str]
) -> list[list[str]]:
    """Formats the classes that have an image, lowest average precision first."""
    found = [k for k, values in enumerate(metrics.classes) if values.num_images]
    found.sort(key=lambda k: (metrics.classes[k].average_precision, k))
    return [
        [
            names[k],
            str(k),
            f"{metrics.classes[k].average_precision:.2%}",
            *(f"{value:.2%}" for value in thresholded[k][:3]),
            f"{metrics.classes[k].num_images:,}",
        ]
        for k in found
    ]


def _prediction_rows(
    predictions: MultiLabelPredictions, class_names: Sequence[str]
) -> Iterator[list[str]]:
    """Yields one line per image, with the probabilities of all or of the most probable classes."""
    names = [escape_formula(name) for name in class_names]
    num_shown = len(names) if len(names) <= MAX_ALL_CLASSES else NUM_TOP

    def join(is_member: Bool[np.ndarray, " classes"]) -> str:
        members = np.flatnonzero(is_member).tolist()
        return escape_formula(_SEPARATOR.join(class_names[k] for k in members))

    header = ["image", "labels", "predictions", "error", *probability_titles(class_names)]
    yield header
    for index, image in enumerate(predictions.names):
        row = [escape_formula(image)]
        if not predictions.mask[index]:
            yield [*row, "", "", predictions.errors[index]] + [""] * (len(header) - 4)
            continue
        row += [join(predictions.labels[index]), join(predictions.predicted[index]), ""]
        probabilities = predictions.probabilities[index]
        classes = np.argsort(-probabilities, kind="stable")[:num_shown]
        yield row + format_probabilities(names, classes, probabilities[classes])
