"""Layers shared by model families, with memory-saving custom gradients."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

Gelu = Literal["tanh", "exact"]
# Which branches of a residual block each example keeps: 1 or 0. None: all of them.
DropPathMask = Float[Array, " n"] | None
Initializer = Callable[..., Any]

# Tags of activations that rematerialization policies save; see `REMAT_POLICIES`.
MLP_OUTPUT, ATTENTION = "mlp_output", "attention"
# Flax's default, and the authors' value.
LAYER_NORM_EPSILON = 1e-6
# Constants of the tanh approximation of GELU (Hendrycks and Gimpel, arXiv 1606.08415).
GELU_TANH_SCALE, GELU_TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715
# Fast 16-bit GPU matmuls need rows whose length is a multiple of this.
_GPU_ROW_MULTIPLE = 8
# Widest heads of cuDNN's attention kernels before Hopper.
_CUDNN_MAX_HEAD_WIDTH = 128


@dataclasses.dataclass(frozen=True)
class Context:
    """Static settings of one call of a model, read by its layers.

    Attributes:
        dtype: Dtype of activations and matmuls.
        train: Whether dropout and stochastic depth are active.
        flatten_batch: Whether MLPs see the vectors of all images as the rows of one matrix.
        token_major: Whether the token axis precedes the batch axis.
        flash_attention: Whether attention may use cuDNN's kernels.
    """

    dtype: Any = jnp.float32
    train: bool = False
    flatten_batch: bool = False
    token_major: bool = False
    flash_attention: bool = False

    @property
    def dot_general(self) -> Any:
        """Matmul, as `nn.Dense` takes it; None is the default."""
        return select_dot_general(self.flatten_batch, self.train)


def normalize_images(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Maps pixels from 0…255 to [-1, 1], on the device."""
    return images.astype(jnp.float32) / 127.5 - 1.0


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def apply_gelu(x: Float[Array, "*shape"], approximation: Gelu) -> Float[Array, "*shape"]:
    """Applies GELU. The only residual is `x`; its derivative is computed in float32."""
    return jax.nn.gelu(x, approximate=approximation == "tanh")


def gelu_grad(x: Float[Array, "*shape"], approximation: Gelu) -> Float[Array, "*shape"]:
    """Computes the derivative of GELU at `x`, in float32."""
    if approximation == "tanh":
        squared = x * x
        tanh = jnp.tanh(GELU_TANH_SCALE * x * (1 + GELU_TANH_CUBIC * squared))
        inner_grad = GELU_TANH_SCALE * (1 + 3 * GELU_TANH_CUBIC * squared)
        return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * inner_grad
    density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + lax.erf(x / math.sqrt(2))) + x * density


def _gelu_fwd(x: Array, approximation: Gelu) -> tuple[Array, Array]:
    return apply_gelu(x, approximation), x


def _gelu_bwd(approximation: Gelu, x: Array, cotangent: Array) -> tuple[Array]:
    grad = gelu_grad(x.astype(jnp.float32), approximation)
    return ((cotangent.astype(jnp.float32) * grad).astype(x.dtype),)


apply_gelu.defvjp(_gelu_fwd, _gelu_bwd)


@jax.custom_vjp
def layer_norm(
    x: Float[Array, "*n c"], scale: Float[Array, " c"], bias: Float[Array, " c"]
) -> Float[Array, "*n c"]:
    """Applies LayerNorm over the last axis, with statistics in float32.

    Residuals are `x`, and the mean and inverse standard deviation of each vector.
    """
    return _layer_norm_fwd(x, scale, bias)[0]


def _layer_norm_fwd(x: Array, scale: Array, bias: Array) -> tuple[Array, Any]:
    mean, rstd = layer_norm_stats(x)
    scale, bias = _expand_like(scale, x), _expand_like(bias, x)
    y = (x.astype(jnp.float32) - mean) * (rstd * scale) + bias
    return y.astype(x.dtype), (x, mean, rstd, scale)


def _layer_norm_bwd(residuals: Any, cotangent: Array) -> tuple[Array, Array, Array]:
    x, mean, rstd, scale = residuals
    cotangent = cotangent.astype(jnp.float32)
    normalized = (x.astype(jnp.float32) - mean) * rstd
    vectors = tuple(range(x.ndim - 1))
    dscale, dbias = (cotangent * normalized).sum(vectors), cotangent.sum(vectors)
    scaled = cotangent * scale
    mean_over_c = functools.partial(jnp.mean, axis=-1, keepdims=True)
    dx = rstd * (scaled - mean_over_c(scaled) - normalized * mean_over_c(scaled * normalized))
    return dx.astype(x.dtype), dscale, dbias


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


