"""The tree of a Mixer's parameters: taken apart by blocks, and in the type of the computation."""

import operator
from typing import Any

import jax


def unstack(blocks: Any) -> list[Any]:
    """Returns the parameters of each block, from those of all of them, stacked or apart already.

    Unlike those of N indices, whose gradients are N arrays of the whole size to be added up, the
    gradient is one array put together.
    """
    if isinstance(blocks, list):
        return blocks
    leaves, tree = jax.tree.flatten(blocks)
    split = [jax.lax.split(leaf, (1,) * len(leaf)) for leaf in leaves]
    apart = ([part[0] for part in parts] for parts in zip(*split, strict=True))
    return [jax.tree.unflatten(tree, block) for block in apart]


def for_prediction(params: Any, dtype: Any, platform: str) -> Any:
    """Returns parameters as they predict fastest, of which nothing is made anew in every call.

    Kernels are in the type of the computation; on CPUs the blocks' lie apart, as a list, which
    `MlpMixer` takes as well and lays the blocks out in a row. Of stacked ones a CPU copies each
    block's out of the stack.

    Args:
        params: of an `MlpMixer`.
        dtype: of its computation.
        platform: of the devices.
    """
    params = cast_kernels(params, dtype)
    if platform != "cpu":
        return params
    number = len(jax.tree.leaves(params["blocks"])[0])
    blocks = [jax.tree.map(operator.itemgetter(i), params["blocks"]) for i in range(number)]
    return {**params, "blocks": blocks}


def cast_kernels(params: Any, dtype: Any) -> Any:
    """Returns parameters with the kernels in the type that `MlpMixer` casts them to itself.

    Before they are sent to other devices, that halves their bytes in bfloat16.

    Args:
        params: of an `MlpMixer`.
        dtype: of its computation.
    """

    def cast(path: Any, x: Any) -> Any:
        names = [key.key for key in path]
        return x.astype(dtype, copy=False) if names[-1] == "kernel" and names[0] != "head" else x

    return jax.tree_util.tree_map_with_path(cast, params)
