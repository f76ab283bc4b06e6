"""TPU kernel bodies: one program computes a few images, all of it in VMEM.

A body takes references to blocks: `x` and other tokens, (images, s, c); `mask`, the drop-path mask
of all images, (n,); parameters; results; and scratch. Operands of a matmul have the dtype of the
tokens, its sum is float32. Only the matmuls that the matrix unit has natively are used, `a @ b` and
`a @ b.T`. Transposed operands are as wide as the tokens, not as the hidden units, and are
transposed once.

Cotangents and gradients are named after what they belong to: `dx` is the cotangent of `x`.
Gradients are float32 and have the shape of the parameter, that of the second kernel transposed.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from mixer_jax.models.layers import GELU_TANH_CUBIC, GELU_TANH_SCALE, Gelu, layer_norm_stats


class BranchParams(NamedTuple):
    """Parameters of a branch; d is the number of tokens or of channels.

    The vectors are those of LayerNorm, and the biases of the two dense layers.
    """

    scale: Float[Array, " c"]
    bias: Float[Array, " c"]
    kernel1: Float[Array, "d h"]
    bias1: Float[Array, " h"]
    kernel2: Float[Array, "h d"]
    bias2: Float[Array, " d"]


class HiddenParams(NamedTuple):
    """References to the parameters of LayerNorm and the first dense layer.

    Attributes:
        scale: Scale of LayerNorm, (1, c).
        bias: Bias of LayerNorm, (1, c).
        kernel1: First kernel: (c, h), or for token mixing (h, s).
        bias1: First bias: (1, h), or for token mixing (h, 1).
    """

    scale: Any
    bias: Any
    kernel1: Any
    bias1: Any

    def normalize(self, tokens: Any, dtype: Any) -> tuple[Any, Any, Any]:
        """Applies LayerNorm to tokens (s, c), and returns the results of `normalize` as well."""
        normalized, rstd = normalize(tokens.astype(jnp.float32))
        normed = (normalized * self.scale[...] + self.bias[...]).astype(dtype)
        return normed, normalized, rstd


def token_fwd_kernel(
    mask: Any,
    x: Any,
    params: HiddenParams,
    kernel2_t: Any,
    bias2: Any,
    out: Any,
    *,
    gelu: Gelu,
) -> None:
    """Mixes the tokens of each image; hidden units are (h, c).

    The second kernel is (s, h), its bias (s, 1).
    """
    images = x.shape[0]
    first = pl.program_id(0) * images
    for image in range(images):
        tokens = x[image].astype(jnp.float32)
        normed = params.normalize(tokens, x.dtype)[0]
        pre_gelu = dot(params.kernel1[...], normed) + params.bias1[...]
        hidden = gelu_and_grad(pre_gelu, gelu)[0].astype(x.dtype)
        branch = dot(kernel2_t[...], hidden) + bias2[...]
        out[image] = (tokens + mask[first + image] * branch).astype(x.dtype)


def token_bwd_kernel(
    mask: Any,
    x: Any,
    cotangent: Any,
    params: HiddenParams,
    kernel1: Any,
    kernel2: Any,
    dx: Any,
    grads: BranchParams,
    *,
    gelu: Gelu,
) -> None:
    """Computes the cotangent of each image's tokens, and adds up the gradients of parameters.

    The first kernel is passed transposed in `params`, (h, s), and as it is stored, (s, h); the
    second as it is stored, (h, s). Gradients of kernels are (s, h).
    """
    _on_first_step(lambda: _zero(*grads))
    images = x.shape[0]
    first = _first_image(images)
    for image in range(images):
        normed, normalized, rstd = params.normalize(x[image], x.dtype)
        pre_gelu = dot(params.kernel1[...], normed) + params.bias1[...]
        hidden, grad = gelu_and_grad(pre_gelu, gelu)
        dout = cotangent[image].astype(jnp.float32)
        dbranch = mask[first + image] * dout
        grads.bias2[...] += dbranch.sum(1, keepdims=True)
        dbranch = dbranch.astype(x.dtype)
        dpre_gelu = dot(kernel2[...], dbranch) * grad
        grads.bias1[...] += dpre_gelu.sum(1, keepdims=True)
        dpre_gelu = dpre_gelu.astype(x.dtype)
        grads.kernel2[...] += dot_nt(dbranch, hidden.astype(x.dtype))
        grads.kernel1[...] += dot_nt(normed, dpre_gelu)
        dnormed = dot(kernel1[...], dpre_gelu)
        grads.scale[...] += (dnormed * normalized).sum(0, keepdims=True)
        grads.bias[...] += dnormed.sum(0, keepdims=True)
        dtokens = dout + layer_norm_vjp(dnormed, normalized, rstd, params.scale[...])
        dx[image] = dtokens.astype(x.dtype)


def channel_fwd_kernel(
    mask: Any,
    x: Any,
    params: HiddenParams,
    kernel2: Any,
    bias2: Any,
    out: Any,
    normed: Any,
    accum: Any,
    *,
    gelu: Gelu,
    hidden_block: int,
) -> None:
    """Mixes the channels of each token; hidden units are (rows, hidden_block), block by block.

    Rows are the tokens of all images of the program, so that matmuls are large. Each image begins
    at a whole tile; the contents of the rows in between do not matter. The second kernel is (h, c),
    its bias (1, c). Scratch for normalized rows and for sums, `normed` and `accum`, is (rows, c).
    """
    images = x.shape[0]
    first = pl.program_id(0) * images
    for image, rows in enumerate(_image_rows(x, normed)):
        normed[rows, :] = params.normalize(x[image], x.dtype)[0]
    accum[...] = jnp.broadcast_to(bias2[...], accum.shape)

    def add(block: Any) -> None:
        pre_gelu = dot(normed[...], params.kernel1[:, block]) + params.bias1[:, block]
        hidden = gelu_and_grad(pre_gelu, gelu)[0].astype(x.dtype)
        accum[...] += dot(hidden, kernel2[block, :])

    _for_each_hidden_block(params.kernel1.shape[1], hidden_block, add)
    for image, rows in enumerate(_image_rows(x, normed)):
        tokens = x[image].astype(jnp.float32)
        out[image] = (tokens + mask[first + image] * accum[rows, :]).astype(x.dtype)


def channel_bwd_kernel(
    mask: Any,
    x: Any,
    cotangent: Any,
    params: HiddenParams,
    kernel2: Any,
    dx: Any,
    grads: BranchParams,
    normed: Any,
    normed_t: Any,
    dbranch: Any,
    dbranch_t: Any,
    dnormed: Any,
    *,
    gelu: Gelu,
    hidden_block: int,
) -> None:
    """Computes the cotangent of each image's tokens, and adds up the gradients of parameters.

    Rows are those of `channel_fwd_kernel`. The second kernel is (h, c); gradients of kernels are
    (c, h). `dbranch` is the cotangent of the MLP's output. Scratch is (rows, c), or (c, rows) if
    its name ends in "_t".
    """
    # Rows between images remain zero, so that they add nothing to the gradients.
    _on_first_step(lambda: _zero(*grads, normed, dbranch))
    first = _first_image(x.shape[0])
    for image, rows in enumerate(_image_rows(x, normed)):
        normed[rows, :] = params.normalize(x[image], x.dtype)[0]
        masked = mask[first + image] * cotangent[image].astype(jnp.float32)
        grads.bias2[...] += masked.sum(0, keepdims=True)
        dbranch[rows, :] = masked.astype(x.dtype)
    normed_t[...] = normed[...].T
    dbranch_t[...] = dbranch[...].T
    _zero(dnormed)

    def add(block: Any) -> None:
        pre_gelu = dot(normed[...], params.kernel1[:, block]) + params.bias1[:, block]
        hidden, grad = gelu_and_grad(pre_gelu, gelu)
        dpre_gelu = dot_nt(dbranch[...], kernel2[block, :]) * grad
        grads.bias1[:, block] += dpre_gelu.sum(0, keepdims=True)
        dpre_gelu = dpre_gelu.astype(x.dtype)
        grads.kernel2[:, block] += dot(dbranch_t[...], hidden.astype(x.dtype))
        grads.kernel1[:, block] += dot(normed_t[...], dpre_gelu)
        dnormed[...] += dot_nt(dpre_gelu, params.kernel1[:, block])

    _for_each_hidden_block(params.kernel1.shape[1], hidden_block, add)
    for image, rows in enumerate(_image_rows(x, normed)):
        normalized, rstd = normalize(x[image].astype(jnp.float32))
        dtokens = dnormed[rows, :]
        grads.scale[...] += (dtokens * normalized).sum(0, keepdims=True)
        grads.bias[...] += dtokens.sum(0, keepdims=True)
        dtokens = layer_norm_vjp(dtokens, normalized, rstd, params.scale[...])
        dx[image] = (cotangent[image].astype(jnp.float32) + dtokens).astype(x.dtype)


def _image_rows(x: Any, matrix: Any) -> list[Any]:
    """Returns the rows of each image of `x` in a matrix of all their tokens."""
    images, tokens, _ = x.shape
    return [pl.ds(image * (matrix.shape[0] // images), tokens) for image in range(images)]


def _for_each_hidden_block(hidden: int, size: int, body: Callable[[Any], None]) -> None:
    """Calls `body` with one slice of `size` hidden units after another."""
    if size == hidden:
        body(pl.ds(0, hidden))
        return

    def step(index: Array, _: None) -> None:
        body(pl.ds(pl.multiple_of(index * size, size), size))

    lax.fori_loop(0, hidden // size, step, None)


def _first_image(images: int) -> Array:
    """Returns the index in the batch of a backward program's first image."""
    return (pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)) * images


