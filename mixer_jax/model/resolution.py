"""Token mixing for images of another size: grown as in the paper's Appendix C, or interpolated."""

import itertools
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from mixer_jax.errors import UserError

Grid = tuple[int, int]  # Rows and columns of patches.
Method = Literal["same", "grown", "interpolated"]


def growth(old: Grid, new: Grid) -> int:
    """Returns the whole K >= 1 by which both axes of a grid grow; 0 if there is none.

    Raises:
        UserError: a grid has a side under 1.
    """
    for grid in (old, new):
        if min(grid) < 1:
            raise UserError(f"grid {grid} has a side under 1; pass rows and columns of patches")
    factor = new[0] // old[0]
    return factor if new == (factor * old[0], factor * old[1]) else 0


def method(old: Grid, new: Grid) -> Method:
    """Returns how `resize_tokens` gets from one grid to another. Raises as `growth` does."""
    factor = growth(old, new)
    if factor == 1:
        return "same"
    return "grown" if factor else "interpolated"


def resized_tokens_mlp_dim(tokens_mlp_dim: int, old: Grid, new: Grid) -> int:
    """Returns the resized model's D_S: K² times as wide if grown. Raises as `growth` does."""
    return tokens_mlp_dim * max(growth(old, new), 1) ** 2


def resize_tokens(params: dict[str, Any], old: Grid, new: Grid) -> dict[str, Any]:
    """Returns parameters for another grid of patches; only token mixing depends on it.

    A grid that grows by a whole K > 1 gets the paper's weights (Appendix C): K² copies of the MLP,
    one for each of the K×K quadrants of the new image. Features before the head are then the mean
    of the old model's features over those quadrants. Tokens stay in raster order: the weights are
    permuted instead.

    All other grids get interpolated weights, which are not the paper's. On one axis let R(n→m) be
    the m×n matrix of cubic interpolation (Keys', a = −1/2, at half-pixel centres, edges repeated)
    if m >= n, and else the pseudo-inverse of R(m→n); on a grid, the Kronecker product of both axes.
    R(new→old)ᵀ acts on the tokens of kernel 1, R(old→new) on those of kernel 2 and bias 2, and D_S
    stays.

    - Larger: tokens that are an interpolation of old ones give exactly the old hidden units, and
      the output is the interpolation of the old output.
    - Smaller: the hidden units are those of the image's tokens interpolated back.
    - Larger and back gives the original weights, as R(new→old) · R(old→new) = 1. Smaller and back
      keeps only what is an interpolation from fewer tokens.

    R is well conditioned, so little is amplified: its condition number on one axis is at most about
    2 for 13→14, 14→15, 14→16, 14→28 and 28→30.

    Args:
        params: of an MlpMixer, numpy float32. Not changed; the result shares what stays the same.
        old: rows and columns of patches that `params` are for.
        new: rows and columns of patches wanted.

    Returns:
        Parameters of the model whose tokens_mlp_dim is `resized_tokens_mlp_dim`; `params` itself
        if the grid is the same.

    Raises:
        UserError: a grid has a side under 1, or `params` are not of the old grid.
    """
    factor = growth(old, new)
    mixing = params["blocks"]["token_mixing"]
    tokens = mixing["Dense_0"]["kernel"].shape[1]
    if tokens != old[0] * old[1]:
        raise UserError(
            f"token mixing is of {tokens} tokens but grid {old} has {old[0] * old[1]}; "
            "pass the grid that the parameters are for"
        )
    if factor == 1:
        return params
    mixing = _grow(mixing, old, factor) if factor else _interpolate(mixing, old, new)
    return {**params, "blocks": {**params["blocks"], "token_mixing": mixing}}


def _grow(mixing: dict[str, Any], grid: Grid, factor: int) -> dict[str, Any]:
    """Returns block-diagonal copies of a token-mixing MLP, one for each quadrant of the image."""
    first, second = mixing["Dense_0"], mixing["Dense_1"]
    blocks, _, width = first["kernel"].shape
    rows, columns = grid
    copies = (factor, factor)
    # Rows and columns of the larger grid are each split into the quadrant and the place in it, so
    # that the flat view of all four is raster order. Hidden units lie quadrant by quadrant.
    places = (factor, rows, factor, columns)
    kernel_1 = np.zeros((blocks, *places, *copies, width), np.float32)
    kernel_2 = np.zeros((blocks, *copies, width, *places), np.float32)
    for i, j in itertools.product(range(factor), repeat=2):
        kernel_1[:, i, :, j, :, i, j] = first["kernel"].reshape(blocks, rows, columns, width)
        kernel_2[:, i, j, :, i, :, j] = second["kernel"].reshape(blocks, width, rows, columns)
    bias_1 = np.tile(first["bias"], factor**2)
    bias_2 = np.tile(second["bias"].reshape(blocks, *grid), copies).reshape(blocks, -1)
    units, tokens = bias_1.shape[1], bias_2.shape[1]
    return {
        "Dense_0": {"kernel": kernel_1.reshape(blocks, tokens, units), "bias": bias_1},
        "Dense_1": {"kernel": kernel_2.reshape(blocks, units, tokens), "bias": bias_2},
    }


def _interpolate(mixing: dict[str, Any], old: Grid, new: Grid) -> dict[str, Any]:
    """Returns a token-mixing MLP of the same width, interpolated to another grid."""
    first, second = mixing["Dense_0"], mixing["Dense_1"]
    to_new = [_resampling(n, m) for n, m in zip(old, new, strict=True)]
    from_new = [_resampling(m, n).T for n, m in zip(old, new, strict=True)]
    kernel_1 = _over_grid(from_new, first["kernel"].swapaxes(1, 2)).swapaxes(1, 2)
    kernel_2, bias_2 = (_over_grid(to_new, second[name]) for name in ("kernel", "bias"))
    return {
        "Dense_0": {"kernel": np.ascontiguousarray(kernel_1), "bias": first["bias"]},
        "Dense_1": {"kernel": kernel_2, "bias": bias_2},
    }


def _over_grid(
    matrices: list[np.ndarray], x: Float[np.ndarray, "*batch s"]
) -> Float[np.ndarray, "*batch new_s"]:
    """Returns x with one matrix applied to the rows and one to the columns of its tokens."""
    rows, columns = matrices
    grid = x.reshape(*x.shape[:-1], rows.shape[1], columns.shape[1])
    resized = rows @ grid @ columns.T  # In float64, as the matrices are.
    return resized.reshape(*x.shape[:-1], -1).astype(np.float32, order="C")


def _resampling(old: int, new: int) -> Float[np.ndarray, "{new} {old}"]:
    """Returns R(old→new) of one axis in float64, as `resize_tokens` defines it."""
    if new < old:
        return np.linalg.pinv(_resampling(new, old))
    samples = np.arange(-2, old + 2)  # Two more on each side, as far as the kernel reaches.
    distances = np.abs((np.arange(new)[:, None] + 0.5) * old / new - 0.5 - samples[None])
    near = (1.5 * distances - 2.5) * distances**2 + 1
    far = ((-0.5 * distances + 2.5) * distances - 4) * distances + 2
    weights = np.where(distances < 1, near, np.where(distances < 2, far, 0.0))
    return weights @ np.eye(old)[samples.clip(0, old - 1)]
