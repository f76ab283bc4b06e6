"""Targets that write reports from names which others chose."""

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import jax.numpy as jnp

from mixer_jax.data.source import Example, Source
from mixer_jax.evaluation.classification import ExampleMetrics, aggregate
from mixer_jax.visualization.evaluation_report import PAGE, write_report
from tests.fuzz.mutation import mutate_json
from tests.fuzz.target import Target
from tests.helpers.html_pages import check_stands_alone
from tests.visualization.evaluation_report_test import NAMES, make_predictions, make_source


@functools.cache
def _seeds() -> Sequence[bytes]:
    return [json.dumps({"classes": NAMES, "images": ["a.jpg", "b/c.png"], "error": "x"}).encode()]


def _write_report(data: bytes, folder: Path) -> None:
    """Writes the report of an evaluation; only names and reasons are foreign."""
    try:
        document = json.loads(data)
        classes = [str(name) for name in document["classes"]][:30]
        images = [str(name) for name in document["images"]][:12]
        error = str(document["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    if len(classes) < 2 or not images:
        return
    source = make_source(12, tuple(classes), 4)
    examples = [
        Example(
            image=example["image"], labels=example["labels"], name=images[i % len(images)] + str(i)
        )
        for i, example in enumerate(source.examples)
    ]
    source = Source("photos", examples, tuple(classes))
    predictions = make_predictions(source)
    predictions.mask[0] = False
    predictions = predictions._replace(errors={0: error})
    columns = (predictions.rank, predictions.log_likelihood, predictions.confidence)
    metrics = aggregate(ExampleMetrics(*map(jnp.asarray, (*columns, predictions.mask))))
    out = folder / "report"
    shutil.rmtree(out, ignore_errors=True)
    # Figures have no names of classes or files.
    with mock.patch(
        "mixer_jax.visualization.evaluation_report.encode_figure", return_value="data:"
    ):
        write_report(out, classes[0], images[0], source, metrics, predictions, {"a": 1}, False)
    check_stands_alone((out / PAGE).read_text("utf-8"))


TARGETS = [Target("report of an evaluation", _seeds, _write_report, mutate_json, 200)]
