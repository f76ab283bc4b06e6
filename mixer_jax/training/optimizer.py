"""Optimizer as an optax chain: clipping, Adam or momentum, weight decay (Section 3)."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mixer_jax.config.schema import OptimizerConfig
from mixer_jax.models.family import ModelFamily


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Creates the learning-rate schedule, a function of the step, counted from 0.

    The rate rises linearly from 0 at step 0 to its peak at step `warmup_steps`, and then decays so
    that it would reach `end_learning_rate` at step `num_steps`, one after the last (Appendix B).
    With a staircase, it is a tenth of the former rate from each decay point on: the first step at
    or after that fraction of `num_steps` (arXiv 1912.11370, Section 3.3).
    """
    peak, end = config.learning_rate, config.end_learning_rate
    decay_steps = max(num_steps - config.warmup_steps, 1)
    if config.decay_type == "linear":
        decay = optax.linear_schedule(peak, end, decay_steps)
    elif config.decay_type == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=end / peak if peak else 0.0)
    elif config.decay_type == "staircase":
        decay = _staircase(
            peak,
            [
                math.ceil(point * num_steps) - config.warmup_steps
                for point in config.decay_fractions
            ],
        )
    else:
        decay = optax.constant_schedule(peak)
    if not config.warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def _staircase(peak: float, steps: Sequence[int]) -> optax.Schedule:
    rates = [peak * 0.1**index for index in range(len(steps) + 1)]

    def schedule(step: Any) -> Any:
        # A table, because the rounding of powers depends on the device.
        return jnp.asarray(rates, jnp.float32)[jnp.sum(jnp.asarray(steps) <= step)]

    return schedule


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, family: ModelFamily
) -> optax.GradientTransformation:
    """Creates the optax chain.

    Weight decay is multiplied by the scheduled learning rate (AdamW's convention).
    """
    if config.name == "adam":
        moments = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    else:
        moments = optax.trace(config.momentum)
    mask = functools.partial(weight_decay_mask, family=family)
    return optax.chain(
        clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        moments,
        optax.add_decayed_weights(config.weight_decay, mask=mask),
        optax.scale_by_learning_rate(schedule),
    )


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Creates a transformation that scales gradients down to a global norm of at most `max_norm`.

    It equals optax's except for rounding. Optax divides every gradient by the norm, which CPUs
    write to memory before the next operation; here, gradients are multiplied by one factor, which
    fuses with their use.
    """

    def update(grads: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        norm = optax.tree.norm(grads)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def weight_decay_mask(params: Any, family: ModelFamily) -> Any:
    """Builds a tree like `params` that is True where weight decay applies.

    For Mixer that is at all kernels, including those of stem and head (the authors' code).
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: family.is_weight_decayed(tuple(key.key for key in path)), params
    )
