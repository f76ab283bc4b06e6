"""Tests of mixup and CutMix: partners, distributions of weights and boxes, mixing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.config.schema import RecipeConfig
from mixer_jax.models.layers import normalize_images
from mixer_jax.training.mixup import ExamplePairs, MixupWeights, apply_mixup, sample_mixup


def test_a_recipe_without_mixing_leaves_examples_alone() -> None:
    images, targets = jnp.full((2, 2, 2, 3), 255, jnp.uint8), jnp.eye(2)
    pairs, weights = sample_mixup(jax.random.key(0), images, targets, RecipeConfig())
    assert (pairs.partner_images, pairs.partner_targets, weights) == (None, None, None)
    mixed, mixed_targets = apply_mixup(pairs, weights)
    np.testing.assert_array_equal(mixed, np.ones((2, 2, 2, 3)))
    np.testing.assert_array_equal(mixed_targets, targets)


def test_multi_hot_targets_mix() -> None:
    images = jnp.zeros((2, 2, 2, 3), jnp.uint8)
    targets = jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    pairs = ExamplePairs(images, images, targets, targets[::-1])
    _, mixed = apply_mixup(pairs, MixupWeights(jnp.float32(0.75)))
    np.testing.assert_array_equal(mixed, [[0.75, 0, 0.75], [0.25, 0, 0.25]])


def test_mixup_with_the_smaller_weight_mixes_the_reversed_batch() -> None:
    """BiT's weight may be below a half, which only reorders the mixed batch."""
    images = jax.random.randint(jax.random.key(0), (5, 2, 2, 3), 0, 256).astype(jnp.uint8)
    targets = jnp.eye(5)
    recipe = RecipeConfig(mixup=0.1)
    pairs, _ = sample_mixup(jax.random.key(1), images, targets, recipe)
    reverse, _ = sample_mixup(jax.random.key(1), images[::-1], targets[::-1], recipe)
    mixed, mixed_targets = apply_mixup(pairs, MixupWeights(jnp.float32(0.25)))
    expected, expected_targets = apply_mixup(reverse, MixupWeights(jnp.float32(0.75)))
    order = -np.arange(5) % 5
    np.testing.assert_allclose(mixed, expected[order], atol=1e-6)
    np.testing.assert_array_equal(mixed_targets, expected_targets[order])


def test_sample_mixup_weight_is_the_larger_of_two_beta_fractions() -> None:
    def sample_weight(rng: jax.Array) -> jax.Array:
        images, targets = jnp.zeros((2, 1, 1, 3), jnp.uint8), jnp.zeros((2, 3))
        _, weights = sample_mixup(rng, images, targets, RecipeConfig(mixup=0.5))
        assert weights is not None
        return weights.target

    weights = np.asarray(
        jax.jit(jax.vmap(sample_weight))(jax.random.split(jax.random.key(0), 4000))
    )
    assert weights.min() >= 0.5
    assert weights.max() <= 1.0
    # For Beta(½, ½), the arcsine law, E max(b, 1−b) = ½ + 1/π and the median is (1 + sin(π/4)) / 2.
    assert weights.mean() == pytest.approx(0.5 + 1 / np.pi, abs=0.01)
    assert np.median(weights) == pytest.approx((1 + np.sin(np.pi / 4)) / 2, abs=0.01)


def test_mixup_partners_are_the_batch_rolled_by_one() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(4, 8, 8, 3), dtype=np.uint8)
    recipe = RecipeConfig(mixup=0.5)
    pairs, _ = sample_mixup(jax.random.key(0), jnp.asarray(pixels), jnp.eye(4), recipe)
    images, mixed = apply_mixup(pairs, MixupWeights(jnp.float32(0.75)))
    normalized = pixels / 127.5 - 1
    expected = 0.75 * normalized + 0.25 * normalized[[3, 0, 1, 2]]
    np.testing.assert_allclose(images, expected, atol=1e-6)
    np.testing.assert_allclose(mixed, 0.75 * np.eye(4) + 0.25 * np.eye(4)[[3, 0, 1, 2]])


def draw_weights(count: int, height: int, width: int, **recipe: Any) -> Any:
    """Samples the weights of `count` steps, stacked."""

    def draw(rng: jax.Array) -> MixupWeights | None:
        images, targets = jnp.zeros((2, height, width, 3), jnp.uint8), jnp.zeros((2, 3))
        return sample_mixup(rng, images, targets, RecipeConfig(**recipe))[1]

    weights = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), count))
    return jax.tree.map(np.asarray, weights)


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Finds top, left, height and width of the boxes of CutMix's masks, (n, 1, h, w, 1)."""
    inside = masks[:, 0, :, :, 0] == 0
    rows, columns = inside.any(2), inside.any(1)
    corners = [rows.argmax(1), columns.argmax(1), rows.sum(1), columns.sum(1)]
    # They have all pixels of their rows and columns.
    np.testing.assert_array_equal(inside.sum((1, 2)), corners[2] * corners[3])
    return np.stack(corners, axis=1)


