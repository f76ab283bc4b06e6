"""What a Mixer is built of beside dense layers; the backward pass keeps inputs and little else."""

import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Gelu = Literal["tanh", "exact"]

# Flax's; also the authors'.
EPSILON = 1e-6
# Of the tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415).
TANH_SCALE, TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715
# Numbers of a row are a multiple of this where a GPU's fast products, in 16 bits, take it.
_ALIGNED = 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(x: Float[Array, "*shape"], kind: Gelu) -> Float[Array, "*shape"]:
    """Returns GELU; the backward pass keeps `x` alone and computes its derivative in float32.

    Args:
        x: of any shape.
        kind: "tanh", the approximation, or "exact".
    """
    return jax.nn.gelu(x, approximate=kind == "tanh")


def gelu_derivative(x: Float[Array, "*shape"], kind: Gelu) -> Float[Array, "*shape"]:
    """Returns the derivative of GELU.

    Args:
        x: float32.
        kind: as for `gelu`.
    """
    if kind == "tanh":
        squared = x * x
        tanh = jnp.tanh(TANH_SCALE * x * (1 + TANH_CUBIC * squared))
        slope = TANH_SCALE * (1 + 3 * TANH_CUBIC * squared)
        return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * slope
    density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + lax.erf(x / math.sqrt(2))) + x * density


def _gelu_forward(x: Array, kind: Gelu) -> tuple[Array, Array]:
    return gelu(x, kind), x


def _gelu_backward(kind: Gelu, x: Array, cotangent: Array) -> tuple[Array]:
    slope = gelu_derivative(x.astype(jnp.float32), kind)
    return ((cotangent.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def layer_norm(
    x: Float[Array, "*n c"], scale: Float[Array, " c"], bias: Float[Array, " c"]
) -> Float[Array, "*n c"]:
    """Returns LayerNorm over the last axis, with statistics in float32.

    The backward pass keeps `x`, and a mean and a deviation of each vector.

    Args:
        x: vectors.
        scale: float32.
        bias: float32.
    """
    return _layer_norm_forward(x, scale, bias)[0]


def _layer_norm_forward(x: Array, scale: Array, bias: Array) -> tuple[Array, Any]:
    mean, inverse = statistics(x)
    scale, bias = _beside(scale, x), _beside(bias, x)
    y = (x.astype(jnp.float32) - mean) * (inverse * scale) + bias
    return y.astype(x.dtype), (x, mean, inverse, scale)


def _layer_norm_backward(kept: Any, cotangent: Array) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale = kept
    cotangent = cotangent.astype(jnp.float32)
    normalized = (x.astype(jnp.float32) - mean) * inverse
    vectors = tuple(range(x.ndim - 1))
    to_scale, to_bias = (cotangent * normalized).sum(vectors), cotangent.sum(vectors)
    scaled = cotangent * scale
    along = functools.partial(jnp.mean, axis=-1, keepdims=True)
    to_x = inverse * (scaled - along(scaled) - normalized * along(scaled * normalized))
    return to_x.astype(x.dtype), to_scale, to_bias


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def statistics(x: Float[Array, "*n c"]) -> tuple[Float[Array, "*n 1"], Float[Array, "*n 1"]]:
    """Returns the mean of each vector and one over its deviation, float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = (x * x).mean(-1, keepdims=True) - mean * mean
    return mean, lax.rsqrt(jnp.maximum(variance, 0.0) + EPSILON)


def _beside(vector: Any, x: Array) -> Any:
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, as `layer_norm`, in the type of its input."""

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Returns normalized vectors."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, jnp.asarray(scale), jnp.asarray(bias))


def cpu_product(x: Any, y: Any, dimensions: Any, **options: Any) -> Array:
    """Returns the product of arrays, as `lax.dot_general`, in float32, as CPUs compute it fastest.

    Asked for float32, XLA's library of products takes bfloat16 numbers as they are, with the
    instructions that the CPU has for them. Asked for bfloat16, XLA turns both arrays into float32
    and multiplies those: the same sums, several times slower. Gradients are such products in any
    case, so that training takes as long as in float32; it is left as it is.
    """
    return lax.dot_general(x, y, dimensions, **options | {"preferred_element_type": jnp.float32})


def product_for(cpu: bool, train: bool) -> Any:
    """Returns what computes products, as `nn.Dense` takes it; None: as that does it."""
    return cpu_product if cpu and not train else None


class Stem(nn.Module):
    """One dense layer from the pixels of each patch to a token: a matrix product.

    It is the convolution that its kernel's shape says, (P, P, 3, C), with a stride of P.

    Attributes:
        hidden_dim: channels of a token.
        patch_size: side of a patch, pixels.
        dtype: of the computation.
        for_gpu: whether the axis of the tokens comes before that of the images, and rows begin at
            the addresses that a GPU's fast products want.
        dot_general: that computes the product, as `nn.Dense` takes it; None: `lax.dot_general`.
    """

    hidden_dim: int
    patch_size: int
    dtype: Any = jnp.float32
    for_gpu: bool = False
    dot_general: Any = None

    @nn.compact
    def __call__(self, images: Float[Array, "n h w 3"]) -> Float[Array, "a b c"]:
        """Returns the tokens of each image, in raster order: (n, s, c), or (s, n, c)."""
        side = self.patch_size
        number, height, width, colours = images.shape
        shape = (side, side, colours, self.hidden_dim)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.hidden_dim,))
        patches = images.reshape(number, height // side, side, width // side, side, colours)
        order = (1, 3, 0, 2, 4, 5) if self.for_gpu else (0, 1, 3, 2, 4, 5)
        tokens = height // side * (width // side)
        sizes = (tokens, number) if self.for_gpu else (number, tokens)
        patches = patches.transpose(order).reshape(*sizes, -1).astype(self.dtype)
        matrix = kernel.reshape(-1, self.hidden_dim).astype(self.dtype)
        if self.for_gpu and len(matrix) % _ALIGNED:
            added = (0, -len(matrix) % _ALIGNED)
            patches = jnp.pad(patches, ((0, 0), (0, 0), added))
            matrix = jnp.pad(matrix, (added, (0, 0)))
        dot_general = self.dot_general or lax.dot_general
        product = dot_general(patches, matrix, (((2,), (0,)), ((), ())))
        return (product + _beside(bias.astype(self.dtype), product)).astype(self.dtype)
