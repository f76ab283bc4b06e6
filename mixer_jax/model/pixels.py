"""From pixels to what the model sees."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def to_model_range(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Maps pixels 0…255 to [-1, 1], on the device."""
    return images.astype(jnp.float32) / 127.5 - 1.0
