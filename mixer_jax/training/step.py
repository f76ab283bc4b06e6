"""The training step, a pure function of state, batch and hyperparameters.

It computes gradients, updates the parameters and averages them.

Targets and loss are in loss.py, mixup and CutMix in mixup.py, and the optax chain in optimizer.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int, Key, UInt32

from mixer_jax.config.schema import RecipeConfig
from mixer_jax.distributed.sharding import batch_sharding, replicated, sharded_value_and_grad
from mixer_jax.distributed.xla_options import compiler_options
from mixer_jax.models.params import cast_weights
from mixer_jax.models.registry import get_family
from mixer_jax.models.stack import active_backend
from mixer_jax.training.loss import cross_entropy, make_targets
from mixer_jax.training.mixup import apply_mixup, sample_mixup

Params = Any
Seed = int | UInt32[Array | np.number, ""]
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """Everything that training steps change. Randomness follows from the seed and the step.

    Parameters are float32; `ema_params` is None without averaging.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    ema_params: Params | None

    @property
    def eval_params(self) -> Params:
        """Parameters for evaluation and inference: the averaged ones, if any."""
        return self.params if self.ema_params is None else self.ema_params


class Hyperparams(NamedTuple):
    """Hyperparameters that are arguments of the compiled step, instead of constants in it.

    Runs that differ in nothing else, such as those of a sweep, share one program.

    Attributes:
        learning_rate: Peak of the schedule.
        seed: Root of the randomness of all steps.
    """

    learning_rate: Float32[Array | np.number, ""]
    seed: UInt32[Array | np.number, ""]


# From the state, a batch and the hyperparameters to the next state and the metrics.
TrainStep = Callable[[TrainState, dict[str, Array], Hyperparams], tuple[TrainState, Metrics]]


def create_state(
    seed: Seed,
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_size: int,
    ema: bool,
) -> TrainState:
    """Creates the state before the first step.

    Args:
        seed: Seed of the initial parameters.
        model: Model, from images to logits.
        tx: Optax chain.
        image_size: Side of the square input, in pixels.
        ema: Whether the state has averaged parameters.
    """
    params = model.init(jax.random.key(seed), jnp.zeros((1, image_size, image_size, 3)))["params"]
    # A copy, because the step donates both.
    ema_params = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema_params)


