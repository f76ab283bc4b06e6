"""Tests of few-shot least squares, judged by scikit-learn, and of drawing the shots."""

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


def judge_by_ridge(
    features: np.ndarray,
    labels: np.ndarray,
    asked: np.ndarray,
    num_classes: int,
    alpha: float = 1024.0,
) -> np.ndarray:
    """Returns the scores (n, classes) of scikit-learn's ridge regression."""
    x, z = features.astype(np.float64), asked.astype(np.float64)
    mean, deviation = x.mean(0), np.sqrt(((x - x.mean(0)) ** 2).mean(0)) + 1e-5
    columns = [
        np.hstack([(rows - mean) / deviation, 100 * np.ones((len(rows), 1))]) for rows in (x, z)
    ]
    targets = 2.0 * np.eye(num_classes)[labels] - 1
    # Least squares by singular values, which is neither of the forms that are tested.
    ridge = Ridge(alpha=alpha, fit_intercept=False, solver="svd").fit(columns[0], targets)
    return ridge.predict(columns[1])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("n", "d"), [(10, 40), (39, 40), (40, 40), (41, 40), (250, 40), (20, 1)])
def test_scores_are_those_of_ridge_regression(n: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-3, 3, d)
    labels = np.arange(n) % 5
    centres = rng.normal(size=(5, d))
    features = ((rng.normal(size=(n, d)) + centres[labels]) * scales + 7).astype(np.float32)
    asked = (rng.normal(size=(300, d)) * scales + 7).astype(np.float32)
    scores = fit_ridge(features, labels, 5).scores(asked)
    expected = judge_by_ridge(features, labels, asked, 5)
    np.testing.assert_allclose(scores, expected, atol=1e-6, rtol=0)
    assert (scores.argmax(1) == expected.argmax(1)).all()
    # The scores are no mere constants, so the penalty on the intercept is seen too.
    assert scores.std(axis=0).min() > 1e-4


@pytest.mark.parametrize("shots", [1, 2, 5, 25])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_the_features_of_a_mixer(
    shots: int,
    seed: int,
    train_features: tuple[np.ndarray, np.ndarray],
    test_features: tuple[np.ndarray, np.ndarray],
) -> None:
    features, labels = train_features
    drawn = sample_few_shot(labels.tolist(), TEN, shots=shots, seed=seed, name="digits").ravel()
    scores = fit_ridge(features[drawn], labels[drawn], 10).scores(test_features[0])
    expected = judge_by_ridge(features[drawn], labels[drawn], test_features[0], 10)
    np.testing.assert_allclose(scores, expected, atol=1e-6, rtol=0)
    assert (scores.argmax(1) == expected.argmax(1)).all()
    assert (scores.argmax(1) == test_features[1]).mean() > 0.15


@pytest.mark.parametrize("penalty", [1e-3, 1024.0])
@pytest.mark.parametrize(("n", "columns"), [(30, 20), (20, 30)])
def test_both_forms_of_the_solution_agree(n: int, columns: int, penalty: float) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, columns)), rng.normal(size=(n, 3))
    first = np.linalg.inv(x.T @ x + penalty * np.eye(columns)) @ x.T @ y
    second = x.T @ np.linalg.inv(x @ x.T + penalty * np.eye(n)) @ y
    solved = solve_ridge(x, y, penalty)
    np.testing.assert_allclose(solved, first, atol=1e-8)
    np.testing.assert_allclose(solved, second, atol=1e-8)


def test_a_feature_that_never_changes_does_no_harm() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(20, 3)), np.arange(20) % 2
    dead = np.concatenate([features, np.full((20, 1), 0.3)], axis=1)
    without = fit_ridge(features, labels, 2).scores(features)
    np.testing.assert_allclose(fit_ridge(dead, labels, 2).scores(dead), without, atol=1e-9)


def draw(labels: Any, shots: int, seed: int = 0, names: tuple[str, ...] = TEN) -> np.ndarray:
    return sample_few_shot(labels, names, shots=shots, seed=seed, name="digits train")


def test_shots_are_nested_balanced_and_follow_from_the_seed() -> None:
    labels = np.random.default_rng(0).integers(10, size=2000).tolist()
    whole = draw(labels, 25)
    assert whole.shape == (25, 10)
    assert len(np.unique(whole)) == 250
    assert (np.array(labels)[whole] == np.arange(10)).all()
    for shots in (1, 5, 10):
        assert (draw(labels, shots) == whole[:shots]).all()
    assert (draw(labels, 25) == whole).all()
    assert (draw(labels, 25, seed=1) != whole).mean() > 0.9


def test_every_example_is_as_likely_to_be_drawn() -> None:
    labels = [0, 1, 1, 0, 1, 1, 1, 0]
    counts = np.zeros(8)
    for seed in range(600):
        counts[draw(labels, 1, seed, ("a", "b"))[0]] += 1
    # Three deviations of the binomial distribution around 200 of class a, and 120 of b.
    assert (abs(counts - np.where(labels, 120, 200)) < 36).all()


def test_too_few_examples() -> None:
    with raises(UserError, "digits train", "dog", "9", "10") as few:
        draw([0, 1] * 9 + [0] * 20, 10, names=("cat", "dog"))
    assert not mentions(str(few.value), "cat")
    with raises(UserError, "digits train", "dog", "0", "1"):
        draw([0] * 9, 1, names=("cat", "dog"))


class Counted(list[Any]):
    """A list that counts how often it is read."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        item = super().__getitem__(index)
        if item["image"] == b"broken":
            raise BadImageError("truncated", name=item["name"])
        return item


def counted(count: int, broken: tuple[int, ...] = ()) -> tuple[Source, Counted]:
    examples = Counted()
    for index in range(count):
        image = b"broken" if index in broken else b""
        examples.append({"image": image, "labels": (index % 10,), "name": f"no. {index}"})
    return Source("many", examples, TEN), examples


def test_of_a_large_set_only_a_part_is_read_and_only_once() -> None:
    source, examples = counted(10_000)
    labels = LazyLabels(source, skip_bad=False)
    first = draw(labels, 5)
    assert 50 <= examples.reads < 500
    before = examples.reads
    assert (draw(labels, 5) == first).all()
    assert examples.reads == before


def test_examples_that_cannot_be_read() -> None:
    whole, _ = counted(200)
    broken = tuple(draw(LazyLabels(whole, skip_bad=False), 1)[0, :3].tolist())
    source, _ = counted(200, broken)
    with raises(UserError, "many", "1", "truncated") as caught:
        draw(LazyLabels(source, skip_bad=False), 1)
    assert any(mentions(str(caught.value), f"no. {index}") for index in broken)
    labels = LazyLabels(source, skip_bad=True)
    drawn = draw(labels, 1)[0]
    assert not set(drawn) & set(broken)
    assert (drawn % 10 == np.arange(10)).all()
    assert labels.bad == set(broken)
    assert labels[broken[0]] == UNUSABLE
