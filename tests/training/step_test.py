"""Tests of the training step: loss, mixup, CutMix, accumulation, averaging and randomness."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from mixer_jax.config.schema import RecipeConfig
from mixer_jax.distributed.sharding import state_sharding
from mixer_jax.models.layers import normalize_images
from mixer_jax.models.registry import create_model, get_family
from mixer_jax.training.step import (
    MixupWeights,
    TrainState,
    accumulate_gradients,
    apply_mixup,
    create_state,
    cross_entropy,
    jit_train_step,
    sample_mixup,
    smooth_labels,
    update_norm,
)
from tests.helpers.batches import mesh_of
from tests.helpers.random_weights import tree_norm

NUM_CLASSES = 3
SWITCHING = {"mixup": 0.5, "cutmix": 1.0}


# Regularizers with random masks, where a family has them.
MASKS: dict[str, Any] = {"dropout": 0.3, "stochastic_depth": 0.5}
REGULARIZERS = {"mixer": MASKS, "vit": MASKS, "bit": {}}


def make_model(num_blocks: int = 1, family: str = "mixer", **overrides: Any) -> Any:
    blocks: dict[str, Any] = {"num_blocks": num_blocks, "patch_size": 4, "hidden_dim": 8}
    architecture: dict[str, Any] = {
        "mixer": blocks | {"tokens_mlp_dim": 8, "channels_mlp_dim": 8},
        "vit": blocks | {"mlp_dim": 16, "num_heads": 2},
        "bit": {"units": "1,1", "root_width": 8, "root": "3x3"},
    }[family]
    name = get_family(family).full_name("custom")
    return create_model(name, NUM_CLASSES, **architecture, **overrides)


def make_batch(n: int = 8) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return {"image": jnp.asarray(images), "label": jnp.arange(n, dtype=jnp.int32) % NUM_CLASSES}


def take_steps(
    count: int = 1,
    model: Any = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    batch_size: int = 8,
    class_weights: np.ndarray | None = None,
    multi_label: bool = False,
    **recipe: Any,
) -> tuple[TrainState, list[dict[str, float]]]:
    model, mesh = model or make_model(), mesh or mesh_of(1, 1)
    schedule = optax.constant_schedule(0.1)
    tx = optax.sgd(schedule)
    settings = RecipeConfig(**{"loss": "softmax", **recipe})
    has_ema = settings.ema_decay > 0
    state = create_state(jax.random.key(7), model, tx, image_size=8, ema=has_ema)
    sharding = state_sharding(state, mesh, get_family(model.family))
    state = jax.device_put(state, sharding)
    step = jit_train_step(settings, seed, sharding, model, tx, schedule, mesh, class_weights)
    batch = make_batch(batch_size)
    if multi_label:
        labels = np.random.default_rng(1).random((batch_size, NUM_CLASSES)) < 0.4
        batch["label"] = jnp.asarray(labels)
    history = []
    for _ in range(count):
        state, metrics = step(state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def assert_trees_equal(a: Any, b: Any, tolerance: float = 0.0) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_cross_entropy_equals_float64_formulas() -> None:
    logits = jnp.array([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
    labels = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.7, 0.3]])
    z, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    p = 1 / (1 + np.exp(-z))
    sigmoid = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(1).mean()
    softmax = -(y * np.log(np.exp(z) / np.exp(z).sum(1, keepdims=True))).sum(1).mean()
    assert float(cross_entropy(logits, labels, "sigmoid")) == pytest.approx(sigmoid, rel=1e-6)
    assert float(cross_entropy(logits, labels, "softmax")) == pytest.approx(softmax, rel=1e-6)


def test_smooth_labels_spreads_mass_evenly() -> None:
    labels = np.asarray(smooth_labels(jnp.array([2]), 4, 0.2))
    np.testing.assert_allclose(labels, [[0.05, 0.05, 0.85, 0.05]], rtol=1e-6)


def test_smooth_labels_moves_both_targets_of_binary_decisions() -> None:
    labels = np.asarray(smooth_labels(jnp.array([2]), 1_000, 0.0, 1e-4))
    assert labels[0, 2] == np.float32(1 - 1e-4)
    assert set(np.delete(labels[0], 2)) == {np.float32(1e-4)}


def test_multi_hot_labels_are_targets_that_mix() -> None:
    labels = jnp.array([[True, False, True], [False, False, False]])
    targets = smooth_labels(labels, 3, 0.0)
    np.testing.assert_array_equal(targets, [[1, 0, 1], [0, 0, 0]])
    np.testing.assert_allclose(smooth_labels(labels, 3, 0.0, 0.1)[0], [0.9, 0.1, 0.9], rtol=1e-6)
    images = jnp.zeros((2, 2, 2, 3), jnp.uint8)
    pairs = sample_mixup(jax.random.key(0), images, targets, RecipeConfig(mixup=0.5))
    _, mixed = apply_mixup(pairs.arrays, MixupWeights(jnp.float32(0.75)))
    np.testing.assert_allclose(mixed, [[0.75, 0, 0.75], [0.25, 0, 0.25]])


CLASS_WEIGHTS = np.array([0.5, 2.0, 5.0], np.float32)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_mixed_examples_are_those_of_their_labels(loss: str, smoothing: float) -> None:
    """Linear in the two examples of a mixture, each with the weight of its own label."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)
    first, second = (smooth_labels(jnp.array(y), 3, smoothing) for y in ([0, 1, 2], [2, 0, 2]))
    weights = jnp.asarray(CLASS_WEIGHTS)[:, None]
    mixed = 0.7 * first * weights + 0.3 * second * weights[jnp.array([2, 0, 2])]
    expected = np.mean(
        [
            share
            * CLASS_WEIGHTS[label]
            * float(cross_entropy(logits[i : i + 1], y[i : i + 1], loss))
            for share, y, labels in ((0.7, first, [0, 1, 2]), (0.3, second, [2, 0, 2]))
            for i, label in enumerate(labels)
        ]
    )
    # A mean over three examples of the sums of two parts each.
    found = float(cross_entropy(logits, mixed, loss, is_weighted=True))
    assert found == pytest.approx(2 * expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_class_weights_scale_the_loss_of_their_examples(loss: str) -> None:
    model = make_model(head_bias=1.0)
    _, (plain,) = take_steps(1, model, loss=loss)
    _, (same,) = take_steps(1, model, loss=loss, class_weights=np.ones(3, np.float32))
    assert same["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    # Labels are 0 1 2 0 1 2 0 1, and a zero head gives every example the same loss.
    _, (weighted,) = take_steps(1, model, loss=loss, class_weights=CLASS_WEIGHTS)
    factor = CLASS_WEIGHTS[np.arange(8) % 3].mean()
    assert weighted["loss"] == pytest.approx(factor * plain["loss"], rel=1e-6)


def test_mixup_with_the_smaller_weight_mixes_the_reversed_batch() -> None:
    """BiT's weight may be below a half, which only reorders the mixed batch."""
    images = jax.random.randint(jax.random.key(0), (5, 2, 2, 3), 0, 256).astype(jnp.uint8)
    labels = jnp.eye(5)
    recipe = RecipeConfig(mixup=0.1)
    pairs = sample_mixup(jax.random.key(1), images, labels, recipe)
    reverse = sample_mixup(jax.random.key(1), images[::-1], labels[::-1], recipe)
    mixed, targets = apply_mixup(pairs.arrays, MixupWeights(jnp.float32(0.25)))
    expected, expected_targets = apply_mixup(reverse.arrays, MixupWeights(jnp.float32(0.75)))
    order = -np.arange(5) % 5
    np.testing.assert_allclose(mixed, expected[order], atol=1e-6)
    np.testing.assert_array_equal(targets, expected_targets[order])


def test_sample_mixup_weight_is_the_larger_of_two_beta_fractions() -> None:
    def sample_weight(rng: jax.Array) -> jax.Array:
        images, labels = jnp.zeros((2, 1, 1, 3), jnp.uint8), jnp.zeros((2, NUM_CLASSES))
        return sample_mixup(rng, images, labels, RecipeConfig(mixup=0.5)).weights.label

    weights = np.asarray(
        jax.jit(jax.vmap(sample_weight))(jax.random.split(jax.random.key(0), 4000))
    )
    assert weights.min() >= 0.5
    assert weights.max() <= 1.0
    # For Beta(½, ½), the arcsine law, E max(b, 1−b) = ½ + 1/π and the median is (1 + sin(π/4)) / 2.
    assert weights.mean() == pytest.approx(0.5 + 1 / np.pi, abs=0.01)
    assert np.median(weights) == pytest.approx((1 + np.sin(np.pi / 4)) / 2, abs=0.01)


def test_mixup_partners_are_the_batch_rolled_by_one() -> None:
    batch = make_batch(4)
    labels = jnp.eye(4)
    pairs = sample_mixup(jax.random.key(0), batch["image"], labels, RecipeConfig(mixup=0.5))
    images, mixed = apply_mixup(pairs.arrays, MixupWeights(jnp.float32(0.75)))
    pixels = np.asarray(batch["image"], np.float64) / 127.5 - 1
    expected = 0.75 * pixels + 0.25 * pixels[[3, 0, 1, 2]]
    np.testing.assert_allclose(images, expected, atol=1e-6)
    np.testing.assert_allclose(mixed, 0.75 * np.eye(4) + 0.25 * np.eye(4)[[3, 0, 1, 2]])


def draw_weights(count: int, height: int, width: int, **recipe: Any) -> Any:
    """Samples the weights of `count` steps, stacked."""

    def draw(rng: jax.Array) -> MixupWeights:
        images, labels = jnp.zeros((2, height, width, 3), jnp.uint8), jnp.zeros((2, NUM_CLASSES))
        return sample_mixup(rng, images, labels, RecipeConfig(**recipe)).weights

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


def test_cutmix_replaces_a_box_and_weights_labels_by_its_exact_area() -> None:
    # No pixel is that of its partner.
    levels = np.random.default_rng(0).integers(64, size=(4, 8, 8, 3), dtype=np.uint8)
    pixels = jnp.asarray(levels + np.arange(0, 256, 64, dtype=np.uint8)[:, None, None, None])
    labels = jnp.eye(4)
    before = np.asarray(jax.jit(normalize_images)(pixels))
    partners = before[[3, 0, 1, 2]]
    mix = jax.jit(lambda pairs: apply_mixup(*pairs))
    areas = set()
    for seed in range(30):
        rng = jax.random.key(seed)
        pairs = sample_mixup(rng, pixels, labels, RecipeConfig(cutmix=1.0))
        images, targets = map(np.asarray, mix(pairs))
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
        weights.label, 1 - boxes[:, 2] * boxes[:, 3] / (height * width), rtol=1e-6
    )
    reference = 1 - (bottom - top) * (right - left) / (height * width)
    # Standard errors are 0.006.
    assert weights.label.mean() == pytest.approx(reference.mean(), abs=0.03)
    for quantile in (0.25, 0.5, 0.75):
        found, wanted = (np.quantile(w, quantile) for w in (weights.label, reference))
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
    is_cutmix = both.label != mixup.label
    np.testing.assert_array_equal(both.label, np.where(is_cutmix, cutmix.label, mixup.label))
    per_step = (count, 1, 1, 1, 1)
    pixels = np.where(is_cutmix.reshape(per_step), cutmix.pixels, mixup.label.reshape(per_step))
    np.testing.assert_array_equal(both.pixels, pixels)
    # A standard deviation of 0.015.
    assert is_cutmix.mean() == pytest.approx(switch_prob, abs=0.06 * (0 < switch_prob < 1))


def test_train_step_starts_with_the_loss_of_a_zero_head() -> None:
    _, (metrics,) = take_steps()
    assert metrics["loss"] == pytest.approx(np.log(NUM_CLASSES), rel=1e-6)
    _, (metrics,) = take_steps(model=make_model(head_bias=-6.9), loss="sigmoid")
    target, other = np.log1p(np.exp(6.9)), np.log1p(np.exp(-6.9))
    assert metrics["loss"] == pytest.approx(target + 2 * other, rel=1e-6)


def test_train_step_metrics_follow_from_the_update() -> None:
    before, _ = take_steps(count=0)
    after, (metrics,) = take_steps()

    update = jax.tree.map(np.subtract, after.params, before.params)
    assert metrics["learning_rate"] == pytest.approx(0.1)
    assert metrics["gradient_norm"] == pytest.approx(tree_norm(update) / 0.1, rel=1e-4)
    norm = update_norm(before.params, after.params)
    assert norm == pytest.approx(0.1 * metrics["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        *(("mixer", recipe) for recipe in ({}, {"mixup": 0.5}, {"loss": "sigmoid"}, SWITCHING)),
        ("vit", {"mixup": 0.5}),
        ("bit", {"mixup": 0.5}),
    ],
)
def test_gradient_accumulation_changes_only_rounding(family: str, recipe: dict[str, Any]) -> None:
    model = make_model(family=family)
    single, expected = take_steps(3, model, **recipe)
    for num_microbatches in (2, 8):
        accumulated, actual = take_steps(3, model, grad_accum_steps=num_microbatches, **recipe)
        assert_trees_equal(single.params, accumulated.params, tolerance=1e-5)
        for a, b in zip(expected, actual, strict=True):
            assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_gradient_accumulation_of_4096_images_changes_only_rounding() -> None:
    model = make_model(dropout=0.3, stochastic_depth=0.5, head_bias=1.0)
    settings: dict[str, Any] = {"batch_size": 4096, "mixup": 0.5, "ema_decay": 0.9}
    single, (expected,) = take_steps(1, model, **settings)
    accumulated, (actual,) = take_steps(1, model, grad_accum_steps=8, **settings)
    assert_trees_equal(single, accumulated, tolerance=1e-6)
    assert actual == pytest.approx(expected, rel=1e-5)


def test_accumulate_gradients_averages_over_microbatches() -> None:
    def value_and_grad(params: Any, x: jax.Array, shared: jax.Array) -> Any:
        return jnp.sum(x) * shared, {"w": jnp.sum(x**2)}

    params, x = {"w": jnp.zeros(())}, jnp.arange(12.0)
    value, grads = accumulate_gradients(value_and_grad, params, x, jnp.float32(2), 4)
    assert float(value) == pytest.approx(2 * 66 / 4)
    assert float(grads["w"]) == pytest.approx(506 / 4)


def test_accumulate_gradients_sums_bfloat16_in_float32() -> None:
    def value_and_grad(params: Any, x: jax.Array, shared: None) -> Any:
        return jnp.zeros(()), jnp.where(x[0] == 0, jnp.bfloat16(1), jnp.bfloat16(2**-9))

    _, grad = accumulate_gradients(value_and_grad, jnp.bfloat16(0), jnp.arange(9.0), None, 9)
    assert float(grad) == pytest.approx((1 + 8 * 2**-9) / 9, rel=1e-6)


@pytest.mark.parametrize(
    ("family", "mixup"),
    [
        *((family, {"mixup": 0.5}) for family in REGULARIZERS),
        ("mixer", {"cutmix": 1.0}),
        ("mixer", SWITCHING),
    ],
)
@pytest.mark.parametrize(("layout", "num_microbatches"), [((8, 1), 2), ((1, 8), 1), ((2, 4), 2)])
def test_devices_and_microbatches_change_only_rounding(
    layout: tuple[int, int], num_microbatches: int, family: str, mixup: dict[str, Any]
) -> None:
    """Drop masks and CutMix's boxes are the same, too."""
    model = make_model(num_blocks=2, family=family, head_bias=1.0, **REGULARIZERS[family])
    recipe: dict[str, Any] = mixup | {"batch_size": 16}
    single, expected = take_steps(3, model, **recipe)
    recipe["grad_accum_steps"] = num_microbatches
    sharded, actual = take_steps(3, model, mesh=mesh_of(*layout), **recipe)
    assert_trees_equal(single.params, sharded.params, tolerance=1e-5)
    for a, b in zip(expected, actual, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"multi_label": True, "loss": "sigmoid"},
        {"class_weights": CLASS_WEIGHTS, "loss": "sigmoid"},
        {"class_weights": CLASS_WEIGHTS, "loss": "softmax", "label_smoothing": 0.1},
    ],
    ids=["multi_label", "weighted_sigmoid", "weighted_softmax"],
)
def test_devices_and_microbatches_change_only_rounding_of_other_labels(
    settings: dict[str, Any],
) -> None:
    model = make_model(head_bias=1.0)
    settings = settings | {"mixup": 0.5, "batch_size": 16}
    single, expected = take_steps(3, model, **settings)
    for layout, num_microbatches in (((8, 1), 2), ((2, 4), 1), ((1, 1), 8)):
        sharded, actual = take_steps(
            3, model, mesh=mesh_of(*layout), grad_accum_steps=num_microbatches, **settings
        )
        assert_trees_equal(single.params, sharded.params, tolerance=1e-5)
        for a, b in zip(expected, actual, strict=True):
            assert a == pytest.approx(b, rel=1e-4)


def test_train_step_randomness_follows_from_seed_and_step() -> None:
    model = make_model(num_blocks=2, dropout=0.5, stochastic_depth=0.5)
    first, again, other = (take_steps(2, model, seed, mixup=0.5)[0] for seed in (1, 1, 2))
    assert_trees_equal(first.params, again.params)
    with pytest.raises(AssertionError):
        assert_trees_equal(first.params, other.params)
    # Other steps of a run sample other masks: from equal parameters, only the step differs.
    _, history = take_steps(2, make_model(dropout=0.5, head_bias=1.0), seed=1)
    assert history[0]["loss"] != history[1]["loss"]


def test_ema_params_follow_their_formula() -> None:
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


def test_train_step_lowers_the_loss() -> None:
    _, history = take_steps(30)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert take_steps(3)[0].step == 3