def _on_first_step(body: Callable[[], None]) -> None:
    pl.when(pl.program_id(1) == 0)(body)


def _zero(*refs: Any) -> None:
    for ref in refs:
        ref[...] = jnp.zeros(ref.shape, ref.dtype)


# Math in the few operations that the compiler of TPU kernels has.


def normalize(x: Float[Array, "n c"]) -> tuple[Float[Array, "n c"], Float[Array, "n 1"]]:
    """Normalizes vectors to mean 0 and variance 1; also returns their inverse deviation."""
    mean, rstd = layer_norm_stats(x)
    return (x - mean) * rstd, rstd


def layer_norm_vjp(
    cotangent: Float[Array, "n c"],
    normalized: Float[Array, "n c"],
    rstd: Float[Array, "n 1"],
    scale: Float[Array, "1 c"],
) -> Float[Array, "n c"]:
    """Computes the cotangent of LayerNorm's input; see `normalize` for two of the arguments."""
    scaled = cotangent * scale
    projection = (scaled * normalized).mean(1, keepdims=True)
    return rstd * (scaled - scaled.mean(1, keepdims=True) - normalized * projection)


def gelu_and_grad(
    x: Float[Array, "n m"], approximation: Gelu
) -> tuple[Float[Array, "n m"], Float[Array, "n m"]]:
    """Computes GELU and its derivative."""
    squared = x * x
    if approximation == "tanh":
        tanh = jnp.tanh(x * (GELU_TANH_SCALE + GELU_TANH_SCALE * GELU_TANH_CUBIC * squared))
        cdf = 0.5 + 0.5 * tanh
        inner_grad = 2 * GELU_TANH_SCALE + 6 * GELU_TANH_SCALE * GELU_TANH_CUBIC * squared
        value = x * cdf
        return value, cdf + value * (1 - cdf) * inner_grad
    cdf = 0.5 + 0.5 * lax.erf(x * math.sqrt(0.5))
    return x * cdf, cdf + x * jnp.exp(-0.5 * squared) * (1 / math.sqrt(2 * math.pi))


def dot(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    """Computes `a @ b` in float32."""
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def dot_nt(a: Float[Array, "n k"], b: Float[Array, "m k"]) -> Float[Array, "n m"]:
    """Computes `a @ b.T` in float32."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
