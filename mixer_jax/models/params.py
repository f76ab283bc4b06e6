"""Parameter trees prepared for inference, and weights cast to the computation's dtype."""

import operator
from typing import Any

import jax
import jax.numpy as jnp

from mixer_jax.models.registry import get_family


def prepare_inference_params(params: Any, dtype: Any, platform: str, family: str) -> Any:
    """Converts parameters to the form that predicts fastest.

    Weights are cast to the computation's dtype once, instead of in every call. On CPUs, stacked
    blocks become a list, which models accept as well and unroll: out of a stack, a CPU would copy
    every block's parameters in every call.

    Args:
        params: Parameters of a model.
        dtype: Dtype of its computation.
        platform: Platform of the devices, as JAX names it.
        family: Family of the model.
    """
    params = cast_weights(params, dtype, family)
    if platform != "cpu" or "blocks" not in params:
        return params
    num_blocks = len(jax.tree.leaves(params["blocks"])[0])
    blocks = [jax.tree.map(operator.itemgetter(i), params["blocks"]) for i in range(num_blocks)]
    return {**params, "blocks": blocks}


def cast_weights(params: Any, dtype: Any, family: str) -> Any:
    """Casts the parameters that the model itself would cast.

    In bfloat16 this halves the bytes that are sent to other devices.

    Args:
        params: Parameters of a model.
        dtype: Dtype of its computation.
        family: Family of the model.
    """
    is_cast, dtype = get_family(family).is_cast, jnp.dtype(dtype)

    def cast(path: Any, x: Any) -> Any:
        return x.astype(dtype, copy=False) if is_cast(tuple(k.key for k in path)) else x

    return jax.tree_util.tree_map_with_path(cast, params)
