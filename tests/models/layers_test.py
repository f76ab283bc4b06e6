"""Tests of layers shared by model families."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.models.layers import Context, dot_product_attention, normalize_images


def test_normalize_images_is_symmetric_and_exact_at_its_ends() -> None:
    values = np.asarray(normalize_images(jnp.arange(256, dtype=jnp.uint8)))
    assert values.dtype == np.float32
    assert values[0] == -1.0
    assert values[255] == 1.0
    np.testing.assert_allclose(values, np.linspace(-1, 1, 256), atol=1e-7)


@pytest.mark.parametrize(("head_width", "expected"), [(128, "cudnn"), (136, "xla")])
def test_heads_wider_than_those_of_cudnn_use_xla(
    head_width: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(query: jax.Array, *_: jax.Array, implementation: str) -> jax.Array:
        assert implementation == expected
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    x = jnp.zeros((1, 2, 1, head_width), jnp.bfloat16)
    dot_product_attention(x, x, x, Context(flash_attention=True))
