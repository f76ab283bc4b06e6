"""Model and device-resident parameters of weights on the host."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.distributed.sharding import state_sharding
from mixer_jax.models.execution import AUTO, AUTO_UNROLL
from mixer_jax.models.params import prepare_inference_params
from mixer_jax.models.registry import DEFAULT_FAMILY, from_config


def model_from_info(model_info: ModelInfo, dtype: str = "") -> Any:
    """Builds the Flax module of weights, from images in [-1, 1] to logits.

    Args:
        model_info: Description of the model.
        dtype: Dtype of the computation; empty: that of `model_info`.
    """
    section = {
        "family": model_info.family,
        "variant": model_info.variant,
        **dataclasses.asdict(model_info.config),
        "gelu": model_info.gelu,
        "dropout": 0.0,
        "dtype": dtype or model_info.dtype,
        "backend": AUTO,
        "scan_unroll": AUTO_UNROLL,
        "remat": "none",
    }
    return from_config(section, model_info.num_classes)


def shard_inference_params(params: Any, model: Any, mesh: Mesh) -> Any:
    """Shards parameters over a mesh, in the form that predicts fastest.

    Args:
        params: Unsharded float32 parameters, the same on every host.
        model: Model to predict with.
        mesh: Devices of all hosts.
    """
    platform = mesh.devices.flat[0].platform
    prepared = prepare_inference_params(params, model.execution.dtype, platform, model.family)
    return shard_params(prepared, mesh, model.family)


def shard_params(params: Any, mesh: Mesh, family: str = DEFAULT_FAMILY) -> Any:
    """Shards parameters over a mesh, as in training.

    Args:
        params: Unsharded parameters, the same on every host.
        mesh: Devices of all hosts.
        family: Family of the model.
    """

    def put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, params, state_sharding(params, mesh, family))
