"""The two branches of a Mixer block as TPU kernels that keep hidden units on the chip.

A branch is `x + keep * mlp(layer_norm(x))`. Main memory sees `x` and the result and, in the
backward pass, which computes LayerNorm and hidden units anew, `x`, the result's cotangent, that of
`x` and, once, the gradients: nothing as wide as the hidden layer. Tokens and what is multiplied
have the type of `x`; statistics, sums, GELU and gradients are float32.

A program of the grid computes a few whole images. Parameters stay on the chip from the first
program to the last, and so do the sums that become the gradients.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from mixer_jax.model import tpu_kernel_bodies as bodies
from mixer_jax.model.layers import Gelu
from mixer_jax.model.tpu_kernel_sizes import Sizes, padded_rows


class BranchParams(NamedTuple):
    """Parameters of a branch; d is the number of tokens or of channels.

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
    """What is known of a branch before there are arrays."""

    mixes_tokens: bool
    sizes: Sizes
    gelu: Gelu
    interpret: bool

    @property
    def name(self) -> str:
        """Of the forward kernel."""
        return "token_mixing" if self.mixes_tokens else "channel_mixing"


def token_mixing(
    x: Float[Array, "n s c"],
    keep: Float[Array, " n"],
    params: BranchParams,
    sizes: Sizes,
    gelu: Gelu = "tanh",
    interpret: bool = False,
) -> Float[Array, "n s c"]:
    """Returns `x` with the tokens of each channel mixed, after LayerNorm over channels.

    The compiler does not divide a kernel among devices: call it on a device's own images, inside
    `jax.shard_map(..., check_vma=False)`.

    Args:
        x: tokens of a batch of images, float32 or bfloat16.
        keep: 1.0 for an image that keeps the branch, 0.0 for one that skips it; gets no gradient.
        params: with d = s. Kernels are cast to the type of `x`; gradients have the parameters'
            own types.
        sizes: from `choose_sizes`, for token mixing.
        gelu: "tanh", the approximation, or "exact".
        interpret: whether to run without a TPU, slowly.
    """
    return _mix(_Branch(True, sizes, gelu, interpret), x, keep, params)


