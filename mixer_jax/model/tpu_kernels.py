"""The two branches of a Mixer block as TPU kernels that keep hidden units on the chip.

A branch is `x + keep * mlp(layer_norm(x))`. Main memory sees `x` and the result, and in the
backward pass, which computes LayerNorm and hidden units anew, `x`, the cotangent and the
gradients: nothing as wide as the hidden layer. Types are those of `MlpMixer`: what is kept and
multiplied is of the type of `x`; sums, statistics and GELU are float32.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from mixer_jax.model import tpu_kernel_bodies as bodies
from mixer_jax.model.tpu_kernel_sizes import Sizes, padded_rows

_GRADIENTS = 6


class BranchParams(NamedTuple):
    """Parameters of LayerNorm and MLP; `d` is the number of tokens or of channels.

    Attributes:
        scale: of LayerNorm.
        bias: of LayerNorm.
        kernel1: to the hidden units.
        bias1: of the hidden units.
        kernel2: from the hidden units.
        bias2: of the output.
    """

    scale: Float[Array, " c"]
    bias: Float[Array, " c"]
    kernel1: Float[Array, "d h"]
    bias1: Float[Array, " h"]
    kernel2: Float[Array, "h d"]
    bias2: Float[Array, " d"]


class _Branch(NamedTuple):
    """What is known of a branch when it is traced."""

    mixes_tokens: bool
    gelu: bodies.Gelu
    sizes: Sizes
    interpret: bool


def token_mixing(
    x: Float[Array, "n s c"],
    keep: Float[Array, " n"],
    params: BranchParams,
    sizes: Sizes,
    gelu: bodies.Gelu = "tanh",
    interpret: bool = False,
) -> Float[Array, "n s c"]:
    """Returns `x` with the tokens of each channel mixed, after LayerNorm over channels.

    Args:
        x: tokens of a batch of images; all of them are on one device.
        keep: 1 for each image that keeps the branch, 0 for others; no gradient flows to it.
        params: with d = s; kernels may be of another type than `x`, and their gradients are of
            their own type.
        sizes: from `tpu_kernel_sizes.choose_sizes`.
        gelu: "tanh", the approximation, or "exact".
        interpret: whether to run without a TPU, slowly.
    """
    return _apply(_Branch(True, gelu, sizes, interpret), x, keep, params)


def channel_mixing(
    x: Float[Array, "n s c"],
    keep: Float[Array, " n"],
    params: BranchParams,
    sizes: Sizes,
    gelu: bodies.Gelu = "tanh",
    interpret: bool = False,
) -> Float[Array, "n s c"]:
    """Returns `x` with the channels of each token mixed, after LayerNorm over channels.

    Args:
        x: as for `token_mixing`, as are all others.
        keep: of the images.
        params: with d = c.
        sizes: from `tpu_kernel_sizes.choose_sizes`.
        gelu: which.
        interpret: whether to run without a TPU.
    """
    return _apply(_Branch(False, gelu, sizes, interpret), x, keep, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(branch: _Branch, x: Array, keep: Array, params: BranchParams) -> Array:
    images = _divisor(x.shape[0], branch.sizes.forward_images)
    vectors = _vectors(branch, params)
    kernel1, kernel2 = (kernel.astype(x.dtype) for kernel in (params.kernel1, params.kernel2))
    if branch.mixes_tokens:
        body, name, scratch = bodies.token_forward, "token_mixing", []
        kernel1, kernel2 = kernel1.T, kernel2.T
    else:
        body = functools.partial(bodies.channel_forward, chunk=branch.sizes.forward_chunk)
        rows = images * padded_rows(x.shape[1], x.dtype.itemsize)
        name = "channel_mixing"
        scratch = [pltpu.VMEM((rows, x.shape[2]), kind) for kind in (x.dtype, jnp.float32)]
    whole = [vectors.scale, vectors.bias, kernel1, vectors.bias1, kernel2, vectors.bias2]
    block = pl.BlockSpec((images, *x.shape[1:]), lambda step: (step, 0, 0))
    out_shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(
        functools.partial(body, gelu=branch.gelu),
        grid=(x.shape[0] // images,),
        in_specs=[_numbers(), block, *map(_whole, whole)],
        out_specs=block,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=branch.sizes.vmem
        ),
        cost_estimate=_cost(2, x, params.kernel1.shape, [keep, x, *whole, out_shape]),
        interpret=branch.interpret,
        name=name,
    )(keep.astype(jnp.float32), x, *whole)


def _forward(branch: _Branch, x: Array, keep: Array, params: BranchParams) -> tuple[Array, Any]:
    return _apply(branch, x, keep, params), (x, keep, params)


def _backward(branch: _Branch, kept: Any, cotangent: Array) -> tuple[Array, Array, BranchParams]:
    x, keep, params = kept
    cores = _divisor(x.shape[0], branch.sizes.cores)
    images = _divisor(x.shape[0] // cores, branch.sizes.backward_images)
    steps = x.shape[0] // cores // images
    vectors = _vectors(branch, params)
    kernel1, kernel2 = (kernel.astype(x.dtype) for kernel in (params.kernel1, params.kernel2))
    if branch.mixes_tokens:
        body, name, scratch = bodies.token_backward, "token_mixing_backward", []
        whole = [vectors.scale, vectors.bias, kernel1.T, vectors.bias1, kernel1, kernel2]
    else:
        body = functools.partial(bodies.channel_backward, chunk=branch.sizes.backward_chunk)
        name, channels = "channel_mixing_backward", x.shape[2]
        rows = images * padded_rows(x.shape[1], x.dtype.itemsize)
        lying, across = pltpu.VMEM((rows, channels), x.dtype), pltpu.VMEM((channels, rows), x.dtype)
        scratch = [lying, across, lying, across, pltpu.VMEM((rows, channels), jnp.float32)]
        whole = [vectors.scale, vectors.bias, kernel1, vectors.bias1, kernel2]
    block = pl.BlockSpec((images, *x.shape[1:]), lambda core, step: (core * steps + step, 0, 0))
    summed = vectors._replace(kernel2=jax.ShapeDtypeStruct(kernel1.shape, jnp.float32), kernel1=jax.ShapeDtypeStruct(kernel1.shape, jnp.float32))
    sums = [jax.ShapeDtypeStruct((cores, *v.shape), jnp.float32) for v in summed]
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype), *sums]
    to_x, *grads = pl.pallas_call(
        functools.partial(body, gelu=branch.gelu),
        grid=(cores, steps),
        in_specs=[_numbers(), block, block, *map(_whole, whole)],
        out_specs=[block, *map(_of_core, sums)],
        out_shape=results,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=branch.sizes.vmem
        ),
        cost_estimate=_cost(5, x, kernel1.shape, [keep, x, *whole, *results]),
        interpret=branch.interpret,
        name=name,
    )(keep.astype(jnp.float32), x, cotangent, *whole)
    grads = [grad.sum(0) for grad in grads]
    grads[4] = grads[4].T
    shaped = [g.reshape(p.shape).astype(p.dtype) for g, p in zip(grads, params, strict=True)]
    return to_x, jnp.zeros_like(keep), BranchParams(*shaped)


_apply.defvjp(_forward, _backward)


def _vectors(branch: _Branch, params: BranchParams) -> BranchParams:
    lying = [v.reshape(1, -1).astype(jnp.float32) for v in (params.scale, params.bias)]
    shape = (-1, 1) if branch.mixes_tokens else (1, -1)
    b1, b2 = (v.reshape(shape).astype(jnp.float32) for v in (params.bias1, params.bias2))
    return BranchParams(lying[0], lying[1], params.kernel1, b1, params.kernel2, b2)


def _numbers() -> pl.BlockSpec:
    return pl.BlockSpec(memory_space=pltpu.SMEM)


def _whole(a: Any) -> pl.BlockSpec:
    return pl.BlockSpec(a.shape, lambda *program: (0,) * a.ndim, pipeline_mode=pl.Buffered(1))


def _of_core(a: Any) -> pl.BlockSpec:
    return pl.BlockSpec((None, *a.shape[1:]), lambda core, step: (core, 0, 0), pipeline_mode=pl.Buffered(1))


def _cost(products: int, x: Any, kernel: Any, moved: list[Any]) -> pl.CostEstimate:
    hidden = x.size // kernel[0] * kernel[1]
    return pl.CostEstimate(
        flops=2 * products * hidden * kernel[0],
        transcendentals=hidden,
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in moved),
    )


def _divisor(number: int, most: int) -> int:
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)
