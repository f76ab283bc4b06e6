"""Tests of few-shot ridge regression against scikit-learn, and of sampling the shots."""

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from mixer_jax.data.decode import BadImageError
from mixer_jax.data.source import Source
from mixer_jax.errors import UserError
from mixer_jax.evaluation.few_shot import (
    UNUSABLE,
    LazyLabels,
    fit_ridge,
    sample_few_shot,
    solve_ridge,
)
from tests.helpers.messages import mentions, raises

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
    centres = rng.normal(size=(5, d))
    features = ((rng.normal(size=(n, d)) + centres[labels]) * scales + 7).astype(np.float32)
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
    x, y = rng.normal(size=(n, columns)), rng.normal(size=(n, 3))
    first = np.linalg.inv(x.T @ x + l2_reg * np.eye(columns)) @ x.T @ y
    second = x.T @ np.linalg.inv(x @ x.T + l2_reg * np.eye(n)) @ y
    solved = solve_ridge(x, y, l2_reg)
    np.testing.assert_allclose(solved, first, atol=1e-8)
    np.testing.assert_allclose(solved, second, atol=1e-8)


def test_fit_ridge_ignores_constant_features() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(20, 3)), np.arange(20) % 2
    constant = np.concatenate([features, np.full((20, 1), 0.3)], axis=1)
    without = fit_ridge(features, labels, 2).scores(features)
    np.testing.assert_allclose(fit_ridge(constant, labels, 2).scores(constant), without, atol=1e-9)


def sample(labels: Any, shots: int, seed: int = 0, names: tuple[str, ...] = TEN) -> np.ndarray:
    return sample_few_shot(labels, names, shots=shots, seed=seed, name="digits train")


def test_sample_few_shot_is_nested_balanced_and_seeded() -> None:
    labels = np.random.default_rng(0).integers(10, size=2000).tolist()
    most = sample(labels, 25)
    assert most.shape == (25, 10)
    assert len(np.unique(most)) == 250
    assert (np.array(labels)[most] == np.arange(10)).all()
    for shots in (1, 5, 10):
        assert (sample(labels, shots) == most[:shots]).all()
    assert (sample(labels, 25) == most).all()
    assert (sample(labels, 25, seed=1) != most).mean() > 0.9


def test_sample_few_shot_is_uniform() -> None:
    labels = [0, 1, 1, 0, 1, 1, 1, 0]
    counts = np.zeros(8)
    for seed in range(600):
        counts[sample(labels, 1, seed, ("a", "b"))[0]] += 1
    # Three standard deviations of the binomial distribution around 200 for class a, 120 for b.
    assert (abs(counts - np.where(labels, 120, 200)) < 36).all()


def test_sample_few_shot_rejects_too_few_examples() -> None:
    with raises(UserError, "digits train", "dog", "9", "10") as few:
        sample([0, 1] * 9 + [0] * 20, 10, names=("cat", "dog"))
    assert not mentions(str(few.value), "cat")
    with raises(UserError, "digits train", "dog", "0", "1"):
        sample([0] * 9, 1, names=("cat", "dog"))


class CountingList(list[Any]):
    """List that counts its reads."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        item = super().__getitem__(index)
        if item["image"] == b"broken":
            raise BadImageError("truncated", name=item["name"])
        return item


def make_source(count: int, broken: tuple[int, ...] = ()) -> tuple[Source, CountingList]:
    examples = CountingList()
    for index in range(count):
        image = b"broken" if index in broken else b""
        examples.append({"image": image, "labels": (index % 10,), "name": f"no. {index}"})
    return Source("many", examples, TEN), examples


def test_lazy_labels_read_only_what_is_needed_and_once() -> None:
    source, examples = make_source(10_000)
    labels = LazyLabels(source, skip_bad=False)
    first = sample(labels, 5)
    assert 50 <= examples.reads < 500
    before = examples.reads
    assert (sample(labels, 5) == first).all()
    assert examples.reads == before


def test_lazy_labels_skip_unreadable_examples_or_raise() -> None:
    intact, _ = make_source(200)
    broken = tuple(sample(LazyLabels(intact, skip_bad=False), 1)[0, :3].tolist())
    source, _ = make_source(200, broken)
    with raises(UserError, "many", "1", "truncated") as caught:
        sample(LazyLabels(source, skip_bad=False), 1)
    assert any(mentions(str(caught.value), f"no. {index}") for index in broken)
    labels = LazyLabels(source, skip_bad=True)
    indices = sample(labels, 1)[0]
    assert not set(indices) & set(broken)
    assert (indices % 10 == np.arange(10)).all()
    assert labels.bad == set(broken)
    assert labels[broken[0]] == UNUSABLE