def channel_mixing(
    x: Float[Array, "n s c"],
    keep: Float[Array, " n"],
    params: BranchParams,
    sizes: Sizes,
    gelu: Gelu = "tanh",
    interpret: bool = False,
) -> Float[Array, "n s c"]:
    """Returns `x` with the channels of each token mixed, after LayerNorm over channels.

    Args:
        x: as for `token_mixing`, and so are the others.
        keep: which images keep the branch.
        params: with d = c.
        sizes: from `choose_sizes`, for channel mixing.
        gelu: which.
        interpret: whether to run without a TPU.
    """
    return _mix(_Branch(False, sizes, gelu, interpret), x, keep, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(branch: _Branch, x: Array, keep: Array, params: BranchParams) -> Array:
    sizes = branch.sizes
    images = _divisor(x.shape[0], sizes.forward.images)
    scale, bias, kernel1, bias1, kernel2, bias2 = _on_chip(branch, params, x.dtype)
    if branch.mixes_tokens:
        body: Any = bodies.token_forward
        scratch = []
        kernel1, kernel2 = kernel1.T, kernel2.T
    else:
        body = functools.partial(bodies.channel_forward, units=sizes.forward.units)
        shape = (images * padded_rows(x.shape[1], x.dtype.itemsize), x.shape[2])
        scratch = [pltpu.VMEM(shape, x.dtype), pltpu.VMEM(shape, jnp.float32)]
    whole = [scale, bias, kernel1, bias1, kernel2, bias2]
    block = pl.BlockSpec((images, *x.shape[1:]), lambda step: (step, 0, 0))
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(
        functools.partial(body, gelu=branch.gelu),
        grid=(x.shape[0] // images,),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), block, *map(_whole, whole)],
        out_specs=block,
        out_shape=result,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=sizes.vmem
        ),
        cost_estimate=_cost(2, x, params, [keep, x, *whole, result]),
        interpret=branch.interpret,
        name=branch.name,
    )(keep.astype(jnp.float32), x, *whole)


def _forward(branch: _Branch, x: Array, keep: Array, params: BranchParams) -> tuple[Array, Any]:
    return _mix(branch, x, keep, params), (x, keep, params)


def _backward(branch: _Branch, kept: Any, cotangent: Array) -> tuple[Array, Array, BranchParams]:
    x, keep, params = kept
    sizes = branch.sizes
    cores = _divisor(x.shape[0], sizes.cores)
    images = _divisor(x.shape[0] // cores, sizes.backward.images)
    steps = x.shape[0] // (cores * images)
    scale, bias, kernel1, bias1, kernel2, bias2 = _on_chip(branch, params, x.dtype)
    if branch.mixes_tokens:
        body: Any = bodies.token_backward
        scratch = []
        whole = [scale, bias, kernel1.T, bias1, kernel1, kernel2]
    else:
        body = functools.partial(bodies.channel_backward, units=sizes.backward.units)
        rows, channels = images * padded_rows(x.shape[1], x.dtype.itemsize), x.shape[2]
        lying = pltpu.VMEM((rows, channels), x.dtype)
        across = pltpu.VMEM((channels, rows), x.dtype)
        scratch = [lying, across, lying, across, pltpu.VMEM((rows, channels), jnp.float32)]
        whole = [scale, bias, kernel1, bias1, kernel2]
    block = pl.BlockSpec((images, *x.shape[1:]), lambda core, step: (core * steps + step, 0, 0))
    # The gradient of the second kernel lies across, as the first kernel does.
    summed = [scale, bias, kernel1, bias1, kernel1, bias2]
    sums = [jax.ShapeDtypeStruct((cores, *array.shape), jnp.float32) for array in summed]
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype), *sums]
    to_x, *grads = pl.pallas_call(
        functools.partial(body, gelu=branch.gelu),
        grid=(cores, steps),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), block, block, *map(_whole, whole)],
        out_specs=[block, *map(_of_core, sums)],
        out_shape=results,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=sizes.vmem
        ),
        cost_estimate=_cost(5, x, params, [keep, x, cotangent, *whole, *results]),
        interpret=branch.interpret,
        name=f"{branch.name}_backward",
    )(keep.astype(jnp.float32), x, cotangent, *whole)
    grads = [grad.sum(0) for grad in grads]
    grads[4] = grads[4].T
    typed = BranchParams(
        *(
            grad.reshape(param.shape).astype(param.dtype)
            for grad, param in zip(grads, params, strict=True)
        )
    )
    # Turned in passing. Left to XLA, parameters and moments are turned to lie as it does.
    kernel2 = with_layout_constraint(typed.kernel2, Layout((0, 1)))
    return to_x, jnp.zeros_like(keep), typed._replace(kernel2=kernel2)


_mix.defvjp(_forward, _backward)


def _on_chip(branch: _Branch, params: BranchParams, dtype: Any) -> list[Array]:
    """Returns parameters as matrices: kernels in that type, vectors as they are added, float32."""
    place = (-1, 1) if branch.mixes_tokens else (1, -1)
    shapes = [(1, -1), (1, -1), None, place, None, place]
    return [
        array.astype(dtype) if shape is None else array.reshape(shape).astype(jnp.float32)
        for array, shape in zip(params, shapes, strict=True)
    ]


def _whole(array: Any) -> pl.BlockSpec:
    """Returns where an array is that every program reads: on the chip, fetched once."""
    zeros = (0,) * array.ndim
    return pl.BlockSpec(array.shape, lambda *program: zeros, pipeline_mode=pl.Buffered(1))


def _of_core(array: Any) -> pl.BlockSpec:
    """Returns where the sums of a core are: on the chip, written out once."""
    block = (None, *array.shape[1:])
    return pl.BlockSpec(block, lambda core, _: (core, 0, 0), pipeline_mode=pl.Buffered(1))


def _cost(products: int, x: Array, params: BranchParams, moved: Iterable[Any]) -> pl.CostEstimate:
    """Returns what a kernel costs.

    Args:
        products: with a kernel, or of its size, for each image.
        x: tokens.
        params: of the branch.
        moved: arrays that are read or written, each once.
    """
    outer, inner = params.kernel1.shape
    hidden = x.size // outer * inner
    return pl.CostEstimate(
        flops=2 * products * hidden * outer,
        transcendentals=hidden,
        bytes_accessed=sum(array.size * array.dtype.itemsize for array in moved),
    )


def _divisor(number: int, most: int) -> int:
    """Returns the greatest divisor of a number that is at most `most`."""
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)