def layer_norm_stats(x: Float[Array, "*n c"]) -> tuple[Float[Array, "*n 1"], Float[Array, "*n 1"]]:
    """Computes each vector's mean and inverse standard deviation, in float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = (x * x).mean(-1, keepdims=True) - mean * mean
    return mean, lax.rsqrt(jnp.maximum(variance, 0.0) + LAYER_NORM_EPSILON)


def _expand_like(vector: Any, x: Array) -> Any:
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


class LayerNorm(nn.Module):
    """LayerNorm over the last axis; see `layer_norm`. The output has its input's dtype."""

    @nn.compact
    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Normalizes each vector."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, jnp.asarray(scale), jnp.asarray(bias))


def dot_general_f32_accum(x: Any, y: Any, dimensions: Any, **options: Any) -> Array:
    """Computes `lax.dot_general` with a float32 result, which is fastest on CPUs.

    Asked for a float32 result, XLA's matmul library takes bfloat16 operands as they are and uses
    the CPU's instructions for them. Asked for a bfloat16 result, XLA converts both operands to
    float32 first: the same sums, several times slower. Gradients are computed that way in any
    case, so that training in bfloat16 is as slow as in float32, and does not use this function.
    """
    return lax.dot_general(x, y, dimensions, **options | {"preferred_element_type": jnp.float32})


def select_dot_general(flatten_batch: bool, train: bool) -> Any:
    """Returns the matmul for inference in a CPU's layout, or None for the default of `nn.Dense`."""
    return dot_general_f32_accum if flatten_batch and not train else None


def dense(features: int, ctx: Context, **initializers: Initializer) -> nn.Dense:
    """Creates a dense layer that computes in the context's dtype, named "Dense_<i>"."""
    return nn.Dense(features, dtype=ctx.dtype, dot_general=ctx.dot_general, **initializers)


def classifier_head(num_classes: int, bias: float) -> nn.Dense:
    """Creates a float32 linear classifier "head": zero kernel, and a constant initial bias."""
    zeros, bias_init = nn.initializers.zeros, nn.initializers.constant(bias)
    return nn.Dense(num_classes, kernel_init=zeros, bias_init=bias_init, name="head")


