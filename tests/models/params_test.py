"""Tests of the conversion of parameters for inference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixer_jax.models.mixer import MlpMixer
from mixer_jax.models.params import prepare_inference_params
from mixer_jax.models.registry import get_family
from tests.helpers.models import random_images, random_params, tiny_mixer


def apply(model: MlpMixer, params: Any) -> jax.Array:
    return jax.jit(model.apply)({"params": params}, random_images())


def test_prepare_inference_params_unstacks_on_cpus_with_the_same_outputs() -> None:
    params = random_params(tiny_mixer())
    assert not isinstance(
        prepare_inference_params(params, "float32", "tpu", get_family("mixer"))["blocks"], list
    )
    unstacked = prepare_inference_params(params, "float32", "cpu", get_family("mixer"))
    assert isinstance(unstacked["blocks"], list)
    expected = apply(tiny_mixer(), params)
    for scan_unroll in (0, 1):
        actual = apply(tiny_mixer(scan_unroll=scan_unroll), unstacked)
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_prepare_inference_params_casts_weights_once() -> None:
    model = tiny_mixer(dtype=jnp.bfloat16)
    params = random_params(tiny_mixer())
    prepared = prepare_inference_params(params, model.execution.dtype, "cpu", get_family("mixer"))
    kernels = [leaf for leaf in jax.tree.leaves(prepared["blocks"]) if leaf.ndim == 2]
    assert len(kernels) == 4 * len(prepared["blocks"])
    assert {leaf.dtype for leaf in kernels} == {jnp.dtype("bfloat16")}
    assert prepared["head"]["kernel"].dtype == jnp.float32
    # Bit-identical: the model rounds them in the same way.
    np.testing.assert_array_equal(apply(model, prepared), apply(model, params))
