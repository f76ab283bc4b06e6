"""The tree of a Mixer's parameters: taken apart by blocks, and in the type of the computation."""

from typing import Any

import jax
from jaxtyping import Array


def unstack(params: Any) -> list[Any]:
    """Returns the parameters of each block, from those of all of them.

    Unlike those of N indices, whose gradients are N arrays of the whole size to be added up, the
    gradient is one array put together.
    """
    leaves, tree = jax.tree.flatten(params)
    split = [jax.lax.split(leaf, (1,) * len(leaf)) for leaf in leaves]
    blocks = ([part[0] for part in parts] for parts in zip(*split, strict=True))
    return [jax.tree.unflatten(tree, block) for block in blocks]


def cast_kernels(params: Any, dtype: Any) -> Any:
    """Returns parameters with the kernels in the type that `MlpMixer` casts them to itself.

    Before they are sent to other devices, that halves their bytes in bfloat16.

    Args:
        params: of an `MlpMixer`.
        dtype: of its computation.
    """

    def cast(path: Any, x: Array) -> Array:
        names = [key.key for key in path]
        return x.astype(dtype) if names[-1] == "kernel" and names[0] != "head" else x

    return jax.tree_util.tree_map_with_path(cast, params)
