"""The optimizer as an optax chain: clip, Adam or momentum, decay, schedule (Section 3)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def make_schedule(
    num_steps: int,
    *,
    learning_rate: float,
    warmup_steps: int,
    decay_type: str,
    end_learning_rate: float,
) -> optax.Schedule:
    """Returns the learning rate as a function of the step, counted from 0.

    It rises linearly from 0 at step 0 to `learning_rate` at step `warmup_steps`, then decays so
    that it would reach `end_learning_rate` at step `num_steps`, one after the last (Appendix B).

    Args:
        num_steps: of the run.
        learning_rate: at the end of warmup.
        warmup_steps: length of the warmup.
        decay_type: "linear", "cosine" or "none".
        end_learning_rate: at the end of the run; unused by decay_type "none".
    """
    decay_steps = max(num_steps - warmup_steps, 1)
    if decay_type == "linear":
        after = optax.linear_schedule(learning_rate, end_learning_rate, decay_steps)
    elif decay_type == "cosine":
        share = end_learning_rate / learning_rate if learning_rate else 0.0
        after = optax.cosine_decay_schedule(learning_rate, decay_steps, alpha=share)
    else:
        after = optax.constant_schedule(learning_rate)
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    schedule: optax.Schedule,
    *,
    name: str,
    weight_decay: float,
    b1: float,
    b2: float,
    eps: float,
    momentum: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """Returns the optax chain of a recipe.

    Args:
        schedule: learning rate by step.
        name: "adam" or "momentum".
        weight_decay: times the scheduled learning rate, taken off kernels (AdamW's convention).
        b1: Adam's decay of the first moment.
        b2: Adam's decay of the second moment.
        eps: Adam's epsilon.
        momentum: of SGD.
        clip_norm: largest global norm of the gradients; 0 does not clip.
    """
    moments = (
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps) if name == "adam" else optax.trace(momentum)
    )
    return optax.chain(
        clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        moments,
        optax.add_decayed_weights(weight_decay, mask=weight_decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Returns what makes gradients smaller, where their global norm is above `max_norm`.

    It is optax's, but for the order: there every number is divided by the norm, which CPUs write to
    memory before they go on; here one factor is, and multiplies them where they are used.
    """

    def update(grads: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        norm = optax.tree.norm(grads)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def weight_decay_mask(params: Any) -> Any:
    """Returns a tree like `params`, true where weight decay applies: at kernels only.

    Biases and LayerNorm are spared; the kernels of stem and head are not (the authors' code).
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
