"""Tests of ridge regression and of the k-NN classifier, against scikit-learn."""

import tracemalloc

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from mixer_jax.evaluation import classifiers
from mixer_jax.evaluation.classifiers import (
    L2_REGS,
    KnnClassifier,
    SufficientStatistics,
    fit_ridge,
    solve_ridge,
    top_k,
)
from mixer_jax.evaluation.probes import sample_few_shot

TEN = tuple("0123456789")


def reference_ridge_scores(
    features: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    num_classes: int,
    alpha: float = 1024.0,
) -> np.ndarray:
    """Computes the scores (n, classes) of scikit-learn's ridge regression."""
    x, z = features.astype(np.float64), queries.astype(np.float64)
    mean, std = x.mean(0), np.sqrt(((x - x.mean(0)) ** 2).mean(0)) + 1e-5
    columns = [np.hstack([(rows - mean) / std, 100 * np.ones((len(rows), 1))]) for rows in (x, z)]
    targets = 2.0 * np.eye(num_classes)[labels] - 1
    # By singular values, which is neither of the forms under test.
    ridge = Ridge(alpha=alpha, fit_intercept=False, solver="svd").fit(columns[0], targets)
    return ridge.predict(columns[1])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("n", "d"), [(10, 40), (39, 40), (40, 40), (41, 40), (250, 40), (20, 1)])
def test_fit_ridge_agrees_with_scikit_learn(n: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-3, 3, d)
    labels = np.arange(n) % 5
    centers = rng.normal(size=(5, d))
    features = ((rng.normal(size=(n, d)) + centers[labels]) * scales + 7).astype(np.float32)
    queries = (rng.normal(size=(300, d)) * scales + 7).astype(np.float32)
    scores = fit_ridge(features, labels, 5).scores(queries)
    expected = reference_ridge_scores(features, labels, queries, 5)
    np.testing.assert_allclose(scores, expected, atol=1e-6, rtol=0)
    assert (scores.argmax(1) == expected.argmax(1)).all()
    # The scores are not constant, so that the regularization of the bias matters.
    assert scores.std(axis=0).min() > 1e-4


@pytest.mark.parametrize("shots", [1, 2, 5, 25])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fit_ridge_on_features_of_a_mixer(
    shots: int,
    seed: int,
    train_features: tuple[np.ndarray, np.ndarray],
    test_features: tuple[np.ndarray, np.ndarray],
) -> None:
    features, labels = train_features
    sample = sample_few_shot(labels.tolist(), TEN, shots=shots, seed=seed, name="digits").ravel()
    scores = fit_ridge(features[sample], labels[sample], 10).scores(test_features[0])
    expected = reference_ridge_scores(features[sample], labels[sample], test_features[0], 10)
    np.testing.assert_allclose(scores, expected, atol=1e-6, rtol=0)
    assert (scores.argmax(1) == expected.argmax(1)).all()
    assert (scores.argmax(1) == test_features[1]).mean() > 0.15


@pytest.mark.parametrize("l2_reg", [1e-3, 1024.0])
@pytest.mark.parametrize(("n", "columns"), [(30, 20), (20, 30)])
def test_solve_ridge_equals_both_forms(n: int, columns: int, l2_reg: float) -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(n, columns)), rng.integers(3, size=n)
    y = 2.0 * np.eye(3)[labels] - 1
    first = np.linalg.inv(x.T @ x + l2_reg * np.eye(columns)) @ x.T @ y
    second = x.T @ np.linalg.inv(x @ x.T + l2_reg * np.eye(n)) @ y
    solved = solve_ridge(x, labels, 3, l2_reg)
    np.testing.assert_allclose(solved, first, atol=1e-8)
    np.testing.assert_allclose(solved, second, atol=1e-8)


def test_fit_ridge_needs_no_matrix_of_examples_and_classes() -> None:
    rng = np.random.default_rng(0)
    num_classes, dim = 2_000, 8
    labels = np.tile(np.arange(num_classes), 5)
    features = rng.normal(size=(len(labels), dim)).astype(np.float32)
    tracemalloc.start()
    try:
        classifier = fit_ridge(features, labels, num_classes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A few copies of the features and of the weights; targets would take 160 MB.
    assert peak < 6 * 8 * (features.size + num_classes * dim)
    expected = reference_ridge_scores(features, labels, features[:50], num_classes)
    np.testing.assert_allclose(classifier.scores(features[:50]), expected, atol=1e-9)


def test_fit_ridge_ignores_constant_features() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(20, 3)), np.arange(20) % 2
    constant = np.concatenate([features, np.full((20, 1), 0.3)], axis=1)
    without = fit_ridge(features, labels, 2).scores(features)
    np.testing.assert_allclose(fit_ridge(constant, labels, 2).scores(constant), without, atol=1e-9)


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


