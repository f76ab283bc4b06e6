"""From weights on the host to a model and its parameters on devices."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.distributed.sharding import state_sharding
from mixer_jax.models.execution import AUTO, AUTO_UNROLL
from mixer_jax.models.mixer import MlpMixer
from mixer_jax.models.params import prepare_inference_params
from mixer_jax.models.registry import from_config


def model_from_info(about: ModelInfo, dtype: str = "") -> MlpMixer:
    """Returns the model of weights, from images in [-1, 1] to logits.

    Args:
        about: what the weights say of themselves.
        dtype: of the computation; empty: as they say.
    """
    section = {
        "variant": about.variant,
        **dataclasses.asdict(about.config),
        "gelu": about.gelu,
        "dropout": 0.0,
        "dtype": dtype or about.dtype,
        "backend": AUTO,
        "scan_unroll": AUTO_UNROLL,
        "remat": "none",
    }
    return from_config(section, about.num_classes)


def shard_inference_params(params: Any, model: MlpMixer, mesh: Mesh) -> Any:
    """Returns parameters laid out over a mesh, as they predict fastest there.

    Args:
        params: of the model, float32, the whole of them, the same on every host.
        model: to predict with.
        mesh: of devices of all hosts.
    """
    platform = mesh.devices.flat[0].platform
    return shard_params(prepare_inference_params(params, model.execution.dtype, platform), mesh)


def shard_params(params: Any, mesh: Mesh) -> Any:
    """Returns parameters laid out over a mesh, as in training.

    Args:
        params: the whole of them, the same on every host.
        mesh: of devices of all hosts.
    """

    def put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, params, state_sharding(params, mesh))
