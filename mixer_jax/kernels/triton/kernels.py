"""GPU kernels: LayerNorm fused with the residual addition before it, and the gradient of GELU.

Each reads and writes every activation once. Activations are matrices (rows, columns), stored in
their own dtype; arithmetic is float32.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mixer_jax.kernels.triton.tiling import TileConfig, TileIterator
from mixer_jax.models.layers import (
    GELU_TANH_CUBIC,
    GELU_TANH_SCALE,
    LAYER_NORM_EPSILON,
    Gelu,
)


class ResidualInput(NamedTuple):
    """Addend of the residual stream before LayerNorm: `bias`, or `mask * (branch + bias)`.

    Attributes:
        branch: (rows, columns), or None.
        bias: (columns,), or None for zeros.
        mask: Drop-path mask, one number per image, or None for ones; requires a branch.
    """

    branch: Any
    bias: Any
    mask: Any


def layer_norm_fwd(
    x: Any, added: ResidualInput, scale: Any, bias: Any, num_images: int, config: TileConfig,
    aliased_input: Any = None, **kwargs: Any,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """Adds a branch and applies LayerNorm.

    Args:
        x: Residual stream, (rows, columns).
        added: Branch and bias to add to it.
        scale: Scale of LayerNorm.
        bias: Bias of LayerNorm.
        num_images: Row r belongs to image r % num_images.
        config: Tile configuration.
        aliased_input: Another view of `x` that the kernel does not read.
        **kwargs: Further arguments of `pallas_call`.

    Returns:
        The sum, or None without a branch; its LayerNorm; the mean of each row; and the inverse
        standard deviation of each row.
    """
    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    col_vector = jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)
    out_shape = (None if added.branch is None else like_x, like_x, col_vector, col_vector)
    kernel = functools.partial(_layer_norm_fwd_kernel, num_images=num_images, config=config)
    grid = (config.grid_size(x.shape[0]),)
    call = _pallas_call(kernel, out_shape, grid, config, kwargs)
    return call(x, added, scale, bias, aliased_input)


def _layer_norm_fwd_kernel(
    x: Any, added: ResidualInput, scale: Any, bias: Any, aliased_input: Any,
    x_new: Any, y: Any, mean: Any, rstd: Any, *, num_images: int, config: TileConfig,
) -> None:  # fmt: skip
    tiles = _whole_rows(x.shape, config)
    scales, biases = tiles.load_row_vector(scale), tiles.load_row_vector(bias)
    added_bias = None if added.bias is None else tiles.load_row_vector(added.bias)

    def fetch(row: Any) -> Any:
        refs = (x,) if added.branch is None else (x, added.branch)
        return [tiles.load(ref, row) for ref in refs]

    def body(row: Any, fetched: Any, carry: Any) -> Any:
        tile, *branches = map(tiles.to_f32, fetched)
        if added.branch is None:
            tile = _add(tile, added_bias)
        else:
            branch = _add(branches[0], added_bias)
            if added.mask is not None:
                mask = tiles.load_col_vector(added.mask, row, num_images)
                branch = [b * mask for b in branch]
            # LayerNorm sees the rounded sum, as the backward pass will.
            stored = [t.astype(x_new.dtype) for t in _add(tile, branch)]
            tiles.store(x_new, row, stored)
            tile = tiles.to_f32(stored)
        row_mean = tiles.row_sums(tile) / tiles.num_cols
        tile = tiles.zero_padding([t - row_mean for t in tile])
        variance = tiles.row_sums([t * t for t in tile]) / tiles.num_cols
        row_rstd = lax.rsqrt(variance + LAYER_NORM_EPSILON)
        y_tile = [t * row_rstd * s + b for t, s, b in zip(tile, scales, biases, strict=True)]
        tiles.store(y, row, y_tile)
        tiles.store_col_vector(mean, row, row_mean)
        tiles.store_col_vector(rstd, row, row_rstd)
        return carry

    # The loop needs a carry, though it has nothing to sum.
    tiles.pipelined_loop(fetch, body, jnp.int32(0))


class LayerNormGrads(NamedTuple):
    """Gradients of `layer_norm_fwd`.

    Attributes:
        x: Gradient of the residual stream, (rows, columns).
        branch: Gradient of the branch; None without a branch, or if it equals that of x.
        col_sums: Gradients of scale, bias and, if there is one, of the added bias: (2 or 3,
            columns).
    """

    x: Any
    branch: Any
    col_sums: Any


def layer_norm_bwd(
    dx: Any, dy: Any, x: Any, mean: Any, rstd: Any, scale: Any, added_bias: Any, mask: Any,
    num_images: int, has_bias: bool, config: TileConfig, **kwargs: Any,
) -> LayerNormGrads:  # fmt: skip
    """Computes the gradients of `layer_norm_fwd`, from its arguments and results.

    Args:
        dx: Cotangent of the sum; None if there is none.
        dy: Cotangent of its LayerNorm.
        x: Sum, or residual stream without a branch.
        mean: Mean of each row.
        rstd: Inverse standard deviation of each row.
        scale: Scale of LayerNorm.
        added_bias: Bias that was added without a branch; None otherwise.
        mask: Drop-path mask of the branch.
        num_images: Row r belongs to image r % num_images.
        has_bias: Whether a bias was added, to a branch or without one.
        config: Tile configuration.
        **kwargs: Further arguments of `pallas_call`.
    """
    num_programs = config.grid_size(x.shape[0])
    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    num_sums = 3 if has_bias else 2
    out_shape = LayerNormGrads(
        like_x,
        None if mask is None else like_x,
        jax.ShapeDtypeStruct((num_programs, num_sums * x.shape[1]), jnp.float32),
    )
    kernel = functools.partial(_layer_norm_bwd_kernel, num_images=num_images, config=config)
    args = (dx, dy, x, mean, rstd, scale, added_bias, mask)
    grads = _pallas_call(kernel, out_shape, (num_programs,), config, kwargs)(*args)
    return grads._replace(col_sums=jnp.sum(grads.col_sums, axis=0).reshape(num_sums, -1))


def _layer_norm_bwd_kernel(
    dx: Any, dy: Any, x: Any, mean: Any, rstd: Any, scale: Any, added_bias: Any, mask: Any,
    dx_out: Any, dbranch: Any, partial_sums: Any, *, num_images: int, config: TileConfig,
) -> None:  # fmt: skip
    tiles = _whole_rows(x.shape, config)
    scales = tiles.load_row_vector(scale)
    num_sums = partial_sums.shape[1] // tiles.num_cols
    biases = None if added_bias is None else tiles.load_row_vector(added_bias)

    def fetch(row: Any) -> Any:
        refs = [ref for ref in (x, dy, dx) if ref is not None]
        return [tiles.load(ref, row) for ref in refs], [
            tiles.load_col_vector(ref, row) for ref in (mean, rstd)
        ]

    def body(row: Any, fetched: Any, sums: list[Any]) -> list[Any]:
        x_tile, dy_tile, *dx_tile = map(tiles.to_f32, fetched[0])
        x_tile = _add(x_tile, biases)
        row_mean, row_rstd = fetched[1]
        normalized = [(t - row_mean) * row_rstd for t in x_tile]
        dscale = [d * n for d, n in zip(dy_tile, normalized, strict=True)]
        scaled = [d * s for d, s in zip(dy_tile, scales, strict=True)]
        projected = [p * s for p, s in zip(dscale, scales, strict=True)]
        mean_scaled = tiles.row_sums(scaled) / tiles.num_cols
        mean_projected = tiles.row_sums(projected) / tiles.num_cols
        dnorm = [
            row_rstd * (g - mean_scaled - n * mean_projected)
            for g, n in zip(scaled, normalized, strict=True)
        ]
        total = _add(dnorm, *dx_tile)
        tiles.store(dx_out, row, total)
        if mask is not None:
            row_mask = tiles.load_col_vector(mask, row, num_images)
            total = [t * row_mask for t in total]
            tiles.store(dbranch, row, total)
        # A bias without a branch is not part of the sum that is passed on, so that its gradient is
        # that of LayerNorm alone.
        new = [dscale, dy_tile, total if biases is None else dnorm][: len(sums)]
        return [_add(old, tile) for old, tile in zip(sums, new, strict=True)]

    totals = tiles.pipelined_loop(fetch, body, [tiles.zeros() for _ in range(num_sums)])
    for i, tile in enumerate(totals):
        tiles.store_col_sums(partial_sums, i * tiles.num_cols, tile)


def _add(tile: list[Any], other: list[Any] | None = None) -> list[Any]:
    return tile if other is None else [a + b for a, b in zip(tile, other, strict=True)]


def gelu_bwd(
    da: Any, hidden: Any, gelu: Gelu, config: TileConfig, **kwargs: Any
) -> tuple[Any, Any]:
    """Computes the gradient of GELU's argument, and its float32 sums over rows.

    `da` is the cotangent of GELU's result, (rows, columns), and `hidden` its argument.
    """
    num_rows, num_cols = hidden.shape
    num_segments = pl.cdiv(num_cols, config.segment_width(num_cols))
    num_programs = config.grid_size(num_rows, num_segments)
    out_shape = (
        jax.ShapeDtypeStruct(hidden.shape, hidden.dtype),
        jax.ShapeDtypeStruct((num_programs, num_cols), jnp.float32),
    )
    kernel = functools.partial(_gelu_bwd_kernel, gelu=gelu, config=config)
    # Neighboring programs process neighboring columns, which are adjacent in memory.
    grid = (num_segments, num_programs)
    dhidden, partial_sums = _pallas_call(kernel, out_shape, grid, config, kwargs)(da, hidden)
    return dhidden, jnp.sum(partial_sums, axis=0)


def _gelu_bwd_kernel(
    da: Any, hidden: Any, dhidden: Any, partial_sums: Any, *, gelu: Gelu, config: TileConfig
) -> None:
    column = pl.program_id(0) * config.segment_width(hidden.shape[1])
    program, num_programs = pl.program_id(1), partial_sums.shape[0]
    tiles = TileIterator(hidden.shape, config, [column], program, num_programs)
    grad = tanh_gelu_grad if gelu == "tanh" else exact_gelu_grad

    def fetch(row: Any) -> Any:
        return tiles.load(da, row), tiles.load(hidden, row)

    def body(row: Any, fetched: Any, total: list[Any]) -> list[Any]:
        [da_tile], [hidden_tile] = map(tiles.to_f32, fetched)
        dhidden_tile = da_tile * grad(hidden_tile)
        tiles.store(dhidden, row, [dhidden_tile])
        return [total[0] + dhidden_tile]

    tiles.store_col_sums(partial_sums, 0, tiles.pipelined_loop(fetch, body, tiles.zeros()))


def tanh_gelu_grad(x: Any) -> Any:
    """Computes the derivative of x σ(2u), u = √(2/π) (x + 0.044715 x³): GELU by tanh."""
    a, b = 2 * GELU_TANH_SCALE, GELU_TANH_CUBIC
    square = x * x
    sigmoid = 1 / (1 + jnp.exp2(x * (-a / math.log(2) - a * b / math.log(2) * square)))
    return sigmoid + sigmoid * (1 - sigmoid) * x * (a + 3 * a * b * square)


def exact_gelu_grad(x: Any) -> Any:
    """Computes the derivative of x Φ(x): Φ(x) + x φ(x).

    References:
        Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26; error at most 1e-7.
    """
    density = jnp.exp2(x * x * (-0.5 / math.log(2)))
    t = 1 / (1 + 0.3275911 / math.sqrt(2) * jnp.abs(x))
    series = t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))
    tail = 0.5 * density * t * (0.254829592 + t * (-0.284496736 + series))
    return jnp.where(x < 0, tail, 1 - tail) + x * density / math.sqrt(2 * math.pi)


def _whole_rows(shape: tuple[int, int], config: TileConfig) -> TileIterator:
    columns = list(range(0, shape[1], config.segment_width(shape[1])))
    return TileIterator(shape, config, columns, pl.program_id(0), config.grid_size(shape[0]))


def _pallas_call(
    kernel: Any, out_shape: Any, grid: tuple[int, ...], config: TileConfig, kwargs: Any
) -> Any:
    params = plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1)
    return pl.pallas_call(kernel, out_shape, grid=grid, compiler_params=params, **kwargs)
