"""Tests of the training step with each optimizer: SAM and frozen parameters."""

import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from mixer_jax.config.schema import OptimizerConfig, RecipeConfig
from mixer_jax.distributed.sharding import state_sharding
from mixer_jax.models.execution import Execution
from mixer_jax.models.registry import get_family
from mixer_jax.training.optimizer import frozen_mask, make_optimizer
from mixer_jax.training.step import (
    Hyperparams,
    TrainState,
    create_state,
    jit_train_step,
    perturb_params,
    train_step,
)
from tests.helpers.batches import mesh_of
from tests.helpers.tiny_step import (
    NUM_CLASSES,
    REGULARIZERS,
    assert_trees_equal,
    make_batch,
    make_model,
)


class LinearModel(nn.Module):
    """Softmax regression on pixels."""

    family: ClassVar[str] = "mixer"
    num_classes: ClassVar[int] = NUM_CLASSES
    execution: ClassVar[Execution] = Execution()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool, example_index: jax.Array) -> jax.Array:
        return nn.Dense(NUM_CLASSES, name="head")(images.reshape(len(images), -1))


def numpy_sam(params: Any, batch: Any, rho: float, rate: float) -> tuple[Any, float]:
    """Takes a step of SAM with SGD on softmax regression, in float64; returns the loss as well."""
    x = np.asarray(batch["image"], np.float64).reshape(len(batch["label"]), -1) / 127.5 - 1
    targets = np.eye(NUM_CLASSES)[np.asarray(batch["label"])]

    def loss_and_gradient(params: Any) -> tuple[float, Any]:
        logits = x @ params["kernel"] + params["bias"]
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        error = (p - targets) / len(x)
        loss = -np.mean(np.log((p * targets).sum(axis=1)))
        return loss, {"kernel": x.T @ error, "bias": error.sum(axis=0)}

    loss, grads = loss_and_gradient(params)
    norm = np.sqrt(sum((grad**2).sum() for grad in grads.values()))
    perturbed = {name: params[name] + rho * grads[name] / norm for name in params}
    _, grads = loss_and_gradient(perturbed)
    return {name: params[name] - rate * grads[name] for name in params}, loss


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_sam_equals_numpy(num_microbatches: int) -> None:
    rng = np.random.default_rng(0)
    shapes = {"kernel": (8 * 8 * 3, NUM_CLASSES), "bias": (NUM_CLASSES,)}
    expected: Any = {name: rng.normal(0.0, 0.1, shape) for name, shape in shapes.items()}
    params = {"head": jax.tree.map(jnp.float32, expected)}
    mesh = mesh_of(1, 1)
    state = TrainState(
        jnp.zeros((), jnp.int32),
        params,
        optax.sgd(optax.constant_schedule(0.02)).init(params),
        None,
    )
    for _ in range(5):
        state, metrics = train_step(
            state,
            make_batch(),
            Hyperparams(np.float32(0.02), np.uint32(0)),
            recipe=RecipeConfig(loss="softmax", grad_accum_steps=num_microbatches),
            model=LinearModel(),
            make_schedule=optax.constant_schedule,
            make_tx=optax.sgd,
            mesh=mesh,
            sam_rho=0.3,
        )
        before, (expected, loss) = expected, numpy_sam(expected, make_batch(), 0.3, 0.02)
        # That of the parameters before the step.
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
        plain, _ = numpy_sam(before, make_batch(), 0.0, 0.02)
        for name in expected:
            np.testing.assert_allclose(state.params["head"][name], expected[name], atol=2e-6)
            assert np.abs(expected[name] - plain[name]).max() > 1e-4


def test_sam_with_a_zero_gradient_leaves_parameters() -> None:
    params = {"w": jnp.arange(3.0)}
    assert_trees_equal(perturb_params(params, {"w": jnp.zeros(3)}, 0.1), params)


# Settings of optimizers, with frozen parameters of each family.
RECIPES: dict[str, dict[str, Any]] = {
    "adafactor": {"name": "adafactor"},
    "lamb": {"name": "lamb"},
    "layer_decay": {"layer_decay": 0.7},
    "muon": {"name": "muon"},
    "sam": {"name": "sgd", "sam_rho": 0.1},
    "frozen": {"freeze": "stem,blocks.0"},
}


