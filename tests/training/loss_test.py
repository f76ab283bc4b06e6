"""Tests of targets and loss: label smoothing, labels per image, class weights, and formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.config.schema import RecipeConfig
from mixer_jax.training.loss import cross_entropy, make_targets


def test_cross_entropy_equals_float64_formulas() -> None:
    logits = jnp.array([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
    labels = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.7, 0.3]])
    z, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    p = 1 / (1 + np.exp(-z))
    sigmoid = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(1).mean()
    softmax = -(y * np.log(np.exp(z) / np.exp(z).sum(1, keepdims=True))).sum(1).mean()
    assert float(cross_entropy(logits, labels, "sigmoid")) == pytest.approx(sigmoid, rel=1e-6)
    assert float(cross_entropy(logits, labels, "softmax")) == pytest.approx(softmax, rel=1e-6)


def test_label_smoothing_spreads_mass_evenly() -> None:
    targets = np.asarray(make_targets(jnp.array([2]), 4, RecipeConfig(label_smoothing=0.2)))
    np.testing.assert_allclose(targets, [[0.05, 0.05, 0.85, 0.05]], rtol=1e-6)


def test_min_target_moves_both_targets_of_binary_decisions() -> None:
    targets = np.asarray(make_targets(jnp.array([2]), 1_000, RecipeConfig(min_target=1e-4)))
    assert targets[0, 2] == np.float32(1 - 1e-4)
    assert set(np.delete(targets[0], 2)) == {np.float32(1e-4)}


def test_multi_hot_labels_are_targets() -> None:
    labels = jnp.array([[True, False, True], [False, False, False]])
    targets = make_targets(labels, 3, RecipeConfig())
    np.testing.assert_array_equal(targets, [[1, 0, 1], [0, 0, 0]])
    clipped = make_targets(labels, 3, RecipeConfig(min_target=0.1))
    np.testing.assert_allclose(clipped[0], [0.9, 0.1, 0.9], rtol=1e-6)


CLASS_WEIGHTS = np.array([0.5, 2.0, 5.0], np.float32)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_mixed_examples_are_those_of_their_labels(loss: str, smoothing: float) -> None:
    """Linear in the two examples of a mixture, each with the weight of its own label."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)
    recipe, labels = RecipeConfig(label_smoothing=smoothing), ([0, 1, 2], [2, 0, 2])
    first, second = (make_targets(jnp.array(y), 3, recipe) for y in labels)
    weighted = [make_targets(jnp.array(y), 3, recipe, CLASS_WEIGHTS) for y in labels]
    mixed = 0.7 * weighted[0] + 0.3 * weighted[1]
    expected = np.mean(
        [
            share
            * CLASS_WEIGHTS[label]
            * float(cross_entropy(logits[i : i + 1], y[i : i + 1], loss))
            for share, y, classes in ((0.7, first, labels[0]), (0.3, second, labels[1]))
            for i, label in enumerate(classes)
        ]
    )
    # A mean over three examples of the sums of two parts each.
    found = float(cross_entropy(logits, mixed, loss, is_weighted=True))
    assert found == pytest.approx(2 * expected, rel=1e-5)
