"""Tests of classification metrics, against definitions in float64."""

from typing import Any

import jax
import numpy as np
import pytest
from sklearn.metrics import classification_report

from mixer_jax.evaluation.classification import (
    ClassificationMetrics,
    ExampleMetrics,
    aggregate,
    calibration_error,
    class_report,
    confused_pairs,
    per_example_metrics,
)
from tests.helpers.messages import raises
from tests.helpers.reference_metrics import log_softmax, reference_calibration_error

INFINITY = float("inf")
NAN = float("nan")


def to_example_metrics(*columns: Any) -> ExampleMetrics:
    arrays: list[Any] = [np.asarray(column) for column in columns]
    return ExampleMetrics(*arrays)


def compute_metrics(logits: np.ndarray, labels: list[int]) -> ExampleMetrics:
    mask = np.ones(len(labels), bool)
    target_mask = np.arange(logits.shape[1]) == np.array(labels)[:, None]
    return to_example_metrics(
        *jax.jit(per_example_metrics)(logits.astype(np.float32), target_mask, mask)
    )


@pytest.mark.parametrize(
    ("logits", "ranks"),
    [
        ([3.0, 1.0, 2.0], [0, 2, 1]),
        ([-7.0, -5.0, -9.0], [1, 0, 2]),
        ([2.0, 2.0, 1.0], [1, 1, 2]),
        ([1.0, 2.0, 2.0], [2, 1, 1]),
        ([4.0, 4.0, 4.0], [2, 2, 2]),
        ([0.0, -INFINITY, -INFINITY], [0, 2, 2]),
        ([NAN, 1.0, 2.0], [5, 5, 5]),
        ([NAN, NAN, NAN], [5, 5, 5]),
        ([INFINITY, 1.0, 2.0], [5, 5, 5]),
    ],
)
def test_per_example_metrics_rank_every_label(logits: list[float], ranks: list[int]) -> None:
    examples = compute_metrics(np.tile(logits, (3, 1)), [0, 1, 2])
    assert examples.rank.tolist() == ranks


@pytest.mark.parametrize("value", [0.0, -6.9, NAN])
def test_per_example_metrics_count_equal_logits_as_incorrect(value: float) -> None:
    examples = compute_metrics(np.full((10, 10), value), list(range(10)))
    assert (examples.rank == (10 if np.isnan(value) else 9)).all()


def test_per_example_metrics_log_likelihood_and_confidence() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=5, size=(100, 7)).astype(np.float32)
    labels = rng.integers(7, size=100)
    examples = compute_metrics(logits, labels.tolist())
    expected = log_softmax(logits)
    np.testing.assert_allclose(examples.log_likelihood, expected[range(100), labels], atol=5e-6)
    np.testing.assert_allclose(examples.confidence, np.exp(expected.max(1)), atol=1e-6)
    assert (examples.rank == (expected > expected[range(100), labels][:, None]).sum(1)).all()


def test_per_example_metrics_do_not_overflow() -> None:
    examples = compute_metrics(np.tile([1e30, 0.0, -1e30], (3, 1)), [0, 0, 1])
    assert examples.log_likelihood.tolist() == [0, 0, float(np.float32(-1e30))]
    assert examples.confidence.tolist() == [1, 1, 1]


REAL_LOGITS = np.array([[3.0, 1.0, 2.0, 0.0]])


@pytest.mark.parametrize(
    ("correct", "rank"),
    [([0], 0), ([1, 2], 1), ([1, 0], 0), ([3], 3), ([3, 1], 2), ([0, 1, 2, 3], 0), ([2, 3, 0], 0)],
)
def test_per_example_metrics_accept_any_correct_class(correct: list[int], rank: int) -> None:
    target_mask = np.isin(range(4), correct)[None]
    examples = to_example_metrics(
        *jax.jit(per_example_metrics)(REAL_LOGITS.astype(np.float32), target_mask, np.array([True]))
    )
    assert examples.rank.tolist() == [rank]
    expected = np.log(np.exp(log_softmax(REAL_LOGITS))[0, correct].sum())
    np.testing.assert_allclose(examples.log_likelihood, [expected], atol=1e-6)


@pytest.mark.parametrize("correct", [[0, 1], [0], [1, 2]])
def test_per_example_metrics_count_ties_against_the_model(correct: list[int]) -> None:
    logits = np.array([[2.0, 2.0, 2.0, 1.0]], np.float32)
    examples = jax.jit(per_example_metrics)(
        logits, np.isin(range(4), correct)[None], np.array([True])
    )
    # Ties among correct classes do no harm.
    assert examples.rank.tolist() == [3 - len(correct)]