def train(
    family: str, optimizer: dict[str, Any], mesh: Mesh | None = None, **recipe: Any
) -> tuple[TrainState, TrainState, list[dict[str, float]]]:
    """Takes three steps; returns the states before and after them, and their metrics."""
    model = make_model(num_blocks=2, family=family, head_bias=1.0, **REGULARIZERS[family])
    mesh = mesh or mesh_of(1, 1)
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, **optimizer)
    make_tx = functools.partial(
        make_optimizer, config, family=get_family(family), architecture=model.config
    )
    settings = RecipeConfig(loss="softmax", mixup=0.5, ema_decay=0.9, **recipe)
    state = create_state(7, model, make_tx(optax.constant_schedule(0.01)), image_size=8, ema=True)
    sharding = state_sharding(state, mesh, get_family(family))
    step = jit_train_step(
        functools.partial(
            train_step,
            recipe=settings,
            model=model,
            make_schedule=optax.constant_schedule,
            make_tx=make_tx,
            mesh=mesh,
            sam_rho=config.sam_rho,
            frozen=frozen_mask(state.params, config, get_family(family), model.config),
        ),
        sharding,
        mesh,
        model,
    )
    start = jax.tree.map(np.array, state)
    state, history = jax.device_put(state, sharding), []
    for _ in range(3):
        state, metrics = step(state, make_batch(16), Hyperparams(np.float32(0.01), np.uint32(0)))
        history.append({name: float(value) for name, value in metrics.items()})
    return start, jax.device_get(state), history


@pytest.mark.parametrize(
    ("family", "name"),
    [("mixer", name) for name in RECIPES] + [("vit", "muon"), ("bit", "muon")],
)
def test_devices_and_microbatches_do_not_change_what_an_optimizer_computes(
    name: str, family: str
) -> None:
    # The gradient of the bias of keys is zero but for rounding, which Adam would amplify.
    optimizer = RECIPES[name] | ({"eps": 1e-4} if family == "vit" else {})
    _, single, expected = train(family, optimizer)
    _, sharded, actual = train(family, optimizer, mesh_of(2, 4), grad_accum_steps=2)
    assert_trees_equal(single.params, sharded.params, tolerance=1e-4)
    for a, b in zip(expected, actual, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb", "muon", "adafactor"])
def test_frozen_parameters_and_their_averages_stay_bit_identical(name: str) -> None:
    patterns = "stem,blocks.1,blocks.0.token_mixing.Dense_0.bias"
    start, state, _ = train("mixer", {"name": name, "freeze": patterns, "sam_rho": 0.05})

    def split(tree: Any) -> tuple[list[bytes], list[bytes]]:
        blocks = [jax.tree.map(lambda x, i=i: x[i], tree["blocks"]) for i in range(2)]
        bias = blocks[0]["token_mixing"]["Dense_0"].pop("bias")
        frozen = [*jax.tree.leaves((tree["stem"], blocks[1])), bias]
        trained = jax.tree.leaves((blocks[0], tree["head"], tree["pre_head_layer_norm"]))
        return [x.tobytes() for x in frozen], [x.tobytes() for x in trained]

    for before, after in (
        (start.params, state.params),
        (start.ema_params, state.ema_params),
    ):
        (frozen, trained), (still_frozen, moved) = split(before), split(after)
        assert still_frozen == frozen
        assert not set(moved) & set(trained)


def test_gradient_norm_is_that_of_trained_parameters() -> None:
    _, _, (all_trained, *_) = train("mixer", {"name": "sgd"})
    _, _, (frozen, *_) = train("mixer", {"name": "sgd", "freeze": "head,blocks.0"})
    _, _, (others, *_) = train("mixer", {"name": "sgd", "freeze": "stem,blocks.1,pre_head*"})
    norms = [metrics["gradient_norm"] for metrics in (frozen, others, all_trained)]
    assert math.hypot(*norms[:2]) == pytest.approx(norms[2], rel=1e-5)
    assert frozen["loss"] == pytest.approx(all_trained["loss"], rel=1e-6)
