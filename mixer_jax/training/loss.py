"""Targets and loss of training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float32, Int

from mixer_jax.config.schema import RecipeConfig


def make_targets(
    labels: Int[Array, " n"] | Bool[Array, "n classes"],
    num_classes: int,
    recipe: RecipeConfig,
    class_weights: Float32[np.ndarray, " classes"] | None = None,
) -> Float[Array, "n classes"]:
    """Converts labels to targets of the loss.

    Labels become one-hot vectors, and `label_smoothing` of their mass is spread over all classes.
    Multi-hot labels, which have no such mass, become vectors of zeros and ones.

    Targets are then clipped to [m, 1 − m], m = `min_target`, which moves both classes of each
    binary decision of the sigmoid loss (10⁻⁴ for ViTs on ImageNet-1k, in Scenic's config).

    The target of an example is multiplied by its class weight, if any, so that mixup mixes the
    weights as well. As the target of one label sums to 1, `cross_entropy` finds the weight again.
    """
    if labels.ndim == 2:
        targets = labels.astype(jnp.float32)
    else:
        smoothing = recipe.label_smoothing
        targets = jax.nn.one_hot(labels, num_classes) * (1.0 - smoothing) + smoothing / num_classes
    if recipe.min_target:
        targets = jnp.clip(targets, recipe.min_target, 1.0 - recipe.min_target)
    if class_weights is not None:
        targets *= jnp.asarray(class_weights)[labels][:, None]
    return targets


def cross_entropy(
    logits: Float[Array, "n classes"],
    targets: Float[Array, "n classes"],
    loss: str,
    is_weighted: bool = False,
) -> Float[Array, ""]:
    """Computes the mean cross-entropy of examples with soft targets, from float32 logits.

    Args:
        logits: Logits.
        targets: Targets, from `make_targets`, perhaps mixed.
        loss: "sigmoid", the sum of a binary cross-entropy per class (the authors' code), or
            "softmax".
        is_weighted: Whether the target of each example is multiplied by its weight.
    """
    if loss == "softmax":
        # Linear in the targets, and so in their weights.
        per_example = optax.softmax_cross_entropy(logits, targets)
    elif is_weighted:
        negatives = jnp.sum(targets, axis=-1, keepdims=True) - targets
        log_p, log_not_p = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
        per_example = -jnp.sum(targets * log_p + negatives * log_not_p, axis=-1)
    else:
        per_example = jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)
    return jnp.mean(per_example)
