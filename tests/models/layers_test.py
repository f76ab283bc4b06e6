"""Tests of layers shared by model families."""

import jax.numpy as jnp
import numpy as np

from mixer_jax.models.layers import normalize_images


def test_normalize_images_is_symmetric_and_exact_at_its_ends() -> None:
    values = np.asarray(normalize_images(jnp.arange(256, dtype=jnp.uint8)))
    assert values.dtype == np.float32
    assert values[0] == -1.0
    assert values[255] == 1.0
    np.testing.assert_allclose(values, np.linspace(-1, 1, 256), atol=1e-7)
