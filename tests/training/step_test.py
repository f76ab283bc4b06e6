"""Tests of the pure parts of a training step: loss, mixup, accumulation, averages, randomness."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from mixer_jax.distributed.sharding import state_sharding
from mixer_jax.models.registry import create_model
from mixer_jax.training.step import (
    TrainState,
    accumulate_gradients,
    apply_mixup,
    create_state,
    cross_entropy,
    sample_mixup,
    smooth_labels,
    train_step,
    update_norm,
)
from tests.helpers.batches import mesh_of
from tests.helpers.random_weights import tree_norm

NUM_CLASSES = 3
RECIPE: dict[str, Any] = {
    "loss": "softmax",
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "grad_accum_steps": 1,
    "ema_decay": 0.0,
}


def make_model(num_blocks: int = 1, **overrides: Any) -> nn.Module:
    widths = dict.fromkeys(("hidden_dim", "tokens_mlp_dim", "channels_mlp_dim"), 8)
    widths |= {"num_blocks": num_blocks, "patch_size": 4}
    return create_model("custom", NUM_CLASSES, **widths, **overrides)


def make_batch(n: int = 8) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return {"image": jnp.asarray(images), "label": jnp.arange(n, dtype=jnp.int32) % NUM_CLASSES}


def take_steps(
    count: int = 1,
    model: nn.Module | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    batch_size: int = 8,
    **recipe: Any,
) -> tuple[TrainState, list[dict[str, float]]]:
    model = model or make_model()
    schedule = optax.constant_schedule(0.1)
    tx = optax.sgd(schedule)
    ema = recipe.get("ema_decay", 0.0) > 0
    state = create_state(jax.random.key(7), model, tx, image_size=8, ema=ema)
    step = functools.partial(
        train_step,
        model=model,
        tx=tx,
        schedule=schedule,
        mesh=mesh or mesh_of(1, 1),
        num_classes=NUM_CLASSES,
        seed=seed,
        **{**RECIPE, **recipe},
    )
    if mesh:
        state = jax.device_put(state, state_sharding(state, mesh))
    compiled = jax.jit(step)
    history = []
    for _ in range(count):
        state, metrics = compiled(state, make_batch(batch_size))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def assert_trees_equal(a: Any, b: Any, tolerance: float = 0.0) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_cross_entropies_by_hand() -> None:
    logits = jnp.array([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
    labels = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.7, 0.3]])
    z, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    p = 1 / (1 + np.exp(-z))
    sigmoid = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(1).mean()
    softmax = -(y * np.log(np.exp(z) / np.exp(z).sum(1, keepdims=True))).sum(1).mean()
    assert float(cross_entropy(logits, labels, "sigmoid")) == pytest.approx(sigmoid, rel=1e-6)
    assert float(cross_entropy(logits, labels, "softmax")) == pytest.approx(softmax, rel=1e-6)


def test_label_smoothing_spreads_its_share_evenly() -> None:
    labels = np.asarray(smooth_labels(jnp.array([2]), 4, 0.2))
    np.testing.assert_allclose(labels, [[0.05, 0.05, 0.85, 0.05]], rtol=1e-6)


def test_mixup_weights_are_the_larger_of_two_beta_shares() -> None:
    def draw(rng: jax.Array) -> jax.Array:
        images, labels = jnp.zeros((2, 1, 1, 3), jnp.uint8), jnp.zeros((2, NUM_CLASSES))
        return sample_mixup(rng, images, labels, 0.5).weight

    weights = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000)))
    assert weights.min() >= 0.5
    assert weights.max() <= 1.0
    # For Beta(½, ½), the arcsine law, E max(b, 1−b) = ½ + 1/π and the median is (1 + sin(π/4)) / 2.
    assert weights.mean() == pytest.approx(0.5 + 1 / np.pi, abs=0.01)
    assert np.median(weights) == pytest.approx((1 + np.sin(np.pi / 4)) / 2, abs=0.01)


def test_mixup_partner_is_the_batch_rolled_by_one() -> None:
    batch = make_batch(4)
    labels = jnp.eye(4)
    pairs = sample_mixup(jax.random.key(0), batch["image"], labels, 0.5)
    images, mixed = apply_mixup(pairs.arrays, jnp.float32(0.75))
    pixels = np.asarray(batch["image"], np.float64) / 127.5 - 1
    expected = 0.75 * pixels + 0.25 * pixels[[3, 0, 1, 2]]
    np.testing.assert_allclose(images, expected, atol=1e-6)
    np.testing.assert_allclose(mixed, 0.75 * np.eye(4) + 0.25 * np.eye(4)[[3, 0, 1, 2]])


def test_loss_of_the_first_step_is_that_of_a_zero_head() -> None:
    _, (metrics,) = take_steps()
    assert metrics["loss"] == pytest.approx(np.log(NUM_CLASSES), rel=1e-6)
    _, (metrics,) = take_steps(model=make_model(head_bias=-6.9), loss="sigmoid")
    right, wrong = np.log1p(np.exp(6.9)), np.log1p(np.exp(-6.9))
    assert metrics["loss"] == pytest.approx(right + 2 * wrong, rel=1e-6)


def test_metrics_are_what_they_are_called() -> None:
    before, _ = take_steps(count=0)
    after, (metrics,) = take_steps()

    update = jax.tree.map(np.subtract, after.params, before.params)
    assert metrics["learning_rate"] == pytest.approx(0.1)
    assert metrics["gradient_norm"] == pytest.approx(tree_norm(update) / 0.1, rel=1e-4)
    changed = update_norm(before.params, after.params)
    assert changed == pytest.approx(0.1 * metrics["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize("recipe", [{}, {"mixup": 0.5}, {"loss": "sigmoid"}])
def test_accumulation_changes_nothing_but_rounding(recipe: dict[str, Any]) -> None:
    whole, expected = take_steps(3, **recipe)
    for pieces in (2, 8):
        accumulated, actual = take_steps(3, grad_accum_steps=pieces, **recipe)
        assert_trees_equal(whole.params, accumulated.params, tolerance=1e-5)
        for a, b in zip(expected, actual, strict=True):
            assert a == pytest.approx(b, rel=1e-4)


def test_4096_images_in_eight_pieces_are_one_batch() -> None:
    model = make_model(dropout=0.3, stochastic_depth=0.5, head_bias=1.0)
    settings: dict[str, Any] = {"batch_size": 4096, "mixup": 0.5, "ema_decay": 0.9}
    whole, (expected,) = take_steps(1, model, **settings)
    summed, (actual,) = take_steps(1, model, grad_accum_steps=8, **settings)
    assert_trees_equal(whole, summed, tolerance=1e-6)
    assert actual == pytest.approx(expected, rel=1e-5)


def test_pieces_partition_the_batch() -> None:
    def value_and_grad(params: Any, piece: jax.Array, common: jax.Array) -> Any:
        return jnp.sum(piece) * common, {"w": jnp.sum(piece**2)}

    params, x = {"w": jnp.zeros(())}, jnp.arange(12.0)
    value, grads = accumulate_gradients(value_and_grad, params, x, jnp.float32(2), 4)
    assert float(value) == pytest.approx(2 * 66 / 4)
    assert float(grads["w"]) == pytest.approx(506 / 4)


def test_pieces_of_small_gradients_are_summed_in_float32() -> None:
    def value_and_grad(params: Any, piece: jax.Array, common: None) -> Any:
        return jnp.zeros(()), jnp.where(piece[0] == 0, jnp.bfloat16(1), jnp.bfloat16(2**-9))

    _, grad = accumulate_gradients(value_and_grad, jnp.bfloat16(0), jnp.arange(9.0), None, 9)
    assert float(grad) == pytest.approx((1 + 8 * 2**-9) / 9, rel=1e-6)


@pytest.mark.parametrize(("layout", "pieces"), [((8, 1), 2), ((1, 8), 1), ((2, 4), 2)])
def test_devices_and_pieces_change_nothing_but_rounding(
    layout: tuple[int, int], pieces: int
) -> None:
    """Not even what is dropped."""
    model = make_model(num_blocks=2, dropout=0.3, stochastic_depth=0.5, head_bias=1.0)
    recipe: dict[str, Any] = {"mixup": 0.5, "batch_size": 16}
    whole, expected = take_steps(3, model, **recipe)
    spread, actual = take_steps(3, model, mesh=mesh_of(*layout), grad_accum_steps=pieces, **recipe)
    assert_trees_equal(whole.params, spread.params, tolerance=1e-5)
    for a, b in zip(expected, actual, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_randomness_follows_from_seed_and_step() -> None:
    model = make_model(num_blocks=2, dropout=0.5, stochastic_depth=0.5)
    first, again, other = (take_steps(2, model, seed, mixup=0.5)[0] for seed in (1, 1, 2))
    assert_trees_equal(first.params, again.params)
    with pytest.raises(AssertionError):
        assert_trees_equal(first.params, other.params)
    # Another step of the same run draws other masks: from equal states, only the step differs.
    _, history = take_steps(2, make_model(dropout=0.5, head_bias=1.0), seed=1)
    assert history[0]["loss"] != history[1]["loss"]


def test_averaged_parameters_follow_their_formula() -> None:
    start, _ = take_steps(count=0, ema_decay=0.75)
    assert start.ema_params is not None
    assert_trees_equal(start.params, start.ema_params)
    after, _ = take_steps(count=1, ema_decay=0.75)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, start.params, after.params)
    assert_trees_equal(after.ema_params, expected, tolerance=1e-6)
    assert after.eval_params is after.ema_params
    plain, _ = take_steps(count=1)
    assert plain.ema_params is None
    assert plain.eval_params is plain.params


def test_a_few_steps_learn() -> None:
    _, history = take_steps(30)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert take_steps(3)[0].step == 3
