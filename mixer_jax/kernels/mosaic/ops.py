"""The two branches of a Mixer block as TPU kernels that keep hidden units in VMEM.

A branch is `x + mask * mlp(layer_norm(x))`. HBM holds `x` and the result and, in the backward pass,
which recomputes LayerNorm and hidden units, `x`, the result's cotangent, that of `x` and, once, the
gradients: nothing as wide as the hidden layer. Tokens and operands of matmuls have the dtype of
`x`; statistics, sums, GELU and gradients are float32.

A program of the grid computes a few whole images. Parameters stay in VMEM from the first program
to the last, and so do the sums that become the gradients.
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

from mixer_jax.kernels.mosaic import kernels
from mixer_jax.kernels.mosaic.block_sizes import BranchSizes, padded_rows
from mixer_jax.models.layers import Gelu


class BranchParams(NamedTuple):
    """Parameters of a branch; d is the number of tokens or of channels.

    Attributes:
        scale: Scale of LayerNorm.
        bias: Bias of LayerNorm.
        kernel1: Kernel of the first dense layer.
        bias1: Bias of the first dense layer.
        kernel2: Kernel of the second dense layer.
        bias2: Bias of the second dense layer.
    """

    scale: Float[Array, " c"]
    bias: Float[Array, " c"]
    kernel1: Float[Array, "d h"]
    bias1: Float[Array, " h"]
    kernel2: Float[Array, "h d"]
    bias2: Float[Array, " d"]


class _BranchSpec(NamedTuple):
    """Static properties of a branch."""

    is_token_mixing: bool
    sizes: BranchSizes
    gelu: Gelu
    interpret: bool

    @property
    def name(self) -> str:
        """Name of the forward kernel."""
        return "token_mixing" if self.is_token_mixing else "channel_mixing"


def token_mixing(
    x: Float[Array, "n s c"],
    mask: Float[Array, " n"],
    params: BranchParams,
    sizes: BranchSizes,
    gelu: Gelu = "tanh",
    interpret: bool = False,
) -> Float[Array, "n s c"]:
    """Applies LayerNorm over channels, mixes the tokens of each channel, and adds the result.

    The compiler does not partition a kernel over devices: call it on the images of each device,
    inside `jax.shard_map(..., check_vma=False)`.

    Args:
        x: Tokens of a batch of images, float32 or bfloat16.
        mask: 1.0 for an image that keeps the branch, 0.0 for one that drops it; gets no gradient.
        params: Parameters with d = s. Kernels are cast to the dtype of `x`; gradients have the
            parameters' own dtypes.
        sizes: Block sizes from `choose_block_sizes`, for token mixing.
        gelu: "tanh", the approximation, or "exact".
        interpret: Whether to run without a TPU, slowly.
    """
    return _fused_branch(_BranchSpec(True, sizes, gelu, interpret), x, mask, params)


def channel_mixing(
    x: Float[Array, "n s c"],
    mask: Float[Array, " n"],
    params: BranchParams,
    sizes: BranchSizes,
    gelu: Gelu = "tanh",
    interpret: bool = False,
) -> Float[Array, "n s c"]:
    """Applies LayerNorm over channels, mixes the channels of each token, and adds the result.

    Args:
        x: See `token_mixing`, also for the other arguments.
        mask: Drop-path mask.
        params: Parameters with d = c.
        sizes: Block sizes from `choose_block_sizes`, for channel mixing.
        gelu: GELU variant, "tanh" or "exact".
        interpret: Whether to run without a TPU.
    """
    return _fused_branch(_BranchSpec(False, sizes, gelu, interpret), x, mask, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused_branch(spec: _BranchSpec, x: Array, mask: Array, params: BranchParams) -> Array:
    sizes = spec.sizes
    images = _largest_divisor(x.shape[0], sizes.forward.images)
    scale, bias, kernel1, bias1, kernel2, bias2 = _vmem_operands(spec, params, x.dtype)
    if spec.is_token_mixing:
        body: Any = kernels.token_fwd_kernel
        scratch = []
        kernel1, kernel2 = kernel1.T, kernel2.T
    else:
        body = functools.partial(kernels.channel_fwd_kernel, hidden_block=sizes.forward.hidden)
        shape = (images * padded_rows(x.shape[1], x.dtype.itemsize), x.shape[2])
        scratch = [pltpu.VMEM(shape, x.dtype), pltpu.VMEM(shape, jnp.float32)]
    resident = [scale, bias, kernel1, bias1, kernel2, bias2]
    block = pl.BlockSpec((images, *x.shape[1:]), lambda step: (step, 0, 0))
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(
        functools.partial(body, gelu=spec.gelu),
        grid=(x.shape[0] // images,),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), block, *map(_resident_spec, resident)],
        out_specs=block,
        out_shape=result,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=sizes.vmem
        ),
        cost_estimate=_estimate_cost(2, x, params, [mask, x, *resident, result]),
        interpret=spec.interpret,
        name=spec.name,
    )(mask.astype(jnp.float32), x, *resident)


def _fused_branch_fwd(
    spec: _BranchSpec, x: Array, mask: Array, params: BranchParams
) -> tuple[Array, Any]:
    return _fused_branch(spec, x, mask, params), (x, mask, params)


def _fused_branch_bwd(
    spec: _BranchSpec, residuals: Any, cotangent: Array
) -> tuple[Array, Array, BranchParams]:
    x, mask, params = residuals
    sizes = spec.sizes
    cores = _largest_divisor(x.shape[0], sizes.cores)
    images = _largest_divisor(x.shape[0] // cores, sizes.backward.images)
    steps = x.shape[0] // (cores * images)
    scale, bias, kernel1, bias1, kernel2, bias2 = _vmem_operands(spec, params, x.dtype)
    if spec.is_token_mixing:
        body: Any = kernels.token_bwd_kernel
        scratch = []
        resident = [scale, bias, kernel1.T, bias1, kernel1, kernel2]
    else:
        body = functools.partial(kernels.channel_bwd_kernel, hidden_block=sizes.backward.hidden)
        rows, channels = images * padded_rows(x.shape[1], x.dtype.itemsize), x.shape[2]
        untransposed = pltpu.VMEM((rows, channels), x.dtype)
        transposed = pltpu.VMEM((channels, rows), x.dtype)
        accumulator = pltpu.VMEM((rows, channels), jnp.float32)
        scratch = [untransposed, transposed, untransposed, transposed, accumulator]
        resident = [scale, bias, kernel1, bias1, kernel2]
    block = pl.BlockSpec((images, *x.shape[1:]), lambda core, step: (core * steps + step, 0, 0))
    # The gradient of the second kernel is transposed, and has the shape of the first kernel.
    summed = [scale, bias, kernel1, bias1, kernel1, bias2]
    sums = [jax.ShapeDtypeStruct((cores, *array.shape), jnp.float32) for array in summed]
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype), *sums]
    dx, *grads = pl.pallas_call(
        functools.partial(body, gelu=spec.gelu),
        grid=(cores, steps),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            block,
            block,
            *map(_resident_spec, resident),
        ],
        out_specs=[block, *map(_per_core_spec, sums)],
        out_shape=results,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=sizes.vmem
        ),
        cost_estimate=_estimate_cost(5, x, params, [mask, x, cotangent, *resident, *results]),
        interpret=spec.interpret,
        name=f"{spec.name}_backward",
    )(mask.astype(jnp.float32), x, cotangent, *resident)
    grads = [grad.sum(0) for grad in grads]
    grads[4] = grads[4].T
    dparams = BranchParams(
        *(
            grad.reshape(param.shape).astype(param.dtype)
            for grad, param in zip(grads, params, strict=True)
        )
    )
    # Fixes the layout of this gradient. Otherwise XLA would transpose the parameter and its moments
    # to the layout of the transposed gradient.
    dkernel2 = with_layout_constraint(dparams.kernel2, Layout((0, 1)))
    return dx, jnp.zeros_like(mask), dparams._replace(kernel2=dkernel2)


_fused_branch.defvjp(_fused_branch_fwd, _fused_branch_bwd)


def _vmem_operands(spec: _BranchSpec, params: BranchParams, dtype: Any) -> list[Array]:
    """Returns parameters as matrices: kernels in `dtype`, vectors as they broadcast, in float32."""
    bias_shape = (-1, 1) if spec.is_token_mixing else (1, -1)
    shapes = [(1, -1), (1, -1), None, bias_shape, None, bias_shape]
    return [
        array.astype(dtype) if shape is None else array.reshape(shape).astype(jnp.float32)
        for array, shape in zip(params, shapes, strict=True)
    ]


def _resident_spec(array: Any) -> pl.BlockSpec:
    """Returns the spec of an array that every program reads: fetched into VMEM once."""
    zeros = (0,) * array.ndim
    return pl.BlockSpec(array.shape, lambda *program: zeros, pipeline_mode=pl.Buffered(1))


def _per_core_spec(array: Any) -> pl.BlockSpec:
    """Returns the spec of a core's sums: kept in VMEM, written out once."""
    block = (None, *array.shape[1:])
    return pl.BlockSpec(block, lambda core, _: (core, 0, 0), pipeline_mode=pl.Buffered(1))


def _estimate_cost(
    num_matmuls: int, x: Array, params: BranchParams, operands: Iterable[Any]
) -> pl.CostEstimate:
    """Estimates the cost of a kernel.

    Args:
        num_matmuls: Matmuls of a parameter's size per image.
        x: Tokens.
        params: Parameters of the branch.
        operands: Arrays that are read or written, each once.
    """
    outer, inner = params.kernel1.shape
    hidden = x.size // outer * inner
    return pl.CostEstimate(
        flops=2 * num_matmuls * hidden * outer,
        transcendentals=hidden,
        bytes_accessed=sum(array.size * array.dtype.itemsize for array in operands),
    )


def _largest_divisor(number: int, limit: int) -> int:
    """Returns the largest divisor of a number that is at most `limit`."""
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)
