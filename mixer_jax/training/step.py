"""The training step, a pure function of state and batch: mixup, loss, gradients and update."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int, Key, UInt8

from mixer_jax.config.schema import RecipeConfig
from mixer_jax.distributed.sharding import batch_sharding, replicated, sharded_value_and_grad
from mixer_jax.distributed.xla_options import compiler_options
from mixer_jax.models.layers import normalize_images
from mixer_jax.models.params import cast_weights
from mixer_jax.models.registry import get_family
from mixer_jax.models.stack import active_backend

Params = Any
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


def create_state(
    rng: Key[Array, ""],
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_size: int,
    ema: bool,
) -> TrainState:
    """Creates the state before the first step, for square images of `image_size` pixels."""
    params = model.init(rng, jnp.zeros((1, image_size, image_size, 3)))["params"]
    # A copy, because the step donates both.
    ema_params = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema_params)


def jit_train_step(
    recipe: RecipeConfig,
    seed: int,
    sharding: TrainState,
    model: nn.Module,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    class_weights: Float32[np.ndarray, " classes"] | None = None,
    sam_rho: float = 0.0,
    frozen: Params | None = None,
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, Metrics]]:
    """Jits `train_step` with the shardings of the state; the compiled step donates the state."""
    step = functools.partial(
        train_step,
        recipe=recipe,
        seed=seed,
        model=model,
        tx=tx,
        schedule=schedule,
        mesh=mesh,
        class_weights=class_weights,
        sam_rho=sam_rho,
        frozen=frozen,
    )
    platform = mesh.devices.flat[0].platform
    return jax.jit(
        step,
        in_shardings=(sharding, batch_sharding(mesh)),
        out_shardings=(sharding, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(platform, active_backend(model, train=True)),
    )


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    *,
    recipe: RecipeConfig,
    seed: int,
    model: nn.Module,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
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
        recipe: Loss, regularization and averaging.
        seed: Root of the randomness of all steps.
        model: Model, from images to logits.
        tx: Optax chain.
        schedule: Learning rate of the chain by step, for the metrics.
        mesh: Device mesh over which the state and the batch are sharded.
        class_weights: Factor of the loss of an example, by its label; None: 1.
        sam_rho: Norm of SAM's perturbation; 0 disables it.
        frozen: Masks of the parameters that stay as they are, from `frozen_mask`; None: none.

    Returns:
        The state after the step, and scalar metrics: `loss` at the parameters before the step,
        `learning_rate`, and `gradient_norm` before clipping.
    """
    mixup_rng, model_rng = step_rngs(seed, state.step)
    labels = smooth_labels(
        batch["label"], model.num_classes, recipe.label_smoothing, recipe.min_target
    )
    if class_weights is not None:
        # Mixed together with the targets, whose sum it is.
        labels *= jnp.asarray(class_weights)[batch["label"]][:, None]
    pairs = None
    if recipe.mixup or recipe.cutmix:
        pairs = sample_mixup(mixup_rng, batch["image"], labels, recipe)

    def loss_fn(params: Params, microbatch: Any, shared: Any) -> Float[Array, ""]:
        params = replace_frozen(frozen, params, jax.lax.stop_gradient)
        (arrays, example_index), (weights, rng) = microbatch, shared
        if weights is None:
            images, targets = normalize_images(arrays[0]), arrays[1]
        else:
            images, targets = apply_mixup(arrays, weights)
        logits = model.apply(
            {"params": params},
            images,
            train=True,
            example_index=example_index,
            rngs=dict(zip(("dropout", "stochastic_depth"), jax.random.split(rng), strict=True)),
        )
        return cross_entropy(logits, targets, recipe.loss, class_weights is not None)

    arrays = (batch["image"], labels) if pairs is None else pairs.arrays
    shared = (None if pairs is None else pairs.weights, model_rng)
    per_device = functools.partial(
        accumulate_gradients,
        jax.value_and_grad(loss_fn),
        num_microbatches=recipe.grad_accum_steps,
    )
    family = get_family(model.family)
    cast = functools.partial(cast_weights, dtype=model.execution.dtype, family=family)

    def compute_gradients(params: Params) -> tuple[Float[Array, ""], Params]:
        value_and_grad = sharded_value_and_grad(per_device, mesh, cast, family)
        loss, grads = value_and_grad(params, (arrays, jnp.arange(len(labels))), shared)
        # Those of frozen parameters are zero: replaced, they are not summed over the devices.
        return loss, replace_frozen(frozen, grads, jnp.zeros_like)

    loss, grads = compute_gradients(state.params)
    if sam_rho:
        _, grads = compute_gradients(perturb_params(state.params, grads, sam_rho))
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params = keep_frozen(frozen, state.params, params)
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = optax.incremental_update(params, ema_params, 1.0 - recipe.ema_decay)
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
    """Applies a function to the entries of a tree like the parameters that are frozen."""
    return tree if frozen is None else keep_frozen(frozen, jax.tree.map(function, tree), tree)