class PatchEmbed(nn.Module):
    """Patch embedding: one dense layer from the pixels of each patch to a token.

    It is a convolution with a kernel of shape (P, P, 3, C) and stride P, computed as one matmul.
    With `ctx.token_major`, rows are padded to the length that fast GPU matmuls need.
    """

    hidden_dim: int
    patch_size: int
    ctx: Context = Context()

    @nn.compact
    def __call__(self, images: Float[Array, "n h w 3"]) -> Float[Array, "a b c"]:
        """Embeds patches in raster order: (n, s, c), or (s, n, c) with `token_major`."""
        size, dtype, token_major = self.patch_size, self.ctx.dtype, self.ctx.token_major
        n, height, width, colors = images.shape
        kernel_shape = (size, size, colors, self.hidden_dim)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), kernel_shape)
        bias = self.param("bias", nn.initializers.zeros, (self.hidden_dim,))
        patches = images.reshape(n, height // size, size, width // size, size, colors)
        order = (1, 3, 0, 2, 4, 5) if token_major else (0, 1, 3, 2, 4, 5)
        num_tokens = height // size * (width // size)
        leading = (num_tokens, n) if token_major else (n, num_tokens)
        patches = patches.transpose(order).reshape(*leading, -1).astype(dtype)
        matrix = kernel.reshape(-1, self.hidden_dim).astype(dtype)
        if token_major and len(matrix) % _GPU_ROW_MULTIPLE:
            padding = (0, -len(matrix) % _GPU_ROW_MULTIPLE)
            patches = jnp.pad(patches, ((0, 0), (0, 0), padding))
            matrix = jnp.pad(matrix, (padding, (0, 0)))
        dot_general = self.ctx.dot_general or lax.dot_general
        tokens = dot_general(patches, matrix, (((2,), (0,)), ((), ())))
        return (tokens + _expand_like(bias.astype(dtype), tokens)).astype(dtype)


class MlpBlock(nn.Module):
    """Dense, GELU, dense on one vector; mapped over tokens, and in a Mixer over channels."""

    mlp_dim: int
    gelu: Gelu = "tanh"
    dropout: float = 0.0
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    ctx: Context = Context()

    @nn.compact
    def __call__(self, x: Float[Array, " d"], index: Int[Array, ""]) -> Float[Array, " d"]:
        """Applies the MLP to a vector, whose `index` in the global batch seeds dropout."""
        initializers = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        y = dense(self.mlp_dim, self.ctx, **initializers)(x)
        y = apply_gelu(y, self.gelu).astype(self.ctx.dtype)
        y = self.drop(y, index)
        y = dense(x.shape[-1], self.ctx, **initializers)(y)
        return self.drop(y, index)

    def drop(self, x: Float[Array, " d"], index: Int[Array, ""]) -> Float[Array, " d"]:
        """Applies dropout in training."""
        is_active = self.ctx.train and self.dropout
        return apply_dropout(x, self.dropout, self.make_rng("dropout"), index) if is_active else x


def map_over_vectors(
    module: type[nn.Module],
    x: Float[Array, "n s c"],
    example_index: Int[Array, " n"],
    over: Literal["tokens", "channels"],
    ctx: Context,
    **attributes: Any,
) -> Float[Array, "n s c"]:
    """Maps a module from vector to vector over all images and an axis, with shared parameters.

    With `ctx.flatten_batch`, all vectors are gathered as the rows of one matrix first. That is the
    layout which CPU matmuls want, to the last gradient; a TPU would copy every array for it.

    Args:
        module: Module whose call takes a vector and its index among those of the global batch.
        x: Tokens.
        example_index: Index of each example in the global batch.
        over: "channels" maps over channels, so that the module sees vectors of tokens; "tokens"
            maps over tokens, so that it sees vectors of channels.
        ctx: Settings of the call; also an attribute of the module.
        **attributes: Other attributes of the module.
    """
    axis = {"tokens": 1, "channels": 2}[over]
    num_vectors = x.shape[axis]
    index = example_index[:, None] * num_vectors + jnp.arange(num_vectors)[None]
    if not ctx.flatten_batch:
        return vmap_vectors(module, axis - 1)(**attributes, ctx=ctx)(x, index)
    vectors = jnp.moveaxis(x, axis, 1)
    rows = vectors.reshape(-1, vectors.shape[-1])
    rows = vmap_vectors(module, None)(**attributes, ctx=ctx)(rows, index.reshape(-1))
    return jnp.moveaxis(rows.reshape(vectors.shape), 1, axis)


def vmap_vectors(module: type[nn.Module], axis: int | None) -> Any:
    """Lifts a module of (vector, index) over the first axis and, in what remains, over `axis`.

    Args:
        module: Module to map; all vectors share its parameters.
        axis: Axis of one image's tokens (s, c) to map over: 1 to see vectors of tokens, 0 to see
            vectors of channels. None: map over the first axis only, the rows of a matrix.
    """
    lift = functools.partial(
        nn.vmap,
        variable_axes={"params": None},
        split_rngs={"params": False, "dropout": False},
    )
    inner = module if axis is None else lift(module, in_axes=(axis, 0), out_axes=axis)
    return lift(inner, in_axes=(0, 0))


def apply_dropout(
    x: Float[Array, "*d"], rate: float, rng: Key[Array, ""], index: Int[Array, ""]
) -> Float[Array, "*d"]:
    """Sets a fraction `rate` of an array's elements to zero and scales up the others.

    The key is shared by the batch; `index` is that of the array, one of an example or of a vector,
    in the global batch.
    """
    mask = bernoulli_at(rng, index, 1.0 - rate, x.shape)
    return jnp.where(mask, x / (1.0 - rate), 0.0).astype(x.dtype)


def drop_tokens(
    module: nn.Module,
    x: Float[Array, "n s c"],
    rate: float,
    example_index: Int[Array, " n"],
    train: bool,
) -> Float[Array, "n s c"]:
    """Applies dropout to tokens in training, with a random key of the calling module."""
    if not (train and rate):
        return x
    rng = module.make_rng("dropout")
    return jax.vmap(lambda x, index: apply_dropout(x, rate, rng, index))(x, example_index)


def dot_product_attention(
    query: Float[Array, "n q h d"],
    key: Float[Array, "n s h d"],
    value: Float[Array, "n s h d"],
    ctx: Context,
) -> Float[Array, "n q h d"]:
    """Computes attention of each head: a mean of values, weighted by softmax(q·k / √d).

    The softmax is float32. cuDNN's kernels do not store the weights (n, h, q, s); they support
    bfloat16 with heads whose width is a multiple of 8 up to 128. Their gradients are sums in no
    fixed order, so that only inference uses them.
    """
    width = query.shape[-1]
    has_kernel = query.dtype == jnp.bfloat16 and width % 8 == 0 and width <= _CUDNN_MAX_HEAD_WIDTH
    if ctx.flash_attention and not ctx.train and has_kernel:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    return xla_attention(query, key, value)


@jax.custom_vjp
def xla_attention(
    query: Float[Array, "n q h d"], key: Float[Array, "n s h d"], value: Float[Array, "n s h d"]
) -> Float[Array, "n q h d"]:
    """Computes attention with XLA's matmuls; see `dot_product_attention`.

    Residuals are the arguments, the output, and the log-sum-exp of the logits over keys. The
    backward pass recomputes the weights, and rounds them to the dtype of the arguments.
    """
    return jax.nn.dot_product_attention(query, key, value, implementation="xla")


def _attention_logits(query: Array, key: Array) -> Array:
    logits = jnp.einsum("nqhd,nshd->nhqs", query, key, preferred_element_type=jnp.float32)
    return logits * query.shape[-1] ** -0.5


def _attention_fwd(query: Array, key: Array, value: Array) -> tuple[Array, Any]:
    # The same operations as in `jax.nn.dot_product_attention`, whose `return_residual` would round
    # the log-sum-exp to bfloat16.
    logits = _attention_logits(query, key)
    max_logit = logits.max(-1, keepdims=True)
    exponentials = jnp.exp(logits - max_logit)
    denominator = exponentials.sum(-1, keepdims=True)
    weights = (exponentials / denominator).astype(value.dtype)
    y = checkpoint_name(jnp.einsum("nhqs,nshd->nqhd", weights, value), ATTENTION)
    logsumexp = checkpoint_name(max_logit + jnp.log(denominator), ATTENTION)
    return y, (query, key, value, y, logsumexp)


def _attention_bwd(residuals: Any, cotangent: Array) -> tuple[Array, Array, Array]:
    query, key, value, y, logsumexp = residuals
    weights = jnp.exp(_attention_logits(query, key) - logsumexp).astype(value.dtype)
    dvalue = jnp.einsum("nhqs,nqhd->nshd", weights, cotangent)
    dweights = jnp.einsum("nqhd,nshd->nhqs", cotangent, value, preferred_element_type=jnp.float32)
    # The mean of `dweights` weighted by `weights`, computed from smaller arrays (FlashAttention,
    # arXiv 2205.14135, Appendix B.2).
    mean = (cotangent.astype(jnp.float32) * y).sum(-1, keepdims=True).swapaxes(1, 2)
    dlogits = (weights * (dweights - mean) * query.shape[-1] ** -0.5).astype(query.dtype)
    dquery = jnp.einsum("nhqs,nshd->nqhd", dlogits, key)
    dkey = jnp.einsum("nhqs,nqhd->nshd", dlogits, query)
    return dquery, dkey, dvalue


xla_attention.defvjp(_attention_fwd, _attention_bwd)


def add_branch(
    x: Float[Array, "n s c"],
    branch: Float[Array, "n s c"],
    mask: DropPathMask,
    dtype: Any,
    save_as: str = "",
) -> Float[Array, "n s c"]:
    """Adds a residual branch, zero for examples that drop it.

    The branch is not rescaled in training, as in the authors' code. `save_as` is its tag for
    rematerialization policies, e.g. `MLP_OUTPUT`.
    """
    branch = checkpoint_name(branch, save_as) if save_as else branch
    branch = branch if mask is None else mask[:, None, None] * branch
    return (x + branch).astype(dtype)


def bernoulli_at(
    rng: Key[Array, ""], index: Int[Array, ""], probability: Any, shape: tuple[int, ...]
) -> Bool[Array, "..."]:
    """Draws a mask that depends on the key and an index in the global batch only.

    Masks are thus the same on any number of devices and for any number of microbatches. The index
    is that of an example, or of a vector among those of all examples. Each element is true with
    the given probability.
    """
    return jax.random.bernoulli(jax.random.fold_in(rng, index), probability, shape)


def bernoulli_per_example(
    rng: Key[Array, ""], example_index: Int[Array, " n"], probability: Any, shape: tuple[int, ...]
) -> Bool[Array, "n ..."]:
    """Draws a mask for each example; see `bernoulli_at`."""
    return jax.vmap(lambda index: bernoulli_at(rng, index, probability, shape))(example_index)
