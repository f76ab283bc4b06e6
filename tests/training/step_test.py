"""Tests of the training step: microbatches, devices, averaging and randomness."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from mixer_jax.config.schema import RecipeConfig
from mixer_jax.distributed.sharding import state_sharding
from mixer_jax.models.registry import get_family
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.setup import build_experiment
from mixer_jax.training.step import (
    Hyperparams,
    TrainState,
    accumulate_gradients,
    create_state,
    jit_train_step,
    step_rngs,
    train_step,
    update_norm,
)
from tests.helpers.batches import mesh_of
from tests.helpers.random_weights import tree_norm
from tests.helpers.tiny_run import small_config
from tests.helpers.tiny_step import (
    NUM_CLASSES,
    REGULARIZERS,
    assert_trees_equal,
    make_batch,
    make_model,
)

SWITCHING = {"mixup": 0.5, "cutmix": 1.0}


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
    settings = RecipeConfig(**{"loss": "softmax", **recipe})
    has_ema = settings.ema_decay > 0
    state = create_state(
        7, model, optax.sgd(optax.constant_schedule(0.1)), image_size=8, ema=has_ema
    )
    sharding = state_sharding(state, mesh, get_family(model.family))
    state = jax.device_put(state, sharding)
    step = jit_train_step(
        functools.partial(
            train_step,
            recipe=settings,
            model=model,
            make_schedule=optax.constant_schedule,
            make_tx=optax.sgd,
            mesh=mesh,
            class_weights=class_weights,
        ),
        sharding,
        mesh,
        model,
    )
    batch = make_batch(batch_size)
    if multi_label:
        labels = np.random.default_rng(1).random((batch_size, NUM_CLASSES)) < 0.4
        batch["label"] = jnp.asarray(labels)
    history = []
    for _ in range(count):
        state, metrics = step(state, batch, Hyperparams(np.float32(0.1), np.uint32(seed)))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


CLASS_WEIGHTS = np.array([0.5, 2.0, 5.0], np.float32)


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


@pytest.mark.parametrize("decay_type", ["linear", "cosine", "staircase", "rsqrt", "none"])
def test_runs_of_other_learning_rates_and_seeds_have_the_same_programs(
    decay_type: str, digits_dir: str
) -> None:
    def lower(**changes: Any) -> list[str]:
        # mixup, dropout and stochastic depth depend on the seed.
        changes = {"model__num_blocks": 1, "model__dropout": 0.1, "recipe__mixup": 0.5, **changes}
        schedule: dict[str, Any] = {
            "optimizer__decay_type": decay_type,
            "optimizer__end_learning_rate": 1e-5,
        }
        if decay_type == "staircase":
            schedule |= {"optimizer__decay_points": "0.5", "optimizer__end_learning_rate": 0.0}
        config = small_config(digits_dir, **changes, **schedule)
        experiment = build_experiment(config, open_datasets(config), jax.devices()[:1])
        batch = {
            "image": jax.ShapeDtypeStruct((config.batch_size, 16, 16, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
        }
        step, create_state = cast(Any, experiment.train_step), cast(Any, experiment.create_state)
        return [
            step.lower(experiment.state_shape, batch, experiment.hyperparams).as_text(),
            create_state.func.lower(*create_state.args).as_text(),
        ]

    program = lower(optimizer__learning_rate=0.01, seed=0)
    assert lower(optimizer__learning_rate=0.003, seed=2**32 - 1) == program
    assert lower(optimizer__learning_rate=0.01, optimizer__b1=0.5)[0] != program[0]


def test_a_seed_has_the_same_random_keys_as_number_and_as_array() -> None:
    for seed in (0, 1, 2**31, 2**32 - 1):
        keys, arrays = step_rngs(seed, 3), jax.jit(step_rngs)(np.uint32(seed), 3)
        for key, array in zip(keys, arrays, strict=True):
            assert (jax.random.key_data(key) == jax.random.key_data(array)).all()


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
