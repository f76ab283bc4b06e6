"""Tests of the k-NN classifier against scikit-learn."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from mixer_jax.evaluation import knn
from mixer_jax.evaluation.knn import KnnClassifier, top_k


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

    monkeypatch.setattr(knn, "_normalize", count)
    KnnClassifier(bank, np.arange(300) % 4, 4, bank_rows=100).scores(queries)
    assert normalized == [2_000, 100, 100, 100]
