"""Tests of the linear probe: statistics accumulated in chunks give scikit-learn's solution."""

import numpy as np
import pytest

from mixer_jax.evaluation.linear_probe import L2_REGS, SufficientStatistics
from tests.evaluation.few_shot_test import reference_ridge_scores


def accumulate(
    features: np.ndarray, labels: np.ndarray, chunk: int, num_classes: int = 10
) -> SufficientStatistics:
    stats = SufficientStatistics(num_classes)
    for start in range(0, len(features), chunk):
        stats.add(features[start : start + chunk], labels[start : start + chunk])
    return stats


@pytest.mark.parametrize("chunk", [1, 100, 1437])
@pytest.mark.parametrize("l2_reg", [L2_REGS[0], 2.0**10, L2_REGS[-1]])
def test_solve_agrees_with_scikit_learn(
    chunk: int,
    l2_reg: float,
    train_features: tuple[np.ndarray, np.ndarray],
    test_features: tuple[np.ndarray, np.ndarray],
) -> None:
    stats = accumulate(*train_features, chunk)
    assert stats.count == 1437
    scores = stats.solve().classifier(l2_reg).scores(test_features[0])
    expected = reference_ridge_scores(*train_features, test_features[0], 10, l2_reg)
    np.testing.assert_allclose(scores, expected, atol=1e-6, rtol=0)
    assert (scores.argmax(1) == expected.argmax(1)).all()


def test_solve_with_fewer_examples_than_features() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(12, 30)), np.arange(12) % 3
    queries = rng.normal(size=(50, 30))
    scores = accumulate(features, labels, 5, 3).solve().classifier(8.0).scores(queries)
    expected = reference_ridge_scores(features, labels, queries, 3, 8.0)
    np.testing.assert_allclose(scores, expected, atol=1e-8)


def test_solve_is_accurate_far_from_zero_and_for_sorted_classes() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 50)
    near = rng.normal(size=(200, 6)) + rng.normal(size=(4, 6))[labels]
    # In float64, squares of such numbers lose the variance entirely.
    far = near + 1e8
    path = accumulate(far, labels, 25, 4).solve()
    expected = reference_ridge_scores(near, labels, near, 4)
    np.testing.assert_allclose(path.classifier(2.0**10).scores(far), expected, atol=1e-5)


def test_count_correct_equals_each_classifier(
    train_features: tuple[np.ndarray, np.ndarray], test_features: tuple[np.ndarray, np.ndarray]
) -> None:
    path = accumulate(*train_features, 500).solve()
    counts = path.count_correct(*test_features, L2_REGS)
    expected = [
        (path.classifier(l2_reg).scores(test_features[0]).argmax(1) == test_features[1]).sum()
        for l2_reg in L2_REGS
    ]
    assert counts.tolist() == expected
    assert len(set(expected)) > 3


def test_solve_is_independent_of_later_examples() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 5)), np.arange(40) % 2
    stats = accumulate(features, labels, 40, 2)
    path = stats.solve()
    before = path.classifier(1.0).scores(features)
    stats.add(features + 3, labels)
    assert (path.classifier(1.0).scores(features) == before).all()
