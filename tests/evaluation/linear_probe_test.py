"""Tests of the linear probe: sums gathered in chunks say what scikit-learn says of the whole."""

import numpy as np
import pytest

from mixer_jax.evaluation.linear_probe import L2_REGS, SufficientStatistics
from tests.evaluation.few_shot_test import judge_by_ridge


def gather(
    features: np.ndarray, labels: np.ndarray, chunk: int, num_classes: int = 10
) -> SufficientStatistics:
    moments = SufficientStatistics(num_classes)
    for start in range(0, len(features), chunk):
        moments.add(features[start : start + chunk], labels[start : start + chunk])
    return moments


@pytest.mark.parametrize("chunk", [1, 100, 1437])
@pytest.mark.parametrize("penalty", [L2_REGS[0], 2.0**10, L2_REGS[-1]])
def test_scores_are_those_of_ridge_regression(
    chunk: int,
    penalty: float,
    train_features: tuple[np.ndarray, np.ndarray],
    test_features: tuple[np.ndarray, np.ndarray],
) -> None:
    moments = gather(*train_features, chunk)
    assert moments.count == 1437
    scores = moments.solve().at(penalty).scores(test_features[0])
    expected = judge_by_ridge(*train_features, test_features[0], 10, penalty)
    np.testing.assert_allclose(scores, expected, atol=1e-6, rtol=0)
    assert (scores.argmax(1) == expected.argmax(1)).all()


def test_fewer_examples_than_features() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(12, 30)), np.arange(12) % 3
    asked = rng.normal(size=(50, 30))
    scores = gather(features, labels, 5, 3).solve().at(8.0).scores(asked)
    expected = judge_by_ridge(features, labels, asked, 3, 8.0)
    np.testing.assert_allclose(scores, expected, atol=1e-8)


def test_nothing_is_lost_far_from_zero_or_when_classes_come_one_after_the_other() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 50)
    near = rng.normal(size=(200, 6)) + rng.normal(size=(4, 6))[labels]
    # Squares of such numbers leave nothing of the deviations in float64.
    far = near + 1e8
    path = gather(far, labels, 25, 4).solve()
    expected = judge_by_ridge(near, labels, near, 4)
    np.testing.assert_allclose(path.at(2.0**10).scores(far), expected, atol=1e-5)


def test_right_answers_are_counted_for_every_penalty(
    train_features: tuple[np.ndarray, np.ndarray], test_features: tuple[np.ndarray, np.ndarray]
) -> None:
    path = gather(*train_features, 500).solve()
    right = path.count_correct(*test_features, L2_REGS)
    expected = [
        (path.at(penalty).scores(test_features[0]).argmax(1) == test_features[1]).sum()
        for penalty in L2_REGS
    ]
    assert right.tolist() == expected
    assert len(set(expected)) > 3


def test_what_was_solved_does_not_change_when_more_is_added() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 5)), np.arange(40) % 2
    moments = gather(features, labels, 40, 2)
    path = moments.solve()
    before = path.at(1.0).scores(features)
    moments.add(features + 3, labels)
    assert (path.at(1.0).scores(features) == before).all()
