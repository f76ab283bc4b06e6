"""From weights on the host to a model and its parameters on devices."""

import dataclasses
from typing import Any, cast

import jax
from jax.sharding import Mesh

from mixer_jax.model.defaults import default_unroll
from mixer_jax.model.making import resolve_dtype, resolve_kernels
from mixer_jax.model.mixer import Gelu, MlpMixer
from mixer_jax.parallel.sharding import state_sharding
from mixer_jax.weights.about import About


def make_model(about: About, dtype: str = "") -> MlpMixer:
    """Returns the model of weights, from images in [-1, 1] to logits.

    Args:
        about: what the weights say of themselves.
        dtype: of the computation; empty: as they say.
    """
    kernels = resolve_kernels("auto")
    return MlpMixer(
        num_classes=about.num_classes,
        **dataclasses.asdict(about.widths),
        gelu=cast(Gelu, about.gelu),
        dtype=resolve_dtype(dtype or about.dtype),
        kernels=kernels,
        unroll=default_unroll(jax.default_backend(), by_xla=kernels == "xla"),
    )


def place(params: Any, mesh: Mesh) -> Any:
    """Returns parameters laid out over a mesh, as in training.

    Args:
        params: the whole of them, the same on every host.
        mesh: of devices of all hosts.
    """

    def put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, params, state_sharding(params, mesh))