def aggregate_ranks(
    rank: list[int], mask: list[bool] | None = None, **columns: list[float]
) -> ClassificationMetrics:
    values = {"log_likelihood": [-1.0] * len(rank), "confidence": [0.5] * len(rank)} | columns
    return aggregate(
        to_example_metrics(
            np.array(rank),
            np.array(values["log_likelihood"], np.float32),
            np.array(values["confidence"], np.float32),
            np.array([True] * len(rank) if mask is None else mask, bool),
        )
    )


@pytest.mark.parametrize(
    ("rank", "top1", "top5"),
    [([0], 1, 1), ([1], 0, 1), ([4], 0, 1), ([5], 0, 0), ([0, 1, 4, 5, 9, 0, 0, 3], 3 / 8, 6 / 8)],
)
def test_aggregate_top1_and_top5(rank: list[int], top1: float, top5: float) -> None:
    metrics = aggregate_ranks(rank)
    assert (metrics.top1, metrics.top5, metrics.num_examples) == (top1, top5, len(rank))


def test_aggregate_ignores_padding() -> None:
    padding = [NAN, 1.0]
    padded = aggregate_ranks(
        [0, 0, 7, 0],
        [True, False, True, False],
        log_likelihood=[-1.0, padding[0], -2.0, padding[1]],
        confidence=[0.75, padding[0], 0.5, padding[1]],
    )
    assert padded == ClassificationMetrics(0.5, 0.5, -1.5, (0.25 + 0.5) / 2, 2)


def test_aggregate_sums_are_exact() -> None:
    # In float32 a sum of ten million such numbers would be off by a tenth.
    value = float(np.float32(-0.1))
    metrics = aggregate_ranks([0] * 10**6, log_likelihood=[value] * 10**6)
    assert metrics.log_likelihood == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize("rank", [[], [0, 3]])
def test_aggregate_rejects_zero_examples(rank: list[int]) -> None:
    with raises(ValueError):
        aggregate_ranks(rank, [False] * len(rank))


@pytest.mark.parametrize(
    ("confidence", "is_correct", "expected"),
    [
        ([0.9], [True], 0.1),
        ([0.9], [False], 0.9),
        # Fifteen bins: the first two pairs fall into bins 7 and 13, each compared by its mean.
        ([0.5, 0.5, 0.9, 0.9], [True, False, True, True], (0 + 0.2) / 4),
        # One bin, from 3/15 to 4/15: the gaps of its members make up for one another ...
        ([0.21, 0.25], [False, True], (1 - 0.46) / 2),
        # ... and those on two sides of the edge at 3/15 do not.
        ([0.19, 0.21], [True, False], (0.81 + 0.21) / 2),
        # Certainty belongs to the last bin.
        ([1.0, 0.99], [True, False], (1.99 - 1) / 2),
        ([1.0] * 4, [False] * 4, 1),
        ([1.0] * 4, [True] * 4, 0),
        ([0.25] * 4 + [0.5] * 4 + [0.75] * 4, [i % 4 < n for n in (1, 2, 3) for i in range(4)], 0),
    ],
)
def test_calibration_error_by_definition(
    confidence: list[float], is_correct: list[bool], expected: float
) -> None:
    found = calibration_error(np.array(confidence), np.array(is_correct))
    assert found == pytest.approx(expected, abs=1e-12)


def test_calibration_error_agrees_with_reference() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(size=1000)
    is_correct = rng.uniform(size=1000) < confidence**2
    found = calibration_error(confidence, is_correct)
    expected = reference_calibration_error(confidence, is_correct)
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0.1 < found < 0.25


@pytest.mark.parametrize("num_classes", [1, 2, 4, 5, 10])
def test_aggregate_counts_nan_logits_as_incorrect(num_classes: int) -> None:
    logits = np.full((num_classes, num_classes), NAN)
    metrics = aggregate(compute_metrics(logits, list(range(num_classes))))
    assert (metrics.top1, metrics.top5, metrics.num_examples) == (0, 0, num_classes)
    # Zero would be a perfect calibration error.
    assert np.isnan(metrics.log_likelihood)
    assert np.isnan(metrics.calibration_error)


def test_class_report_has_the_classes_that_occur() -> None:
    labels, predicted = np.array([0, 0, 3]), np.array([0, 2, 3])
    report = class_report(labels, predicted)
    assert list(report.classes) == [0, 2, 3]
    # Predicted once, never correctly; without an image of its own.
    assert report.classes[2] == (0.0, 0.0, 0.0, 0)
    expected = classification_report(labels, predicted, output_dict=True, zero_division=0)
    for sort in ("macro", "weighted"):
        values = expected[f"{sort} avg"]
        assert report.averages[f"{sort} average"] == tuple(values.values())


def test_confused_pairs_are_sorted_by_frequency() -> None:
    labels, predicted = np.array([0, 1, 2, 2, 1, 1]), np.array([0, 0, 1, 1, 0, 2])
    assert confused_pairs(labels, predicted) == [(1, 0, 2), (2, 1, 2), (1, 2, 1)]
    assert confused_pairs(labels, labels) == []