def test_cutmix_replaces_a_box_and_weights_targets_by_its_exact_area() -> None:
    # No pixel is that of its partner.
    levels = np.random.default_rng(0).integers(64, size=(4, 8, 8, 3), dtype=np.uint8)
    pixels = jnp.asarray(levels + np.arange(0, 256, 64, dtype=np.uint8)[:, None, None, None])
    one_hot = jnp.eye(4)
    before = np.asarray(jax.jit(normalize_images)(pixels))
    partners = before[[3, 0, 1, 2]]
    mix, areas = jax.jit(apply_mixup), set()
    for seed in range(30):
        rng = jax.random.key(seed)
        mixed = mix(*sample_mixup(rng, pixels, one_hot, RecipeConfig(cutmix=1.0)))
        images, targets = map(np.asarray, mixed)
        is_partner = images == partners
        np.testing.assert_array_equal(images, np.where(is_partner, partners, before))
        # The same box in all images and channels.
        assert (is_partner == is_partner[:1, :, :, :1]).all()
        ((_, _, height, width),) = boxes_of(1.0 - is_partner[None, :1, :, :, :1])
        weight = 1 - height * width / 64
        expected = weight * np.eye(4) + (1 - weight) * np.eye(4)[[3, 0, 1, 2]]
        np.testing.assert_array_equal(targets, expected.astype(np.float32))
        areas.add(height * width)
    assert len(areas) > 10


def test_cutmix_boxes_have_the_distribution_of_their_formula() -> None:
    height, width, count = 20, 32, 4000
    rng = np.random.default_rng(0)
    sides = np.sqrt(1 - rng.beta(0.5, 0.5, count))
    expected = []
    for length in (height, width):
        size, center = (length * sides).astype(int), rng.integers(length, size=count)
        start = center - size // 2
        expected.append(np.clip([start, start + size], 0, length))
    (top, bottom), (left, right) = expected
    weights = draw_weights(count, height, width, cutmix=0.5)
    boxes = boxes_of(weights.pixels)
    np.testing.assert_allclose(
        weights.target, 1 - boxes[:, 2] * boxes[:, 3] / (height * width), rtol=1e-6
    )
    reference = 1 - (bottom - top) * (right - left) / (height * width)
    # Standard errors are 0.006.
    assert weights.target.mean() == pytest.approx(reference.mean(), abs=0.03)
    for quantile in (0.25, 0.5, 0.75):
        found, wanted = (np.quantile(w, quantile) for w in (weights.target, reference))
        assert found == pytest.approx(wanted, abs=0.04)
    for found, wanted in zip(boxes.T, (top, left, bottom - top, right - left), strict=True):
        # Where the box is empty, it has no corner.
        selected = (found[boxes[:, 2] > 0], wanted[bottom > top])
        assert selected[0].mean() == pytest.approx(selected[1].mean(), abs=0.6)
        assert selected[0].std() == pytest.approx(selected[1].std(), abs=0.4)
    # Some boxes are clipped and not square.
    ratio = boxes[:, 2] / np.maximum(boxes[:, 3], 1)
    assert len(np.unique(ratio)) > 20


@pytest.mark.parametrize("switch_prob", [0.0, 0.3, 1.0])
def test_mixup_switch_prob_is_the_fraction_of_steps_with_cutmix(switch_prob: float) -> None:
    count, shape = 1000, (6, 6)
    mixup = draw_weights(count, *shape, mixup=0.5)
    cutmix = draw_weights(count, *shape, cutmix=1.0)
    both = draw_weights(count, *shape, mixup=0.5, cutmix=1.0, mixup_switch_prob=switch_prob)
    assert mixup.pixels is None
    # Every step has the weights of one of them, bit by bit.
    is_cutmix = both.target != mixup.target
    np.testing.assert_array_equal(both.target, np.where(is_cutmix, cutmix.target, mixup.target))
    per_step = (count, 1, 1, 1, 1)
    pixels = np.where(is_cutmix.reshape(per_step), cutmix.pixels, mixup.target.reshape(per_step))
    np.testing.assert_array_equal(both.pixels, pixels)
    # A standard deviation of 0.015.
    assert is_cutmix.mean() == pytest.approx(switch_prob, abs=0.06 * (0 < switch_prob < 1))