def reference_knn_scores(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, num_neighbors: int = 20
) -> np.ndarray:
    reference = KNeighborsClassifier(
        min(num_neighbors, len(bank)),
        metric="cosine",
        algorithm="brute",
        weights=lambda distances: np.exp((1 - distances) / 0.07),
    )
    return reference.fit(bank.astype(np.float64), labels).predict_proba(queries.astype(np.float64))


@pytest.mark.parametrize("bank_rows", [7, 100, 4096])
def test_scores_on_features_of_a_mixer(
    bank_rows: int,
    train_features: tuple[np.ndarray, np.ndarray],
    test_features: tuple[np.ndarray, np.ndarray],
) -> None:
    classifier = KnnClassifier(*train_features, 10, bank_rows=bank_rows)
    scores = classifier.scores(test_features[0])
    expected = reference_knn_scores(*train_features, test_features[0])
    np.testing.assert_allclose(scores, expected, atol=1e-6, rtol=0)
    assert (scores.argmax(1) == expected.argmax(1)).all()
    assert (scores.argmax(1) == test_features[1]).mean() > 0.5


@pytest.mark.parametrize(("n", "queries"), [(5, 3), (20, 1), (700, 1300)])
def test_scores_of_random_features_and_small_banks(n: int, queries: int) -> None:
    rng = np.random.default_rng(n)
    bank, labels = rng.normal(size=(n, 8)), np.arange(n) % 4
    features = rng.normal(size=(queries, 8)) * 1e-3
    scores = KnnClassifier(bank, labels, 4, bank_rows=64).scores(features)
    expected = reference_knn_scores(bank, labels, features)
    np.testing.assert_allclose(scores, expected, atol=1e-6, rtol=0)
    assert (scores.argmax(1) == expected.argmax(1)).all()
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-12)


def test_scores_by_definition() -> None:
    bank = np.array([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    classifier = KnnClassifier(bank, np.array([0, 1, 1]), 3, num_neighbors=2, temperature=0.5)
    near, far = np.exp(0.8 / 0.5), np.exp(0.6 / 0.5)
    expected = [[near / (near + far), far / (near + far), 0.0]]
    np.testing.assert_allclose(classifier.scores(np.array([[4.0, 3.0]])), expected, atol=1e-12)


@pytest.mark.parametrize("bank_rows", [1, 2, 3, 8])
def test_scores_break_ties_by_index(bank_rows: int) -> None:
    bank = np.array([[0.0, 1.0], [3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    classifier = KnnClassifier(bank, np.arange(5), 5, num_neighbors=2, bank_rows=bank_rows)
    scores = classifier.scores(np.array([[1.0, 0.0], [0.0, 2.0]]))
    np.testing.assert_allclose(scores, [[0, 0.5, 0.5, 0, 0], [0.5, 0, 0, 0, 0.5]], atol=1e-12)


def test_top_k_breaks_ties_by_column() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(6, size=(200, 30)).astype(np.float64)
    values[:50] = rng.normal(size=(50, 30))
    for count in (1, 4, 30):
        expected = np.argsort(-values, axis=1, kind="stable")[:, :count]
        assert (top_k(values, count) == expected).all()


def test_scores_of_zero_features() -> None:
    classifier = KnnClassifier(np.zeros((2, 3)), np.array([0, 1]), 2)
    assert classifier.scores(np.zeros((1, 3))).tolist() == [[0.5, 0.5]]


def test_scores_normalize_the_bank_once_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(300, 8)), rng.normal(size=(2_000, 8))
    normalized: list[int] = []

    def count(features: np.ndarray) -> np.ndarray:
        normalized.append(len(features))
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    monkeypatch.setattr(classifiers, "_normalize", count)
    KnnClassifier(bank, np.arange(300) % 4, 4, bank_rows=100).scores(queries)
    assert normalized == [2_000, 100, 100, 100]
