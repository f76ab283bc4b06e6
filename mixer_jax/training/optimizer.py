"""Optimizer as an optax chain, by name: clipping, update rule, weight decay, learning rate."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.typing import ArrayLike

from mixer_jax.config.schema import OptimizerConfig
from mixer_jax.models.family import MatrixAxes, ModelFamily, Path
from mixer_jax.models.param_groups import frozen_blocks, learning_rate_factors

# RMS of Muon's updates. AdamW's have about the same, so that both take the same learning rate and
# weight decay (arXiv 2502.16982, Section 2.2).
_MUON_RMS = 0.2
# Smallest axis over which Adafactor averages squared gradients (arXiv 2106.04560, authors' code).
_ADAFACTOR_MIN_AXIS = 32


def make_schedule(
    config: OptimizerConfig, num_steps: int, peak: ArrayLike | None = None
) -> optax.Schedule:
    """Creates the learning-rate schedule, a function of the step, counted from 0.

    The rate rises linearly from 0 at step 0 to its peak at step `warmup_steps`, and then decays so
    that it would reach `end_learning_rate` at step `num_steps`, one after the last (Appendix B).
    With a staircase, it is a tenth of the former rate from each decay point on: the first step at
    or after that fraction of `num_steps` (arXiv 1912.11370, Section 3.3).

    rsqrt divides the peak by √(1 + t / `rsqrt_timescale`), t steps after warmup. In the last
    `cooldown_steps`, the difference to `end_learning_rate` is multiplied by a factor that falls
    linearly from 1 to 0 at step `num_steps` (arXiv 2106.04560, Section 3.5).

    Args:
        config: Optimizer settings.
        num_steps: Steps of the whole run.
        peak: Peak learning rate, e.g. an argument of a compiled function; None: that of the config.
    """
    peak = config.learning_rate if peak is None else peak
    end = config.end_learning_rate
    decay_steps = max(num_steps - config.warmup_steps, 1)
    if config.decay_type == "linear":
        decay = optax.linear_schedule(peak, end, decay_steps)
    elif config.decay_type == "cosine":
        decay = _interpolate(peak, end, optax.cosine_decay_schedule(1.0, decay_steps))
    elif config.decay_type == "staircase":
        decay = _staircase(
            peak,
            [
                math.ceil(point * num_steps) - config.warmup_steps
                for point in config.decay_fractions
            ],
        )
    elif config.decay_type == "rsqrt":
        decay = _rsqrt(peak, config.rsqrt_timescale)
    else:
        decay = optax.constant_schedule(peak)
    if config.cooldown_steps:
        decay = _cool_down(decay, end, decay_steps, config.cooldown_steps)
    if not config.warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def _interpolate(peak: ArrayLike, end: float, factor: optax.Schedule) -> optax.Schedule:
    return lambda step: end + (peak - end) * factor(step)


def _staircase(peak: ArrayLike, steps: Sequence[int]) -> optax.Schedule:
    rates = [peak * 0.1**index for index in range(len(steps) + 1)]

    def schedule(step: Any) -> Any:
        # A table, because the rounding of powers depends on the device.
        return jnp.asarray(rates, jnp.float32)[jnp.sum(jnp.asarray(steps) <= step)]

    return schedule


def _rsqrt(peak: ArrayLike, timescale: int) -> optax.Schedule:
    return lambda step: peak / jnp.sqrt(1.0 + step / timescale)


def _cool_down(
    decay: optax.Schedule, end: float, num_steps: int, cooldown_steps: int
) -> optax.Schedule:
    def schedule(step: Any) -> Any:
        factor = jnp.clip((num_steps - step) / cooldown_steps, 0.0, 1.0)
        return end + (decay(step) - end) * factor

    return schedule


def make_optimizer(
    config: OptimizerConfig,
    schedule: optax.Schedule,
    family: ModelFamily,
    architecture: Any = None,
) -> optax.GradientTransformation:
    """Creates the optax chain.

    Weight decay is multiplied by the scheduled learning rate (AdamW's convention). `layer_decay`
    scales the final update, weight decay included. Stacked parameters are updated as if the arrays
    of each block were separate. Arrays that are frozen as a whole have no state; `train_step` keeps
    the values of all frozen parameters.

    Args:
        config: Config of the optimizer.
        schedule: Learning rate by step.
        family: Family of the model.
        architecture: Its architecture config, for layer decay and freezing.
    """
    mask = functools.partial(weight_decay_mask, family=family)
    steps = [
        clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _scale_by_name(config, family),
        optax.add_decayed_weights(config.weight_decay, mask=mask),
    ]
    if config.name == "lamb":
        # The norm of an update includes weight decay.
        steps.append(apply_per_block(optax.scale_by_trust_ratio(), family))
    if config.layer_decay < 1:
        factors = functools.partial(learning_rate_factors, config.layer_decay, family, architecture)
        steps.append(
            optax.stateless(
                lambda updates, params: _map_by_path(
                    lambda path, update: update * _per_block(factors(path), update), updates
                )
            )
        )
    tx = optax.chain(*steps, optax.scale_by_learning_rate(schedule))
    if not config.freeze_patterns:
        return tx
    return optax.masked(
        tx,
        lambda params: jax.tree.map(
            lambda frozen: not frozen.all(), frozen_mask(params, config, family, architecture)
        ),
    )


def frozen_mask(
    params: Any, config: OptimizerConfig, family: ModelFamily, architecture: Any
) -> Any:
    """Builds a tree like `params` of boolean arrays that are True where parameters are frozen.

    Their shapes broadcast to those of the parameters. Returns None if no parameter is frozen.
    """
    patterns = config.freeze_patterns
    if not patterns:
        return None
    return _map_by_path(
        lambda path, array: _per_block(frozen_blocks(patterns, family, architecture, path), array),
        params,
    )


def _per_block(values: Sequence[bool] | Sequence[float], array: Any) -> np.ndarray:
    """Converts a value per block, or a single one, to an array that broadcasts to a parameter."""
    dtype = np.float32 if isinstance(values[0], float) else np.bool_
    return np.asarray(values, dtype).reshape(-1, *(1,) * (array.ndim - 1))


def _scale_by_name(config: OptimizerConfig, family: ModelFamily) -> optax.GradientTransformation:
    """Creates the transformation from gradients to updates before weight decay."""
    if config.name == "sgd":
        return optax.trace(config.momentum)
    if config.name == "lion":
        return optax.scale_by_lion(b1=config.b1, b2=config.b2)
    if config.name == "adafactor":
        # As in the code of ViT's authors: with momentum, and not scaled by the RMS of parameters.
        scaling = optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=_ADAFACTOR_MIN_AXIS),
            optax.clip_by_block_rms(1.0),
        )
        momentum = optax.ema(config.momentum, debias=False)
        return optax.chain(
            apply_per_block(scaling, family), momentum if config.momentum else optax.identity()
        )
    if config.name == "muon":
        return _scale_by_muon(config, family)
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


def _scale_by_muon(config: OptimizerConfig, family: ModelFamily) -> optax.GradientTransformation:
    """Creates Muon for matrices and Adam for all other parameters, both with Nesterov momentum."""

    def scale(path: Path, update: Any) -> Any:
        inputs, outputs = (
            math.prod(update.shape[axis] for axis in axes) for axes in _matrix_axes(family, path)
        )
        return update * (_MUON_RMS * max(inputs, outputs) ** 0.5)

    def dimension_numbers(updates: Any) -> Any:
        return _map_by_path(
            lambda path, _: optax.contrib.MuonDimensionNumbers(*_matrix_axes(family, path)), updates
        )

    muon = optax.chain(
        optax.contrib.scale_by_muon(
            beta=config.momentum, eps=config.eps, weight_dimension_numbers=dimension_numbers
        ),
        optax.stateless(lambda updates, params: _map_by_path(scale, updates)),
    )
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, nesterov=True)
    return _choose(lambda path: family.matrix_axes(path) is not None, muon, adam)


def _matrix_axes(family: ModelFamily, path: Path) -> MatrixAxes:
    axes = family.matrix_axes(path)
    assert axes is not None
    return axes


def apply_per_block(
    tx: optax.GradientTransformation, family: ModelFamily
) -> optax.GradientTransformation:
    """Extends a transformation of separate arrays to the stacked arrays of blocks.

    Each block's array of a stack is transformed like an array of its own: norms and means do not
    mix blocks. All states of a stack have a leading axis of blocks.
    """

    def map_blocks(function: Callable[..., Any]) -> Callable[..., Any]:
        # Without a stack, there is nothing to map over.
        return lambda tree, *args: (
            jax.vmap(function)(tree, *args) if jax.tree.leaves(tree) else function(tree, *args)
        )

    stacked = optax.GradientTransformation(map_blocks(tx.init), map_blocks(tx.update))
    return _choose(family.is_stacked, stacked, tx)


def _choose(
    condition: Callable[[Path], bool],
    if_true: optax.GradientTransformation,
    if_false: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Applies one of two transformations to each parameter, by its path.

    Unlike with `optax.partition`, the path of a moment ends with the path of its parameter, by
    which it is sharded.
    """

    def mask(tree: Any, value: bool) -> Any:
        return _map_by_path(lambda path, _: condition(path) is value, tree)

    return optax.chain(
        optax.masked(if_true, functools.partial(mask, value=True)),
        optax.masked(if_false, functools.partial(mask, value=False)),
    )


def _map_by_path(function: Callable[[Path, Any], Any], tree: Any) -> Any:
    """Maps over the path and the array of each parameter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, array: function(tuple(key.key for key in path), array), tree
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
    return _map_by_path(lambda path, _: family.is_weight_decayed(path), params)