def jit_train_step(
    step: TrainStep, sharding: TrainState, mesh: Mesh, model: nn.Module
) -> TrainStep:
    """Jits a training step with the shardings of the state; the compiled step donates the state.

    Args:
        step: `train_step` with its keyword arguments bound.
        sharding: Sharding of each array of the state.
        mesh: Device mesh of the step.
        model: Model of the step, by which the options of the compiler are chosen.
    """
    platform = mesh.devices.flat[0].platform
    return jax.jit(
        step,
        in_shardings=(sharding, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(sharding, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(platform, active_backend(model, train=True)),
    )


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    hyperparams: Hyperparams,
    *,
    recipe: RecipeConfig,
    model: nn.Module,
    make_schedule: Callable[[Any], optax.Schedule],
    make_tx: Callable[[optax.Schedule], optax.GradientTransformation],
    mesh: Mesh,
    class_weights: Float32[np.ndarray, " classes"] | None = None,
    sam_rho: float = 0.0,
    frozen: Params | None = None,
) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step on a batch.

    Args:
        state: State before the step.
        batch: `image` uint8 (n, h, w, 3), and `label` int32 (n,) or, with several labels per image,
            bool (n, classes); n is a multiple of microbatches × devices.
        hyperparams: Peak learning rate and seed.
        recipe: Loss, regularization and averaging.
        model: Model, from images to logits.
        make_schedule: Creates the learning-rate schedule from its peak.
        make_tx: Creates the optax chain from the schedule.
        mesh: Device mesh over which the state and the batch are sharded.
        class_weights: Factor of the loss of an example, by its class; None: 1.
        sam_rho: Norm of SAM's perturbation; 0 disables it.
        frozen: Tree of masks that are True where parameters are frozen, from `frozen_mask`; None if
            none are.

    Returns:
        The state after the step, and scalar metrics: `loss` at the parameters before the step,
        `learning_rate`, and `gradient_norm` before clipping, with SAM at the perturbed parameters.
    """
    mixup_rng, model_rng = step_rngs(hyperparams.seed, state.step)
    targets = make_targets(batch["label"], model.num_classes, recipe, class_weights)
    pairs, weights = sample_mixup(mixup_rng, batch["image"], targets, recipe)
    # `examples` are split over devices and microbatches, which all get the same `shared`.
    examples, shared = (pairs, jnp.arange(len(targets))), (weights, model_rng)

    def loss_fn(params: Params, examples: Any, shared: Any) -> Float[Array, ""]:
        (pairs, example_index), (weights, rng) = examples, shared
        # Otherwise, the backward pass would compute gradients of frozen parameters as well.
        params = replace_frozen(frozen, params, jax.lax.stop_gradient)
        images, targets = apply_mixup(pairs, weights)
        logits = model.apply(
            {"params": params},
            images,
            train=True,
            example_index=example_index,
            rngs=dict(zip(("dropout", "stochastic_depth"), jax.random.split(rng), strict=True)),
        )
        return cross_entropy(logits, targets, recipe.loss, is_weighted=class_weights is not None)

    family = get_family(model.family)
    value_and_grad = sharded_value_and_grad(
        functools.partial(
            accumulate_gradients,
            jax.value_and_grad(loss_fn),
            num_microbatches=recipe.grad_accum_steps,
        ),
        mesh,
        functools.partial(cast_weights, dtype=model.execution.dtype, family=family),
        family,
    )

    def compute_gradients(params: Params) -> tuple[Float[Array, ""], Params]:
        loss, grads = value_and_grad(params, examples, shared)
        # Gradients of frozen parameters are zero already; constants are not summed over devices.
        return loss, replace_frozen(frozen, grads, jnp.zeros_like)

    loss, grads = compute_gradients(state.params)
    if sam_rho:
        _, grads = compute_gradients(perturb_params(state.params, grads, sam_rho))
    schedule = make_schedule(hyperparams.learning_rate)
    updates, opt_state = make_tx(schedule).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params = keep_frozen(frozen, state.params, params)
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = optax.incremental_update(params, ema_params, 1.0 - recipe.ema_decay)
        # Averaging a parameter with itself would round.
        ema_params = keep_frozen(frozen, state.ema_params, ema_params)
    metrics = {
        "loss": loss,
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "gradient_norm": optax.tree.norm(grads),
    }
    return TrainState(state.step + 1, params, opt_state, ema_params), metrics


def perturb_params(params: Params, grads: Params, rho: float) -> Params:
    """Moves parameters by `rho` along their gradient (SAM, arXiv 2010.01412, Equation 2).

    The gradient is that of the whole batch, so that the result does not depend on the number of
    devices; the authors perturb by the gradient of each device's examples.
    """
    factor = rho / jnp.maximum(optax.tree.norm(grads), jnp.finfo(jnp.float32).tiny)
    return jax.tree.map(lambda param, grad: param + factor * grad, params, grads)


def replace_frozen(
    frozen: Params | None, tree: Params, function: Callable[[Array], Array]
) -> Params:
    """Applies a function to the frozen entries of a tree that has the shapes of the parameters."""
    return tree if frozen is None else keep_frozen(frozen, jax.tree.map(function, tree), tree)


def keep_frozen(frozen: Params | None, old: Params, new: Params) -> Params:
    """Selects the frozen entries of `old`, and all others of `new`.

    Both have the shapes of the parameters. `frozen` is a tree of masks that broadcast to them, or
    None if no parameter is frozen.
    """
    if frozen is None:
        return new

    def choose(mask: Any, x: Array, y: Array) -> Array:
        # No `where` if all of an array is frozen, so that JAX knows its gradient to be zero.
        return x if mask.all() else jnp.where(mask, x, y) if mask.any() else y

    return jax.tree.map(choose, frozen, old, new)


def update_norm(before: Params, after: Params) -> Float[Array, ""]:
    """Computes the norm of the parameter update, including its rounding."""
    return optax.tree.norm(jax.tree.map(jnp.subtract, after, before))


def step_rngs(seed: Seed, step: int | Int[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """Derives the random keys of the step that follows `step` others.

    One is for mixup and CutMix, the other for dropout and stochastic depth.
    """
    mixup_rng, model_rng = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return mixup_rng, model_rng


def accumulate_gradients(
    value_and_grad: Callable[[Params, Any, Any], tuple[Array, Params]],
    params: Params,
    batch: Any,
    shared: Any,
    num_microbatches: int,
) -> tuple[Array, Params]:
    """Computes the mean value and gradient over equal microbatches, one after the other.

    Args:
        value_and_grad: Function from parameters, a microbatch and `shared` to a mean value and its
            gradient.
        params: Parameters of the model.
        batch: Arrays (n, ...); n is a multiple of `num_microbatches`.
        shared: Argument that all microbatches share.
        num_microbatches: Number of microbatches; 1 computes the whole batch at once.
    """
    if num_microbatches == 1:
        return value_and_grad(params, batch, shared)

    def split(x: Array) -> Array:
        return x.reshape(num_microbatches, -1, *x.shape[1:])

    def add(total: Any, microbatch: Any) -> tuple[Any, None]:
        # Summed in float32, although gradients may have a smaller dtype.
        return jax.tree.map(jnp.add, total, value_and_grad(params, microbatch, shared)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    total, _ = jax.lax.scan(add, (jnp.zeros(()), zeros), jax.tree.map(split, batch))
    return jax.tree.map(lambda x: x / num_microbatches, total)