def keep_frozen(frozen: Params | None, old: Params, new: Params) -> Params:
    """Takes the frozen entries of trees like the parameters from `old`, and the others from `new`.

    `frozen` has masks that broadcast to the parameters; None: none is frozen.
    """
    if frozen is None:
        return new

    def choose(mask: Any, x: Array, y: Array) -> Array:
        # Without a selection where all is frozen, so that the gradient is known to be zero.
        return x if mask.all() else jnp.where(mask, x, y) if mask.any() else y

    return jax.tree.map(choose, frozen, old, new)


def update_norm(before: Params, after: Params) -> Float[Array, ""]:
    """Computes the norm of the parameter update, including its rounding."""
    return optax.tree.norm(jax.tree.map(jnp.subtract, after, before))


def step_rngs(seed: int, step: int | Int[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""]]:
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


def smooth_labels(
    labels: Int[Array, " n"] | Bool[Array, "n classes"],
    num_classes: int,
    smoothing: float,
    min_target: float = 0.0,
) -> Float[Array, "n classes"]:
    """Converts labels to one-hot vectors and spreads `smoothing` of their mass over all classes.

    Multi-hot labels, which have no such mass, become vectors of zeros and ones.

    Targets are then clipped to [min_target, 1 − min_target], which moves both classes of each
    binary decision of the sigmoid loss (10⁻⁴ for ViTs on ImageNet-1k, in Scenic's config).
    """
    if labels.ndim == 2:
        targets = labels.astype(jnp.float32)
    else:
        targets = jax.nn.one_hot(labels, num_classes) * (1.0 - smoothing) + smoothing / num_classes
    return jnp.clip(targets, min_target, 1.0 - min_target) if min_target else targets


# Images and their partners' images, labels and their partners' labels.
PairArrays = tuple[
    UInt8[Array, "n h w 3"],
    UInt8[Array, "n h w 3"],
    Float[Array, "n classes"],
    Float[Array, "n classes"],
]


class MixupWeights(NamedTuple):
    """Weights of all examples of a batch; those of their partners are 1 minus these.

    Attributes:
        label: Weight of an example's label, λ.
        pixels: Weight of each pixel of its image; CutMix: 0 in the box and 1 outside. None: λ.
    """

    label: Float[Array, ""]
    pixels: Float[Array, "1 h w 1"] | None = None


class MixupPairs(NamedTuple):
    """Examples and their partners before mixing, and the weights of the examples."""

    arrays: PairArrays
    weights: MixupWeights


def sample_mixup(
    rng: Key[Array, ""],
    images: UInt8[Array, "n h w 3"],
    labels: Float[Array, "n classes"],
    recipe: RecipeConfig,
) -> MixupPairs:
    """Pairs the examples of a batch, and samples the weights that mixup or CutMix mixes them with.

    The partners are the batch rolled by one (the authors' code). The whole batch is rolled, as
    uint8; mixing follows per microbatch, in float32.

    Mixup's weight is λ = max(b, 1−b), b from Beta(p, p). BiT takes b itself (arXiv 1912.11370).
    That trains the same model: with weight 1−λ, a batch becomes the mixtures that its reverse
    becomes with weight λ, and the order of a batch is random.
    """
    sample = jax.random.beta(rng, recipe.mixup, recipe.mixup) if recipe.mixup else jnp.ones(())
    arrays = (images, jnp.roll(images, 1, axis=0), labels, jnp.roll(labels, 1, axis=0))
    weights = MixupWeights(jnp.maximum(sample, 1.0 - sample))
    if recipe.cutmix:
        # The first two keys that are derived from `rng` are those of mixup's Beta distribution.
        cutmix_rng, (height, width) = jax.random.fold_in(rng, 2), images.shape[1:3]
        weights = sample_cutmix(cutmix_rng, weights.label, height, width, recipe)
    return MixupPairs(arrays, weights)


