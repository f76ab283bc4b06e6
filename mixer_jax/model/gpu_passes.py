"""GPU kernels that read and write every activation once: LayerNorm with what precedes it, GELU.

Activations are matrices (rows, columns). Arithmetic is float32; they are stored in their own type.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mixer_jax.model.gpu_tiles import Tiles, Tiling
from mixer_jax.model.layers import EPSILON, Gelu


class Added(NamedTuple):
    """What is added to the tokens before LayerNorm: `bias`, or `keep * (branch + bias)`.

    Attributes:
        branch: (rows, columns), or None.
        bias: a number for each column, or None for zeros.
        keep: a number for each image, or None for ones; needs a branch.
    """

    branch: Any
    bias: Any
    keep: Any


def norm(
    x: Any, added: Added, scale: Any, bias: Any, images: int, tiling: Tiling,
    unread: Any = None, **how: Any,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """Returns x with the branch added, its LayerNorm, and the rows' means and 1 / deviations.

    Args:
        x: (rows, columns).
        added: to x; without a branch, the first result is None.
        scale: of LayerNorm.
        bias: of LayerNorm.
        images: row r is of image r % images.
        tiling: of the kernel.
        unread: argument of the kernel that it leaves alone.
        **how: further arguments of `pallas_call`.
    """
    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    numbers = jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)
    out_shape = (None if added.branch is None else like_x, like_x, numbers, numbers)
    kernel = functools.partial(_norm, images=images, tiling=tiling)
    grid = (tiling.num_programs(x.shape[0]),)
    return _call(kernel, out_shape, grid, tiling, how)(x, added, scale, bias, unread)


def _norm(
    x: Any, added: Added, scale: Any, bias: Any, unread: Any,
    x_new: Any, y: Any, mean: Any, rstd: Any, *, images: int, tiling: Tiling,
) -> None:  # fmt: skip
    tiles = _whole_rows(x.shape, tiling)
    scales, biases = tiles.load_across(scale), tiles.load_across(bias)
    shifts = None if added.bias is None else tiles.load_across(added.bias)

    def fetch(row: Any) -> Any:
        refs = (x,) if added.branch is None else (x, added.branch)
        return [tiles.load(ref, row) for ref in refs]

    def body(row: Any, fetched: Any, carry: Any) -> Any:
        tile, *branches = map(tiles.widen, fetched)
        if added.branch is None:
            tile = _sum(tile, shifts)
        else:
            branch = _sum(branches[0], shifts)
            if added.keep is not None:
                kept = tiles.load_down(added.keep, row, images)
                branch = [b * kept for b in branch]
            # Normalized is what the backward pass will read, rounded.
            stored = [t.astype(x_new.dtype) for t in _sum(tile, branch)]
            tiles.store(x_new, row, stored)
            tile = tiles.widen(stored)
        center = tiles.sum_across(tile) / tiles.num_columns
        tile = tiles.clear([t - center for t in tile])
        variance = tiles.sum_across([t * t for t in tile]) / tiles.num_columns
        factor = lax.rsqrt(variance + EPSILON)
        y_tile = [t * factor * s + b for t, s, b in zip(tile, scales, biases, strict=True)]
        tiles.store(y, row, y_tile)
        tiles.store_down(mean, row, center)
        tiles.store_down(rstd, row, factor)
        return carry

    # Any carry will do.
    tiles.loop(fetch, body, jnp.int32(0))


class NormGrads(NamedTuple):
    """Gradients of `norm`.

    Attributes:
        x: (rows, columns).
        branch: of the branch; None if there is none, or if it is the same as x's.
        sums: (2 or 3, columns), of scale, bias and, if there is one, the bias that is added.
    """

    x: Any
    branch: Any
    sums: Any


def norm_grad(
    dx: Any, dy: Any, x: Any, mean: Any, rstd: Any, scale: Any, shift: Any, keep: Any,
    images: int, with_bias: bool, tiling: Tiling, **how: Any,
) -> NormGrads:  # fmt: skip
    """Returns the gradients of `norm`.

    Args:
        dx: gradient by the sum of x and the branch, from elsewhere; None if there is none.
        dy: gradient by its second result.
        x: its first result, or its argument if there was no branch.
        mean: its third result.
        rstd: its fourth result.
        scale: its argument.
        shift: the bias that was added, if there was no branch; else None.
        keep: what was added had.
        images: its argument.
        with_bias: whether what was added has a bias.
        tiling: of the kernel.
        **how: further arguments of `pallas_call`.
    """
    programs = tiling.num_programs(x.shape[0])
    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    num_sums = 3 if with_bias else 2
    out_shape = NormGrads(
        like_x,
        None if keep is None else like_x,
        jax.ShapeDtypeStruct((programs, num_sums * x.shape[1]), jnp.float32),
    )
    kernel = functools.partial(_norm_grad, images=images, tiling=tiling)
    args = (dx, dy, x, mean, rstd, scale, shift, keep)
    grads = _call(kernel, out_shape, (programs,), tiling, how)(*args)
    return grads._replace(sums=jnp.sum(grads.sums, axis=0).reshape(num_sums, -1))


def _norm_grad(
    dx: Any, dy: Any, x: Any, mean: Any, rstd: Any, scale: Any, shift: Any, keep: Any,
    dx_out: Any, dbranch: Any, sums: Any, *, images: int, tiling: Tiling,
) -> None:  # fmt: skip
    tiles = _whole_rows(x.shape, tiling)
    scales = tiles.load_across(scale)
    num_sums = sums.shape[1] // tiles.num_columns
    shifts = None if shift is None else tiles.load_across(shift)

    def fetch(row: Any) -> Any:
        refs = [ref for ref in (x, dy, dx) if ref is not None]
        return [tiles.load(ref, row) for ref in refs], [
            tiles.load_down(ref, row) for ref in (mean, rstd)
        ]

    def body(row: Any, fetched: Any, sums: list[Any]) -> list[Any]:
        x_tile, dy_tile, *dx_tile = map(tiles.widen, fetched[0])
        x_tile = _sum(x_tile, shifts)
        center, factor = fetched[1]
        normalized = [(t - center) * factor for t in x_tile]
        products = [d * n for d, n in zip(dy_tile, normalized, strict=True)]
        scaled = [d * s for d, s in zip(dy_tile, scales, strict=True)]
        by_norm = [p * s for p, s in zip(products, scales, strict=True)]
        mean_scaled = tiles.sum_across(scaled) / tiles.num_columns
        mean_by_norm = tiles.sum_across(by_norm) / tiles.num_columns
        alone = [
            factor * (g - mean_scaled - n * mean_by_norm)
            for g, n in zip(scaled, normalized, strict=True)
        ]
        total = _sum(alone, *dx_tile)
        tiles.store(dx_out, row, total)
        if keep is not None:
            kept = tiles.load_down(keep, row, images)
            total = [t * kept for t in total]
            tiles.store(dbranch, row, total)
        # A shift is no part of what goes on, so that its gradient is LayerNorm's alone.
        new = [products, dy_tile, total if shifts is None else alone][: len(sums)]
        return [_sum(old, tile) for old, tile in zip(sums, new, strict=True)]

    totals = tiles.loop(fetch, body, [tiles.zeros() for _ in range(num_sums)])
    for i, tile in enumerate(totals):
        tiles.store_sums(sums, i * tiles.num_columns, tile)


def _sum(tile: list[Any], other: list[Any] | None = None) -> list[Any]:
    return tile if other is None else [a + b for a, b in zip(tile, other, strict=True)]


def gelu_grad(da: Any, hidden: Any, gelu: Gelu, tiling: Tiling, **how: Any) -> tuple[Any, Any]:
    """Returns the gradient by the argument of GELU, and its float32 sums over rows.

    Args:
        da: (rows, columns), gradient by its result.
        hidden: its argument.
        gelu: which GELU.
        tiling: of the kernel.
        **how: further arguments of `pallas_call`.
    """
    num_rows, num_columns = hidden.shape
    across = pl.cdiv(num_columns, tiling.width(num_columns))
    programs = tiling.num_programs(num_rows, across)
    out_shape = (
        jax.ShapeDtypeStruct(hidden.shape, hidden.dtype),
        jax.ShapeDtypeStruct((programs, num_columns), jnp.float32),
    )
    kernel = functools.partial(_gelu_grad, gelu=gelu, tiling=tiling)
    # Neighbours on the device work on neighbouring columns, which lie together in memory.
    grid = (across, programs)
    dhidden, sums = _call(kernel, out_shape, grid, tiling, how)(da, hidden)
    return dhidden, jnp.sum(sums, axis=0)


def _gelu_grad(
    da: Any, hidden: Any, dhidden: Any, sums: Any, *, gelu: Gelu, tiling: Tiling
) -> None:
    column = pl.program_id(0) * tiling.width(hidden.shape[1])
    tiles = Tiles(hidden.shape, tiling, [column], pl.program_id(1), sums.shape[0])
    slope = tanh_gelu_slope if gelu == "tanh" else exact_gelu_slope

    def fetch(row: Any) -> Any:
        return tiles.load(da, row), tiles.load(hidden, row)

    def body(row: Any, fetched: Any, total: list[Any]) -> list[Any]:
        [da_tile], [hidden_tile] = map(tiles.widen, fetched)
        dhidden_tile = da_tile * slope(hidden_tile)
        tiles.store(dhidden, row, [dhidden_tile])
        return [total[0] + dhidden_tile]

    tiles.store_sums(sums, 0, tiles.loop(fetch, body, tiles.zeros()))


def tanh_gelu_slope(x: Any) -> Any:
    """Returns the derivative of x σ(2u), u = √(2/π) (x + 0.044715 x³): GELU by tanh."""
    a, b = 2 * math.sqrt(2 / math.pi), 0.044715
    square = x * x
    sigmoid = 1 / (1 + jnp.exp2(x * (-a / math.log(2) - a * b / math.log(2) * square)))
    return sigmoid + sigmoid * (1 - sigmoid) * x * (a + 3 * a * b * square)


def exact_gelu_slope(x: Any) -> Any:
    """Returns the derivative of x Φ(x): Φ(x) + x φ(x).

    References:
        Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26; off by 1e-7 at most.
    """
    density = jnp.exp2(x * x * (-0.5 / math.log(2)))
    t = 1 / (1 + 0.3275911 / math.sqrt(2) * jnp.abs(x))
    series = t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))
    tail = 0.5 * density * t * (0.254829592 + t * (-0.284496736 + series))
    return jnp.where(x < 0, tail, 1 - tail) + x * density / math.sqrt(2 * math.pi)


def _whole_rows(shape: tuple[int, int], tiling: Tiling) -> Tiles:
    columns = list(range(0, shape[1], tiling.width(shape[1])))
    return Tiles(shape, tiling, columns, pl.program_id(0), tiling.num_programs(shape[0]))


def _call(
    kernel: Callable[..., None], out_shape: Any, grid: tuple[int, ...], tiling: Tiling, how: Any
) -> Any:
    params = plgpu.CompilerParams(num_warps=tiling.warps, num_stages=1)
    return pl.pallas_call(kernel, out_shape, grid=grid, compiler_params=params, **how)
