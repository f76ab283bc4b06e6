"""Token mixing for another image size: tiled as in the paper's Appendix C, or interpolated."""

import itertools
from typing import Any

import numpy as np
from jaxtyping import Float

from mixer_jax.errors import UserError

Grid = tuple[int, int]  # Rows and columns of patches.


def integer_scale(old: Grid, new: Grid) -> int:
    """Returns the integer K >= 1 by which both axes of a grid grow; 0 if there is none.

    Raises:
        UserError: A grid has a side under 1.
    """
    for grid in (old, new):
        if min(grid) < 1:
            raise UserError(f"grid must have at least 1 row and 1 column of patches, got {grid}.")
    scale = new[0] // old[0]
    return scale if new == (scale * old[0], scale * old[1]) else 0


def resize_token_mixing(params: dict[str, Any], old: Grid, new: Grid) -> dict[str, Any]:
    """Adapts parameters to another grid of patches; only token mixing depends on it.

    A grid that grows by an integer K > 1 gets the paper's tiled weights (Appendix C): K² copies of
    the MLP, one for each of the K×K quadrants of the new image. Features before the head are then
    the mean of the old model's features over those quadrants. Tokens remain in raster order: the
    weights are permuted instead.

    All other grids get interpolated weights, which are not in the paper. On one axis let R(n→m) be
    the m×n matrix of cubic interpolation (Keys', a = −1/2, at half-pixel centers, edges repeated)
    if m >= n, and else the pseudo-inverse of R(m→n); on a grid, the Kronecker product of both axes.
    R(new→old)ᵀ acts on the tokens of kernel 1, R(old→new) on those of kernel 2 and bias 2, and D_S
    does not change.

    - Larger: tokens that are an interpolation of old ones give exactly the old hidden units, and
      the output is the interpolation of the old output.
    - Smaller: the hidden units are those of the image's tokens interpolated back.
    - Larger and back gives the original weights, as R(new→old) · R(old→new) = 1. Smaller and back
      keeps only what is an interpolation from fewer tokens.

    R is well conditioned, so little is amplified: its condition number on one axis is at most about
    2 for 13→14, 14→15, 14→16, 14→28 and 28→30.

    Args:
        params: Parameters of an `MlpMixer`, numpy float32. Not changed; the result shares the
            arrays that do not depend on the grid.
        old: Rows and columns of patches that `params` are for.
        new: Requested rows and columns of patches.

    Returns:
        Parameters of a model whose D_S is K² times as wide if they are tiled; `params` itself if
        the grid is the same.

    Raises:
        UserError: A grid has a side under 1, or `params` are not for the old grid.
    """
    scale = integer_scale(old, new)
    mixing = params["blocks"]["token_mixing"]
    num_tokens = mixing["Dense_0"]["kernel"].shape[1]
    if num_tokens != old[0] * old[1]:
        raise UserError(
            f"grid must have as many patches as the parameters have tokens ({num_tokens}), got "
            f"{old}, which has {old[0] * old[1]}. Pass the grid that the parameters are for."
        )
    if scale == 1:
        return params
    mixing = _tile(mixing, old, scale) if scale else _interpolate(mixing, old, new)
    return {**params, "blocks": {**params["blocks"], "token_mixing": mixing}}


def _tile(mixing: dict[str, Any], grid: Grid, scale: int) -> dict[str, Any]:
    """Returns block-diagonal copies of a token-mixing MLP, one for each quadrant of the image."""
    first, second = mixing["Dense_0"], mixing["Dense_1"]
    blocks, _, mlp_dim = first["kernel"].shape
    rows, columns = grid
    copies = (scale, scale)
    # Rows and columns of the larger grid are each split into the quadrant and the position in it,
    # so that the flat view of all four is raster order. Hidden units are ordered by quadrant.
    split_grid = (scale, rows, scale, columns)
    kernel_1 = np.zeros((blocks, *split_grid, *copies, mlp_dim), np.float32)
    kernel_2 = np.zeros((blocks, *copies, mlp_dim, *split_grid), np.float32)
    for i, j in itertools.product(range(scale), repeat=2):
        kernel_1[:, i, :, j, :, i, j] = first["kernel"].reshape(blocks, rows, columns, mlp_dim)
        kernel_2[:, i, j, :, i, :, j] = second["kernel"].reshape(blocks, mlp_dim, rows, columns)
    bias_1 = np.tile(first["bias"], scale**2)
    bias_2 = np.tile(second["bias"].reshape(blocks, *grid), copies).reshape(blocks, -1)
    hidden, tokens = bias_1.shape[1], bias_2.shape[1]
    return {
        "Dense_0": {"kernel": kernel_1.reshape(blocks, tokens, hidden), "bias": bias_1},
        "Dense_1": {"kernel": kernel_2.reshape(blocks, hidden, tokens), "bias": bias_2},
    }


def _interpolate(mixing: dict[str, Any], old: Grid, new: Grid) -> dict[str, Any]:
    """Returns a token-mixing MLP of the same width, interpolated to another grid."""
    first, second = mixing["Dense_0"], mixing["Dense_1"]
    to_new = [_resampling_matrix(n, m) for n, m in zip(old, new, strict=True)]
    from_new = [_resampling_matrix(m, n).T for n, m in zip(old, new, strict=True)]
    kernel_1 = _resample_grid(from_new, first["kernel"].swapaxes(1, 2)).swapaxes(1, 2)
    kernel_2, bias_2 = (_resample_grid(to_new, second[name]) for name in ("kernel", "bias"))
    return {
        "Dense_0": {"kernel": np.ascontiguousarray(kernel_1), "bias": first["bias"]},
        "Dense_1": {"kernel": kernel_2, "bias": bias_2},
    }


def _resample_grid(
    matrices: list[np.ndarray], x: Float[np.ndarray, "*batch s"]
) -> Float[np.ndarray, "*batch new_s"]:
    """Applies one matrix to the rows and one to the columns of the tokens of `x`."""
    rows, columns = matrices
    grid = x.reshape(*x.shape[:-1], rows.shape[1], columns.shape[1])
    resized = rows @ grid @ columns.T  # In float64, as the matrices are.
    return resized.reshape(*x.shape[:-1], -1).astype(np.float32, order="C")


def _resampling_matrix(old: int, new: int) -> Float[np.ndarray, "{new} {old}"]:
    """Returns R(old→new) of one axis in float64, as `resize_token_mixing` defines it."""
    if new < old:
        return np.linalg.pinv(_resampling_matrix(new, old))
    samples = np.arange(-2, old + 2)  # Two more on each side, the kernel's support.
    distances = np.abs((np.arange(new)[:, None] + 0.5) * old / new - 0.5 - samples[None])
    near = (1.5 * distances - 2.5) * distances**2 + 1
    far = ((-0.5 * distances + 2.5) * distances - 4) * distances + 2
    weights = np.where(distances < 1, near, np.where(distances < 2, far, 0.0))
    return weights @ np.eye(old)[samples.clip(0, old - 1)]