def sample_cutmix(
    rng: Key[Array, ""],
    mixup_weight: Float[Array, ""],
    height: int,
    width: int,
    recipe: RecipeConfig,
) -> MixupWeights:
    """Samples CutMix's weights, or keeps those of mixup in the steps that use mixup.

    If a recipe has both, a step uses CutMix with probability `mixup_switch_prob`, as in timm.
    """
    mask_rng, switch_rng = jax.random.split(rng)
    mask = sample_cutmix_mask(mask_rng, height, width, recipe.cutmix)
    use_cutmix = jax.random.bernoulli(switch_rng, recipe.mixup_switch_prob if recipe.mixup else 1.0)
    return MixupWeights(
        label=jnp.where(use_cutmix, jnp.mean(mask), mixup_weight),
        pixels=jnp.where(use_cutmix, mask, mixup_weight),
    )


def sample_cutmix_mask(
    rng: Key[Array, ""], height: int, width: int, alpha: float
) -> Float[Array, "1 h w 1"]:
    """Samples CutMix's mask, which is 0 in a box and 1 outside (arXiv 1905.04899, Section 3.1).

    Sides of the box are √(1−λ) of those of the image, λ from Beta(alpha, alpha), and its center is
    uniform. Where it extends beyond the image it is clipped, so that the mean of the mask may be
    larger than λ. Labels are weighted by that mean (the authors' code).
    """
    lambda_rng, *center_rngs = jax.random.split(rng, 3)
    fraction = jnp.sqrt(1.0 - jax.random.beta(lambda_rng, alpha, alpha))

    def sample_interval(rng: Key[Array, ""], length: int) -> Bool[Array, " length"]:
        size = jnp.int32(length * fraction)
        start = jax.random.randint(rng, (), 0, length) - size // 2
        index = jnp.arange(length)
        return (start <= index) & (index < start + size)

    rows, columns = map(sample_interval, center_rngs, (height, width))
    in_box = rows[:, None] & columns[None, :]
    return jnp.where(in_box, 0.0, 1.0)[None, :, :, None]


def apply_mixup(
    arrays: PairArrays, weights: MixupWeights
) -> tuple[Float[Array, "n h w 3"], Float[Array, "n classes"]]:
    """Mixes images, normalized to [-1, 1], and labels with those of their partners."""
    images, partner_images, labels, partner_labels = arrays
    weight = weights.label if weights.pixels is None else weights.pixels
    mixed = weight * normalize_images(images) + (1.0 - weight) * normalize_images(partner_images)
    return mixed, weights.label * labels + (1.0 - weights.label) * partner_labels


def cross_entropy(
    logits: Float[Array, "n classes"],
    labels: Float[Array, "n classes"],
    loss: str,
    is_weighted: bool = False,
) -> Float[Array, ""]:
    """Computes the mean cross-entropy of examples with soft labels, from float32 logits.

    `loss` is "sigmoid", the sum of a binary cross-entropy per class (the authors' code), or
    "softmax". If `is_weighted`, labels are multiplied by the weight of their example, their sum.
    """
    if loss == "sigmoid" and is_weighted:
        negatives = jnp.sum(labels, axis=-1, keepdims=True) - labels
        log_p, log_not_p = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
        per_example = -jnp.sum(labels * log_p + negatives * log_not_p, axis=-1)
    elif loss == "sigmoid":
        per_example = jnp.sum(optax.sigmoid_binary_cross_entropy(logits, labels), axis=-1)
    else:
        per_example = optax.softmax_cross_entropy(logits, labels)
    return jnp.mean(per_example)
