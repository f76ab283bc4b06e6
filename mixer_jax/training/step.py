"""One training step as pure functions of (state, batch): loss, mixup, gradients, update."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt8

from mixer_jax.distributed.gradients import sharded_value_and_grad
from mixer_jax.models.layers import normalize_images
from mixer_jax.models.params import cast_weights

Params = Any
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """Everything that a step changes. Randomness is no part of it: it follows from seed and step.

    Attributes:
        step: steps done so far.
        params: of the model, float32.
        opt_state: of the optax chain.
        ema_params: averaged parameters, or None where the recipe does not average.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    ema_params: Params | None

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate and to use: the averaged ones where there are any."""
        return self.params if self.ema_params is None else self.ema_params


def create_state(
    rng: Key[Array, ""],
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_size: int,
    ema: bool,
) -> TrainState:
    """Returns the state before the first step, for square images of `image_size` pixels."""
    params = model.init(rng, jnp.zeros((1, image_size, image_size, 3)))["params"]
    # A copy, for the step donates both.
    ema_params = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema_params)


def train_step(
    state: TrainState,
    batch: dict[str, Array],
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    num_classes: int,
    seed: int,
    loss: str,
    label_smoothing: float,
    mixup: float,
    grad_accum_steps: int,
    ema_decay: float,
) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step on a batch.

    Args:
        state: before the step.
        batch: `image` uint8 (n, h, w, 3) and `label` int32 (n,).
        model: an `MlpMixer`, from images to logits.
        tx: the optax chain.
        schedule: its learning rate, for the metrics.
        mesh: of the devices, over which state and batch lie.
        num_classes: of the labels.
        seed: randomness of the step follows from it and from `state.step`.
        loss: "sigmoid" or "softmax".
        label_smoothing: share of each label spread over all classes.
        mixup: parameter of the Beta distribution, 0 for none.
        grad_accum_steps: pieces that the batch is computed in; times the devices, must divide n.
        ema_decay: of the averaged parameters; unused where the state has none.

    Returns:
        The state after the step, and scalars: loss, learning_rate, and gradient_norm, before
        clipping.
    """
    mixup_rng, model_rng = step_rngs(seed, state.step)
    labels = smooth_labels(batch["label"], num_classes, label_smoothing)
    pairs = sample_mixup(mixup_rng, batch["image"], labels, mixup) if mixup else None

    def loss_fn(params: Params, piece: Any, common: Any) -> Float[Array, ""]:
        (arrays, places), (weight, rng) = piece, common
        if weight is None:
            images, targets = normalize_images(arrays[0]), arrays[1]
        else:
            images, targets = apply_mixup(arrays, weight)
        logits = model.apply(
            {"params": params},
            images,
            train=True,
            example_index=places,
            rngs=dict(zip(("dropout", "stochastic_depth"), jax.random.split(rng), strict=True)),
        )
        return cross_entropy(logits, targets, loss)

    whole = (batch["image"], labels) if pairs is None else pairs.arrays
    common = (None if pairs is None else pairs.weight, model_rng)
    on_one_device = functools.partial(
        accumulate_gradients, jax.value_and_grad(loss_fn), num_microbatches=grad_accum_steps
    )
    cast = functools.partial(cast_weights, dtype=model.execution.dtype)
    value, grads = sharded_value_and_grad(on_one_device, mesh, cast)(
        state.params, (whole, jnp.arange(len(labels))), common
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = optax.incremental_update(params, ema_params, 1.0 - ema_decay)
    metrics = {
        "loss": value,
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "gradient_norm": optax.tree.norm(grads),
    }
    return TrainState(state.step + 1, params, opt_state, ema_params), metrics


def update_norm(before: Params, after: Params) -> Float[Array, ""]:
    """Returns the norm of what a step added to the parameters, as they were rounded."""
    return optax.tree.norm(jax.tree.map(jnp.subtract, after, before))


def step_rngs(seed: int, step: int | Int[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """Returns the random keys of a step: of its mixup, and of what the model drops.

    Args:
        seed: of the run.
        step: steps done before it.
    """
    mixup_rng, model_rng = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return mixup_rng, model_rng


def accumulate_gradients(
    value_and_grad: Callable[[Params, Any, Any], tuple[Array, Params]],
    params: Params,
    batch: Any,
    common: Any,
    num_microbatches: int,
) -> tuple[Array, Params]:
    """Computes the mean value and gradient over `num_microbatches` equal microbatches in turn.

    Args:
        value_and_grad: from parameters, a piece and what is common to all of them to a mean value
            and its gradient.
        params: of the model.
        batch: arrays (n, ...); n is a multiple of `num_microbatches`.
        common: given to every piece.
        num_microbatches: 1 computes the batch in one go.
    """
    if num_microbatches == 1:
        return value_and_grad(params, batch, common)

    def split(x: Array) -> Array:
        return x.reshape(num_microbatches, -1, *x.shape[1:])

    def add(total: Any, piece: Any) -> tuple[Any, None]:
        # Gradients may be of a smaller type; their sum is not.
        return jax.tree.map(jnp.add, total, value_and_grad(params, piece, common)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    total, _ = jax.lax.scan(add, (jnp.zeros(()), zeros), jax.tree.map(split, batch))
    return jax.tree.map(lambda x: x / num_microbatches, total)


def smooth_labels(
    labels: Int[Array, " n"], num_classes: int, smoothing: float
) -> Float[Array, "n classes"]:
    """Returns one-hot labels with `smoothing` of their mass spread evenly over all classes."""
    return jax.nn.one_hot(labels, num_classes) * (1.0 - smoothing) + smoothing / num_classes


# Images and their partners' images, labels and their partners' labels.
PairArrays = tuple[
    UInt8[Array, "n h w 3"],
    UInt8[Array, "n h w 3"],
    Float[Array, "n classes"],
    Float[Array, "n classes"],
]


class MixupPairs(NamedTuple):
    """A batch beside its mixup partners, not mixed yet, and the weight of the batch."""

    arrays: PairArrays
    weight: Float[Array, ""]


def sample_mixup(
    rng: Key[Array, ""],
    images: UInt8[Array, "n h w 3"],
    labels: Float[Array, "n classes"],
    alpha: float,
) -> MixupPairs:
    """Draws one weight λ = max(b, 1−b), b from Beta(alpha, alpha), and pairs each example.

    The partner is the batch rolled by one (the authors' code). It is rolled as uint8, across the
    whole batch, and mixed later, piece by piece, in float32.
    """
    drawn = jax.random.beta(rng, alpha, alpha)
    arrays = (images, jnp.roll(images, 1, axis=0), labels, jnp.roll(labels, 1, axis=0))
    return MixupPairs(arrays, jnp.maximum(drawn, 1.0 - drawn))


def apply_mixup(
    arrays: PairArrays, weight: Float[Array, ""]
) -> tuple[Float[Array, "n h w 3"], Float[Array, "n classes"]]:
    """Returns images in [-1, 1] and labels, `weight` parts own and 1 − `weight` the partner's."""
    images, partner_images, labels, partner_labels = arrays
    mixed = weight * normalize_images(images) + (1.0 - weight) * normalize_images(partner_images)
    return mixed, weight * labels + (1.0 - weight) * partner_labels


def cross_entropy(
    logits: Float[Array, "n classes"], labels: Float[Array, "n classes"], kind: str
) -> Float[Array, ""]:
    """Returns the mean over examples of the cross-entropy with soft labels.

    Args:
        logits: float32.
        labels: probabilities, one per class.
        kind: "sigmoid" sums a binary cross-entropy over classes (the authors' code); "softmax".
    """
    if kind == "sigmoid":
        per_example = jnp.sum(optax.sigmoid_binary_cross_entropy(logits, labels), axis=-1)
    else:
        per_example = optax.softmax_cross_entropy(logits, labels)
    return jnp.mean(per_example)
