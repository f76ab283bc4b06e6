"""Tests of how pixels become what the model sees."""

import jax.numpy as jnp
import numpy as np

from mixer_jax.model.pixels import to_model_range


def test_model_range_is_symmetric_and_exact_at_its_ends() -> None:
    levels = jnp.arange(256, dtype=jnp.uint8)
    values = np.asarray(to_model_range(levels))
    assert values.dtype == np.float32
    assert values[0] == -1.0
    assert values[255] == 1.0
    np.testing.assert_allclose(values, np.linspace(-1, 1, 256), atol=1e-7)
