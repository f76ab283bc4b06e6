"""Model and device-resident parameters of weights on the host."""

from typing import Any

import jax
from jax.sharding import Mesh

from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.distributed.sharding import state_sharding
from mixer_jax.models.execution import AUTO, AUTO_UNROLL
from mixer_jax.models.registry import build_model, get_family
from mixer_jax.models.stack import prepare_inference_params


def model_from_info(model_info: ModelInfo, dtype: str = "") -> Any:
    """Builds the Flax module of weights, from images in [-1, 1] to logits.

    Args:
        model_info: Description of the model.
        dtype: Dtype of the computation; empty: that of `model_info`.
    """
    settings = {
        "gelu": model_info.gelu,
        "dropout": 0.0,
        "dtype": dtype or model_info.dtype,
        "backend": AUTO,
        "scan_unroll": AUTO_UNROLL,
        "remat": "none",
    }
    model = (get_family(model_info.family), model_info.config, model_info.num_classes)
    return build_model(*model, settings, jax.default_backend())


def shard_inference_params(params: Any, model: Any, mesh: Mesh) -> Any:
    """Shards parameters over a mesh, in the form that predicts fastest.

    Args:
        params: Unsharded float32 parameters, the same on every host.
        model: Model to predict with.
        mesh: Devices of all hosts.
    """
    platform, family = mesh.devices.flat[0].platform, get_family(model.family)
    prepared = prepare_inference_params(params, model.execution.dtype, platform, family)
    return shard_params(prepared, mesh, model.family)


def shard_params(params: Any, mesh: Mesh, family: str) -> Any:
    """Shards parameters over a mesh, as in training.

    Args:
        params: Unsharded parameters, the same on every host.
        mesh: Devices of all hosts.
        family: Family of the model.
    """

    def put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, params, state_sharding(params, mesh, family))
