"""What the kernels of tpu_kernels.py do with the images of one program, all of it on the chip.

A body takes references to blocks. Operands of a product are of the type of the tokens, its sum is
float32. Only products that the matrix unit has by itself are used, `a @ b` and `a @ b.T`: what has
to lie across is put there once, and is as wide as the tokens, not as the hidden units.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from mixer_jax.model.layers import Gelu
from mixer_jax.model.tpu_kernel_math import (
    dot,
    dot_across,
    gelu_and_slope,
    normalize,
    through_layer_norm,
)


def token_forward(
    keep: Any,
    x: Any,
    scale: Any,
    bias: Any,
    kernel1_across: Any,
    bias1: Any,
    kernel2_across: Any,
    bias2: Any,
    out: Any,
    *,
    gelu: Gelu,
) -> None:
    """Mixes the tokens of each image; hidden units lie (h, c).

    Args:
        keep: of all images, (n,).
        x: tokens, (images, s, c), and so `out`.
        scale: of LayerNorm, (1, c), and so `bias`.
        bias: of LayerNorm.
        kernel1_across: (h, s).
        bias1: (h, 1).
        kernel2_across: (s, h).
        bias2: (s, 1).
        out: the result.
        gelu: which.
    """
    images = x.shape[0]
    first = pl.program_id(0) * images
    for image in range(images):
        tokens = x[image].astype(jnp.float32)
        normal = (normalize(tokens)[0] * scale[...] + bias[...]).astype(x.dtype)
        before = dot(kernel1_across[...], normal) + bias1[...]
        hidden = gelu_and_slope(before, gelu)[0].astype(x.dtype)
        mixed = dot(kernel2_across[...], hidden) + bias2[...]
        out[image] = (tokens + keep[first + image] * mixed).astype(x.dtype)


def token_backward(
    keep: Any,
    x: Any,
    cotangent: Any,
    scale: Any,
    bias: Any,
    kernel1_across: Any,
    bias1: Any,
    kernel1: Any,
    kernel2: Any,
    to_x: Any,
    to_scale: Any,
    to_bias: Any,
    to_kernel1: Any,
    to_bias1: Any,
    to_kernel2_across: Any,
    to_bias2: Any,
    *,
    gelu: Gelu,
) -> None:
    """Turns the cotangent of each image's result into that of `x`, and adds up the gradients.

    Args:
        keep: as for `token_forward`, as are those not named here.
        x: tokens.
        cotangent: of the result, (images, s, c), and so `to_x`.
        scale: of LayerNorm.
        bias: of LayerNorm.
        kernel1_across: (h, s).
        bias1: (h, 1).
        kernel1: (s, h).
        kernel2: (h, s).
        to_x: cotangent of `x`.
        to_scale: gradient, float32 and of the shape of what it is for, as are the following.
        to_bias: gradient.
        to_kernel1: gradient, (s, h).
        to_bias1: gradient.
        to_kernel2_across: gradient, (s, h).
        to_bias2: gradient, (s, 1).
        gelu: which.
    """
    sums = [to_scale, to_bias, to_kernel1, to_bias1, to_kernel2_across, to_bias2]
    _at_first(lambda: _clear(*sums))
    images = x.shape[0]
    first = _first_image(images)
    for image in range(images):
        normalized, inverse = normalize(x[image].astype(jnp.float32))
        normal = (normalized * scale[...] + bias[...]).astype(x.dtype)
        before = dot(kernel1_across[...], normal) + bias1[...]
        hidden, slope = gelu_and_slope(before, gelu)
        to_result = cotangent[image].astype(jnp.float32)
        to_mixed = keep[first + image] * to_result
        to_bias2[...] += to_mixed.sum(1, keepdims=True)
        to_mixed = to_mixed.astype(x.dtype)
        to_before = dot(kernel2[...], to_mixed) * slope
        to_bias1[...] += to_before.sum(1, keepdims=True)
        to_before = to_before.astype(x.dtype)
        to_kernel2_across[...] += dot_across(to_mixed, hidden.astype(x.dtype))
        to_kernel1[...] += dot_across(normal, to_before)
        to_normal = dot(kernel1[...], to_before)
        to_scale[...] += (to_normal * normalized).sum(0, keepdims=True)
        to_bias[...] += to_normal.sum(0, keepdims=True)
        to_tokens = to_result + through_layer_norm(to_normal, normalized, inverse, scale[...])
        to_x[image] = to_tokens.astype(x.dtype)


def channel_forward(
    keep: Any,
    x: Any,
    scale: Any,
    bias: Any,
    kernel1: Any,
    bias1: Any,
    kernel2: Any,
    bias2: Any,
    out: Any,
    normal: Any,
    mixed: Any,
    *,
    gelu: Gelu,
    units: int,
) -> None:
    """Mixes the channels of each token; hidden units lie (rows, units), some after others.

    Rows are the tokens of all images of the program, each image's beginning at a whole tile, so
    that products are large. What lies in the rows between them is of no consequence.

    Args:
        keep: of all images, (n,).
        x: tokens, (images, s, c), and so `out`.
        scale: of LayerNorm, (1, c), and so `bias`.
        bias: of LayerNorm.
        kernel1: (c, h).
        bias1: (1, h).
        kernel2: (h, c).
        bias2: (1, c).
        out: the result.
        normal: scratch for normalized rows, (rows, c).
        mixed: scratch for sums, (rows, c), float32.
        gelu: which.
        units: hidden units at a time.
    """
    images = x.shape[0]
    first = pl.program_id(0) * images
    for image, rows in enumerate(_rows(x, normal)):
        tokens = normalize(x[image].astype(jnp.float32))[0]
        normal[rows, :] = (tokens * scale[...] + bias[...]).astype(x.dtype)
    mixed[...] = jnp.broadcast_to(bias2[...], mixed.shape)

    def add(some: Any) -> None:
        before = dot(normal[...], kernel1[:, some]) + bias1[:, some]
        hidden = gelu_and_slope(before, gelu)[0].astype(x.dtype)
        mixed[...] += dot(hidden, kernel2[some, :])

    _by_turns(kernel1.shape[1], units, add)
    for image, rows in enumerate(_rows(x, normal)):
        skipped = x[image].astype(jnp.float32)
        out[image] = (skipped + keep[first + image] * mixed[rows, :]).astype(x.dtype)


def channel_backward(
    keep: Any,
    x: Any,
    cotangent: Any,
    scale: Any,
    bias: Any,
    kernel1: Any,
    bias1: Any,
    kernel2: Any,
    to_x: Any,
    to_scale: Any,
    to_bias: Any,
    to_kernel1: Any,
    to_bias1: Any,
    to_kernel2_across: Any,
    to_bias2: Any,
    normal: Any,
    normal_across: Any,
    to_mixed: Any,
    to_mixed_across: Any,
    to_normal: Any,
    *,
    gelu: Gelu,
    units: int,
) -> None:
    """Turns the cotangent of each image's result into that of `x`, and adds up the gradients.

    Args:
        keep: as for `channel_forward`, as are those not named here.
        x: tokens.
        cotangent: of the result, (images, s, c), and so `to_x`.
        scale: of LayerNorm.
        bias: of LayerNorm.
        kernel1: (c, h).
        bias1: (1, h).
        kernel2: (h, c).
        to_x: cotangent of `x`.
        to_scale: gradient, float32 and of the shape of what it is for, as are the following.
        to_bias: gradient.
        to_kernel1: gradient, (c, h).
        to_bias1: gradient.
        to_kernel2_across: gradient, (c, h).
        to_bias2: gradient, (1, c).
        normal: scratch for normalized rows, (rows, c).
        normal_across: scratch for the same, (c, rows).
        to_mixed: scratch for the cotangent of the MLP's output, (rows, c).
        to_mixed_across: scratch for the same, (c, rows).
        to_normal: scratch for sums, (rows, c), float32.
        gelu: which.
        units: hidden units at a time.
    """
    sums = [to_scale, to_bias, to_kernel1, to_bias1, to_kernel2_across, to_bias2]
    # Rows between images stay zero, so that they add nothing to the gradients.
    _at_first(lambda: _clear(*sums, normal, to_mixed))
    first = _first_image(x.shape[0])
    for image, rows in enumerate(_rows(x, normal)):
        tokens = normalize(x[image].astype(jnp.float32))[0]
        normal[rows, :] = (tokens * scale[...] + bias[...]).astype(x.dtype)
        kept = keep[first + image] * cotangent[image].astype(jnp.float32)
        to_bias2[...] += kept.sum(0, keepdims=True)
        to_mixed[rows, :] = kept.astype(x.dtype)
    normal_across[...] = normal[...].T
    to_mixed_across[...] = to_mixed[...].T
    _clear(to_normal)

    def add(some: Any) -> None:
        before = dot(normal[...], kernel1[:, some]) + bias1[:, some]
        hidden, slope = gelu_and_slope(before, gelu)
        to_before = dot_across(to_mixed[...], kernel2[some, :]) * slope
        to_bias1[:, some] += to_before.sum(0, keepdims=True)
        to_before = to_before.astype(x.dtype)
        to_kernel2_across[:, some] += dot(to_mixed_across[...], hidden.astype(x.dtype))
        to_kernel1[:, some] += dot(normal_across[...], to_before)
        to_normal[...] += dot_across(to_before, kernel1[:, some])

    _by_turns(kernel1.shape[1], units, add)
    for image, rows in enumerate(_rows(x, normal)):
        normalized, inverse = normalize(x[image].astype(jnp.float32))
        to_tokens = to_normal[rows, :]
        to_scale[...] += (to_tokens * normalized).sum(0, keepdims=True)
        to_bias[...] += to_tokens.sum(0, keepdims=True)
        to_tokens = through_layer_norm(to_tokens, normalized, inverse, scale[...])
        to_x[image] = (cotangent[image].astype(jnp.float32) + to_tokens).astype(x.dtype)


def _rows(x: Any, rows: Any) -> list[Any]:
    """Returns where in `rows` the tokens of each image of `x` lie."""
    images, tokens, _ = x.shape
    return [pl.ds(image * (rows.shape[0] // images), tokens) for image in range(images)]


def _by_turns(width: int, some: int, body: Callable[[Any], None]) -> None:
    """Calls `body` with a slice of `some` hidden units after the other."""
    if some == width:
        body(pl.ds(0, width))
        return

    def turn(number: Array, _: None) -> None:
        body(pl.ds(pl.multiple_of(number * some, some), some))

    lax.fori_loop(0, width // some, turn, None)


def _first_image(images: int) -> Array:
    """Returns the place of a backward program's first image in the batch."""
    return (pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)) * images


def _at_first(body: Callable[[], None]) -> None:
    pl.when(pl.program_id(1) == 0)(body)


def _clear(*references: Any) -> None:
    for reference in references:
        reference[...] = jnp.zeros(reference.shape, reference.dtype)
