"""Tests of multi-label metrics, against scikit-learn and over batches and devices."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, log_loss

from mixer_jax.data.source import Source
from mixer_jax.distributed.sharding import shard_params
from mixer_jax.errors import UserError
from mixer_jax.evaluation.classification import make_evaluator
from mixer_jax.evaluation.multi_label import (
    ExampleScores,
    MultiLabelMetrics,
    aggregate_scores,
    make_score_step,
    score_source,
)
from mixer_jax.models.mixer import MlpMixer
from mixer_jax.models.registry import get_family
from tests.evaluation.conftest import make_input_config
from tests.helpers.batches import mesh_of
from tests.helpers.messages import mentions, raises

# Of these, the fourth has no image.
NAMES = tuple("abcde")
EMPTY = 3


def random_scores(count: int = 200) -> ExampleScores:
    """Scores with many ties, one class without any image and one that every image has."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(count, len(NAMES))).round(1).astype(np.float32)
    labels = rng.random(logits.shape) < [0.5, 0.02, 0.3, 0.0, 1.0]
    columns: list[Any] = [logits, labels, rng.random(count), rng.random(count) < 0.8]
    return ExampleScores(*columns)


def test_average_precision_equals_that_of_scikit_learn() -> None:
    scores = random_scores()
    metrics = aggregate_scores(scores, NAMES)
    mask: Any = scores.mask
    logits, labels = np.asarray(scores.logits)[mask], np.asarray(scores.labels)[mask]
    assert len(np.unique(logits)) < 100
    used = [k for k in range(len(NAMES)) if k != EMPTY]
    expected = average_precision_score(labels[:, used], logits[:, used], average=None)
    assert [metrics.classes[k].average_precision for k in used] == expected.tolist()
    assert np.isnan(metrics.classes[EMPTY].average_precision)
    assert [values.num_images for values in metrics.classes] == labels.sum(0).tolist()
    assert metrics.mean_average_precision == pytest.approx(expected.mean(), rel=1e-15)
    micro = average_precision_score(labels, logits, average="micro")
    assert metrics.micro_average_precision == micro
    assert metrics.loss == pytest.approx(np.asarray(scores.loss)[mask].mean(), rel=1e-12)
    assert (metrics.num_examples, metrics.num_scored_classes) == (mask.sum(), 4)
    assert mentions(metrics.format_progress(), f"{metrics.mean_average_precision:.2%}", "4", "5")


def test_average_precision_of_ties_is_the_frequency_of_the_class() -> None:
    scores = random_scores()
    tied = scores._replace(logits=jnp.zeros_like(scores.logits))
    metrics = aggregate_scores(tied, NAMES)
    for values in metrics.classes:
        if values.num_images:
            frequency = values.num_images / metrics.num_examples
            assert values.average_precision == pytest.approx(frequency)


def test_metrics_of_a_diverged_model_are_nan() -> None:
    scores = random_scores()
    logits = jnp.asarray(scores.logits).at[int(np.flatnonzero(scores.mask)[0])].set(np.nan)
    metrics = aggregate_scores(scores._replace(logits=logits), NAMES)
    assert np.isnan([metrics.mean_average_precision, metrics.micro_average_precision]).all()


def test_json_has_no_average_precision_of_classes_without_images() -> None:
    values = aggregate_scores(random_scores(), NAMES).as_json()
    assert values["classes"]["d"] == {
        "class_index": EMPTY,
        "average_precision": None,
        "num_images": 0,
    }
    assert values["classes"]["e"]["average_precision"] == 1.0


@pytest.fixture(scope="module")
def several(digits_test: Source) -> Source:
    """Digits with two labels each, or none for every ninth of them, which counts all the same."""
    examples = [dict(digits_test.examples[index]) for index in range(100)]
    for index, example in enumerate(examples):
        (label,) = example["labels"]
        example["labels"] = () if index % 9 == 0 else (label, (label + 1 + index % 3) % 10)
        example["image"] = b"broken" if index in (10, 18) else example["image"]
    return Source("several", examples, digits_test.class_names, multi_label=True)


@pytest.mark.parametrize(("batch_size", "layout"), [(7, (1, 1)), (40, (8, 1)), (100, (2, 4))])
def test_every_example_counts_once_for_any_batch_size_and_devices(
    batch_size: int,
    layout: tuple[int, int],
    tiny_model: MlpMixer,
    tiny_params: Any,
    several: Source,
) -> None:
    mesh = mesh_of(*layout)
    params = shard_params(tiny_params, mesh, get_family("mixer"))
    step = make_score_step(tiny_model, mesh)
    config = make_input_config(batch_size, skip_bad=True)
    metrics, scores, bad = score_source(step, params, several, mesh, config)
    assert (metrics.num_examples, metrics.num_bad, len(bad)) == (98, 2, 2)
    labels, mask = np.asarray(scores.labels), np.asarray(scores.mask)
    for index, example in enumerate(several.examples):
        is_good = example["image"] != b"broken"
        assert mask[index] == is_good
        if is_good:
            assert tuple(np.flatnonzero(labels[index])) == tuple(sorted(example["labels"]))
    logits = np.asarray(scores.logits, np.float64)[mask]
    labels = labels[mask]
    expected = average_precision_score(labels, logits, average=None)
    found = [values.average_precision for values in metrics.classes]
    assert found == pytest.approx(expected.tolist(), abs=1e-12)
    probabilities = 1 / (1 + np.exp(-logits))
    loss = sum(log_loss(labels[:, k], probabilities[:, k], labels=[0, 1]) for k in range(10))
    assert metrics.loss == pytest.approx(loss, rel=1e-5)
    # The same for all layouts.
    assert metrics.mean_average_precision == pytest.approx(0.2, abs=0.1)
    reference = evaluate(tiny_model, tiny_params, several, multi_label=True)
    assert metrics[:3] == pytest.approx(reference[:3], rel=1e-5)


def evaluate(model: MlpMixer, params: Any, source: Source, multi_label: bool) -> Any:
    mesh = mesh_of(1, 1)
    config = make_input_config(100, skip_bad=True)
    return make_evaluator(model, mesh, config, multi_label)(source, params)


def test_the_model_decides_which_metrics_a_source_gets(
    tiny_model: MlpMixer, tiny_params: Any, several: Source, digits_test: Source
) -> None:
    metrics = evaluate(tiny_model, tiny_params, several, multi_label=False)
    # ReaL accuracy leaves out images without a correct answer.
    assert (metrics.num_examples, metrics.num_unlabeled) == (87, 11)
    metrics = evaluate(tiny_model, tiny_params, digits_test, multi_label=True)
    assert isinstance(metrics, MultiLabelMetrics)
    assert metrics.num_examples == sum(values.num_images for values in metrics.classes) == 360


def test_a_source_without_any_label_is_an_error(
    tiny_model: MlpMixer, tiny_params: Any, several: Source
) -> None:
    examples = [{**several.examples[0], "labels": ()}]
    for source in (
        dataclasses.replace(several, examples=examples, name="unlabeled"),
        dataclasses.replace(several, examples=[], name="unlabeled"),
    ):
        with raises(UserError, "unlabeled"):
            evaluate(tiny_model, tiny_params, source, multi_label=True)
