"""What a branch is made of, in the few operations that the compiler of TPU kernels has."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mixer_jax.model.layers import EPSILON, TANH_CUBIC, TANH_SCALE, Gelu


def normalize(x: Float[Array, "n c"]) -> tuple[Float[Array, "n c"], Float[Array, "n 1"]]:
    """Returns vectors of mean 0 and variance 1, and one over the deviation that they had."""
    mean = x.mean(1, keepdims=True)
    variance = (x * x).mean(1, keepdims=True) - mean * mean
    inverse = lax.rsqrt(jnp.maximum(variance, 0.0) + EPSILON)
    return (x - mean) * inverse, inverse


def through_layer_norm(
    cotangent: Float[Array, "n c"],
    normalized: Float[Array, "n c"],
    inverse: Float[Array, "n 1"],
    scale: Float[Array, "1 c"],
) -> Float[Array, "n c"]:
    """Returns the cotangent of LayerNorm's input.

    Args:
        cotangent: of LayerNorm's output.
        normalized: from `normalize`.
        inverse: from `normalize`.
        scale: of LayerNorm.
    """
    scaled = cotangent * scale
    along = (scaled * normalized).mean(1, keepdims=True)
    return inverse * (scaled - scaled.mean(1, keepdims=True) - normalized * along)


def gelu_and_slope(
    x: Float[Array, "n m"], kind: Gelu
) -> tuple[Float[Array, "n m"], Float[Array, "n m"]]:
    """Returns GELU and its derivative."""
    squared = x * x
    if kind == "tanh":
        tanh = jnp.tanh(x * (TANH_SCALE + TANH_SCALE * TANH_CUBIC * squared))
        share = 0.5 + 0.5 * tanh
        inner = 2 * TANH_SCALE + 6 * TANH_SCALE * TANH_CUBIC * squared
        value = x * share
        return value, share + value * (1 - share) * inner
    share = 0.5 + 0.5 * lax.erf(x * math.sqrt(0.5))
    return x * share, share + x * jnp.exp(-0.5 * squared) * (1 / math.sqrt(2 * math.pi))


def dot(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    """Returns `a @ b`, float32."""
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def dot_across(a: Float[Array, "n k"], b: Float[Array, "m k"]) -> Float[Array, "n m"]:
    """Returns `a @ b.T`, float32."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
