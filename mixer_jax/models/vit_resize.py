"""Position embedding of Vision Transformers for another image size."""

from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from mixer_jax.errors import UserError

Grid = tuple[int, int]  # Rows and columns of patches.
Method = Literal["linear", "bicubic"]


def resize_pos_embedding(
    pos_embedding: Float[np.ndarray, "1 t c"], old: Grid, new: Grid, method: Method = "linear"
) -> Float[np.ndarray, "1 new_t c"]:
    """Resamples a position embedding for another grid of patches, channel by channel.

    - "linear", the method of ViT's authors: linear interpolation of the grid whose corners are the
      old corners, so that entry i of n is entry i·(m−1)/(n−1) of m. From 14×14 to 27×27, all old
      entries remain, each second one of the new, and back to 14×14 gives the original.
    - "bicubic", the method of timm for its own weights: cubic convolution (a = −1/2) at half-pixel
      centers, and smoothing if the grid becomes smaller.

    Both accept grids that are not square.

    Args:
        pos_embedding: An entry per patch in raster order; the class token's, if there is one, is
            the first, and does not change.
        old: Rows and columns of patches of the embedding.
        new: Requested rows and columns.
        method: "linear" or "bicubic".

    Raises:
        UserError: The embedding is not for the old grid.
    """
    _, num_entries, width = pos_embedding.shape
    num_patches = old[0] * old[1]
    if num_entries - num_patches not in (0, 1):
        raise UserError(
            f"grid must have as many patches as the position embedding ({num_entries} entries with "
            f"that of the class token), got {old}, which has {num_patches}. Pass the grid that the "
            "parameters are for."
        )
    if old == new:
        return pos_embedding
    class_entry, patches = np.split(pos_embedding, [num_entries - num_patches], axis=1)
    matrix = {"linear": _linear_matrix, "bicubic": _bicubic_matrix}[method]
    rows, columns = (matrix(m, n) for m, n in zip(old, new, strict=True))
    grid = patches.reshape(*old, width)
    resized = np.einsum("im,jn,mnc->ijc", rows, columns, grid, optimize=True)
    resized = resized.reshape(1, -1, width).astype(np.float32)
    return np.concatenate([class_entry, resized], axis=1)


def resize_params(params: dict[str, Any], old: Grid, new: Grid) -> dict[str, Any]:
    """Adapts parameters to another grid of patches; see `resize_pos_embedding`.

    Args:
        params: Parameters of a `VisionTransformer`, as numpy arrays. Not changed; the result shares
            all arrays but the position embedding, if that is learned.
        old: Rows and columns of patches that `params` are for.
        new: Requested rows and columns of patches.
    """
    if "pos_embedding" not in params:
        return params
    return {**params, "pos_embedding": resize_pos_embedding(params["pos_embedding"], old, new)}


def _linear_matrix(old: int, new: int) -> Float[np.ndarray, "{new} {old}"]:
    """Returns the weights of old entries in new ones, with aligned corners, in float64."""
    # Multiplied before it is divided, so that positions of old entries are exact.
    positions = np.arange(new) * (old - 1) / max(new - 1, 1)
    return np.maximum(1.0 - np.abs(positions[:, None] - np.arange(old)), 0.0)


def _bicubic_matrix(old: int, new: int) -> Float[np.ndarray, "{new} {old}"]:
    """Returns the weights of old entries in new ones, at half-pixel centers, in float64."""
    scale = max(old / new, 1.0)  # Of the kernel, which covers more entries of a larger grid.
    centers = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    distances = np.abs(centers - np.arange(old)) / scale
    near = (1.5 * distances - 2.5) * distances**2 + 1
    far = ((-0.5 * distances + 2.5) * distances - 4) * distances + 2
    weights = np.where(distances < 1, near, np.where(distances < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)
