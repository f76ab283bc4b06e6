"""Mixer blocks on TPUs: each branch is one kernel, which keeps hidden units in VMEM.

A branch is `x + mask * mlp(layer_norm(x))`. HBM holds `x` and the result and, in the backward pass,
which recomputes LayerNorm and hidden units, `x`, the result's cotangent, that of `x` and, once, the
gradients: nothing as wide as the hidden layer. Tokens and operands of matmuls have the dtype of
`x`; statistics, sums, GELU and gradients are float32.

A program of the grid computes a few whole images. Parameters stay in VMEM from the first program
to the last, and so do the sums that become the gradients.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from mixer_jax.errors import UserError
from mixer_jax.kernels.mosaic import kernels
from mixer_jax.kernels.mosaic.block_sizes import (
    BlockSizes,
    BranchSizes,
    choose_block_sizes,
    padded_rows,
)
from mixer_jax.kernels.mosaic.kernels import BranchParams, HiddenParams
from mixer_jax.models.layers import DropPathMask, Gelu, layer_norm

Branch = Literal["token_mixing", "channel_mixing"]
# Device whose limits the interpreter assumes.
_INTERPRETED_DEVICE_KIND = "TPU v5e"


class MosaicMixerBackend:
    """Block backend of Mixer for TPUs.

    Args:
        model: An `MlpMixer`.
        num_tokens: Tokens per image.

    Raises:
        UserError: The kernels do not fit into the VMEM of the device.
    """

    token_major: ClassVar[bool] = False

    def __init__(self, model: Any, num_tokens: int):
        self.gelu, self.interpret = model.gelu, model.execution.interpret
        self.block_sizes = select_block_sizes(model, num_tokens)

    def begin(self, tokens: Float[Array, "n s c"], drop_path: bool) -> Float[Array, "n s c"]:
        """Returns the tokens as they are."""
        del drop_path
        return tokens

    def block(
        self,
        params: Mapping[str, Any],
        carry: Float[Array, "n s c"],
        masks: tuple[DropPathMask, DropPathMask],
    ) -> Float[Array, "n s c"]:
        """Applies one block."""
        x, sizes = carry, self.block_sizes
        mask_0, mask_1 = (jnp.ones(len(x), x.dtype) if m is None else m for m in masks)
        token_params = _branch_params(params["LayerNorm_0"], params["token_mixing"])
        channel_params = _branch_params(params["LayerNorm_1"], params["channel_mixing"])
        settings = (self.gelu, self.interpret)
        x = apply_branch("token_mixing", x, mask_0, token_params, sizes.token_mixing, *settings)
        return apply_branch(
            "channel_mixing", x, mask_1, channel_params, sizes.channel_mixing, *settings
        )

    def end(
        self, norm_params: Mapping[str, Any], carry: Float[Array, "n s c"]
    ) -> Float[Array, "n s c"]:
        """Applies the final LayerNorm."""
        return layer_norm(carry, norm_params["scale"], norm_params["bias"])


def select_block_sizes(model: Any, num_tokens: int) -> BlockSizes:
    """Returns the block sizes of a model's kernels on the device it is compiled for.

    Raises:
        UserError: The kernels do not fit into the VMEM of the device.
    """
    config, execution = model.config, model.execution
    kind = execution.target_device_kind or jax.devices()[0].device_kind
    sizes = choose_block_sizes(
        num_tokens,
        config.hidden_dim,
        config.tokens_mlp_dim,
        config.channels_mlp_dim,
        _INTERPRETED_DEVICE_KIND if execution.interpret else kind,
        jnp.dtype(execution.dtype).itemsize,
    )
    if sizes is None:
        raise UserError(
            f"model.backend=mosaic needs MLPs that fit into the VMEM of a {kind}, got {num_tokens} "
            f"tokens and {config.hidden_dim} channels. Set xla."
        )
    return sizes


def _branch_params(norm: Mapping[str, Any], mlp: Mapping[str, Any]) -> BranchParams:
    dense_0, dense_1 = mlp["Dense_0"], mlp["Dense_1"]
    return BranchParams(
        norm["scale"],
        norm["bias"],
        dense_0["kernel"],
        dense_0["bias"],
        dense_1["kernel"],
        dense_1["bias"],
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5, 6))
def apply_branch(
    branch: Branch,
    x: Float[Array, "n s c"],
    mask: Float[Array, " n"],
    params: BranchParams,
    sizes: BranchSizes,
    gelu: Gelu = "tanh",
    interpret: bool = False,
) -> Float[Array, "n s c"]:
    """Applies LayerNorm over channels, mixes tokens or channels, and adds the result.

    The compiler does not partition a kernel over devices: call it on the images of each device,
    inside `jax.shard_map(..., check_vma=False)`.

    Args:
        branch: "token_mixing" or "channel_mixing".
        x: Tokens of a batch of images, float32 or bfloat16.
        mask: 1.0 for an image that keeps the branch, 0.0 for one that drops it; gets no gradient.
        params: Parameters of the branch. Kernels are cast to the dtype of `x`; gradients have the
            parameters' own dtypes.
        sizes: Block sizes of the branch, from `choose_block_sizes`.
        gelu: "tanh", the approximation, or "exact".
        interpret: Whether to run without a TPU, slowly.
    """
    images = _largest_divisor(x.shape[0], sizes.forward.images)
    scale, bias, kernel1, bias1, kernel2, bias2 = _vmem_operands(branch, params, x.dtype)
    if branch == "token_mixing":
        body: Any = kernels.token_fwd_kernel
        scratch = []
        kernel1, kernel2 = kernel1.T, kernel2.T
    else:
        body = functools.partial(kernels.channel_fwd_kernel, hidden_block=sizes.forward.hidden)
        shape = (images * padded_rows(x.shape[1], x.dtype.itemsize), x.shape[2])
        scratch = [pltpu.VMEM(shape, x.dtype), pltpu.VMEM(shape, jnp.float32)]
    resident = (HiddenParams(scale, bias, kernel1, bias1), kernel2, bias2)
    block = pl.BlockSpec((images, *x.shape[1:]), lambda step: (step, 0, 0))
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(
        functools.partial(body, gelu=gelu),
        grid=(x.shape[0] // images,),
        in_specs=[_smem_spec(), block, *jax.tree.map(_resident_spec, resident)],
        out_specs=block,
        out_shape=result,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=sizes.vmem
        ),
        cost_estimate=_estimate_cost(2, x, params, [mask, x, resident, result]),
        interpret=interpret,
        name=branch,
    )(mask.astype(jnp.float32), x, *resident)


def _apply_branch_fwd(
    branch: Branch, x: Array, mask: Array, params: BranchParams, *settings: Any
) -> tuple[Array, Any]:
    return apply_branch(branch, x, mask, params, *settings), (x, mask, params)


def _apply_branch_bwd(
    branch: Branch,
    sizes: BranchSizes,
    gelu: Gelu,
    interpret: bool,
    residuals: Any,
    cotangent: Array,
) -> tuple[Array, Array, BranchParams]:
    x, mask, params = residuals
    cores = _largest_divisor(x.shape[0], sizes.cores)
    images = _largest_divisor(x.shape[0] // cores, sizes.backward.images)
    steps = x.shape[0] // (cores * images)
    scale, bias, kernel1, bias1, kernel2, bias2 = _vmem_operands(branch, params, x.dtype)
    resident: tuple[Any, ...]
    if branch == "token_mixing":
        body: Any = kernels.token_bwd_kernel
        scratch = []
        resident = (HiddenParams(scale, bias, kernel1.T, bias1), kernel1, kernel2)
    else:
        body = functools.partial(kernels.channel_bwd_kernel, hidden_block=sizes.backward.hidden)
        rows, channels = images * padded_rows(x.shape[1], x.dtype.itemsize), x.shape[2]
        untransposed = pltpu.VMEM((rows, channels), x.dtype)
        transposed = pltpu.VMEM((channels, rows), x.dtype)
        accumulator = pltpu.VMEM((rows, channels), jnp.float32)
        scratch = [untransposed, transposed, untransposed, transposed, accumulator]
        resident = (HiddenParams(scale, bias, kernel1, bias1), kernel2)
    block = pl.BlockSpec((images, *x.shape[1:]), lambda core, step: (core * steps + step, 0, 0))
    # The gradient of the second kernel is transposed, and has the shape of the first kernel.
    summed = BranchParams(scale, bias, kernel1, bias1, kernel1, bias2)
    sums = jax.tree.map(lambda x: jax.ShapeDtypeStruct((cores, *x.shape), jnp.float32), summed)
    results = (jax.ShapeDtypeStruct(x.shape, x.dtype), sums)
    dx, grads = pl.pallas_call(
        functools.partial(body, gelu=gelu),
        grid=(cores, steps),
        in_specs=[_smem_spec(), block, block, *jax.tree.map(_resident_spec, resident)],
        out_specs=(block, jax.tree.map(_per_core_spec, sums)),
        out_shape=results,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=sizes.vmem
        ),
        cost_estimate=_estimate_cost(5, x, params, [mask, x, cotangent, resident, results]),
        interpret=interpret,
        name=f"{branch}_backward",
    )(mask.astype(jnp.float32), x, cotangent, *resident)
    grads = jax.tree.map(lambda grad: grad.sum(0), grads)
    grads = grads._replace(kernel2=grads.kernel2.T)
    grads = jax.tree.map(lambda g, param: g.reshape(param.shape).astype(param.dtype), grads, params)
    # Fixes the layout of this gradient. Otherwise XLA would transpose the parameter and its moments
    # to the layout of the transposed gradient.
    dkernel2 = with_layout_constraint(grads.kernel2, Layout((0, 1)))
    return dx, jnp.zeros_like(mask), grads._replace(kernel2=dkernel2)


apply_branch.defvjp(_apply_branch_fwd, _apply_branch_bwd)


def _vmem_operands(branch: Branch, params: BranchParams, dtype: Any) -> list[Array]:
    """Returns parameters as matrices: kernels in `dtype`, vectors as they broadcast, in float32."""
    bias_shape = (-1, 1) if branch == "token_mixing" else (1, -1)
    shapes = [(1, -1), (1, -1), None, bias_shape, None, bias_shape]
    return [
        array.astype(dtype) if shape is None else array.reshape(shape).astype(jnp.float32)
        for array, shape in zip(params, shapes, strict=True)
    ]


def _smem_spec() -> pl.BlockSpec:
    """Returns the spec of the mask, which every program reads from scalar memory."""
    return pl.BlockSpec(memory_space=pltpu.SMEM)


def _resident_spec(array: Any) -> pl.BlockSpec:
    """Returns the spec of an array that every program reads: fetched into VMEM once."""
    zeros = (0,) * array.ndim
    return pl.BlockSpec(array.shape, lambda *program: zeros, pipeline_mode=pl.Buffered(1))


def _per_core_spec(array: Any) -> pl.BlockSpec:
    """Returns the spec of a core's sums: kept in VMEM, written out once."""
    block = (None, *array.shape[1:])
    return pl.BlockSpec(block, lambda core, _: (core, 0, 0), pipeline_mode=pl.Buffered(1))


def _estimate_cost(
    num_matmuls: int, x: Array, params: BranchParams, operands: Any
) -> pl.CostEstimate:
    """Estimates the cost of a kernel.

    Args:
        num_matmuls: Matmuls of a parameter's size per image.
        x: Tokens.
        params: Parameters of the branch.
        operands: Tree of the arrays that are read or written, each once.
    """
    outer, inner = params.kernel1.shape
    hidden = x.size // outer * inner
    return pl.CostEstimate(
        flops=2 * num_matmuls * hidden * outer,
        transcendentals=hidden,
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(operands)),
    )


def _largest_divisor(number: int, limit: int) -> int:
    """Returns the largest divisor of a number that is at most `limit`."""
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)
