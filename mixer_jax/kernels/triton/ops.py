"""Differentiable ops of a Mixer block on GPUs: everything memory-bound is a custom kernel.

XLA runs matmuls at their peak rate, and the element-wise ops and normalization between them far
below the memory's. So matmuls remain XLA's, and what is between two of them is one kernel in each
direction.

Activations are token-major, (tokens, images, channels); the hidden layer of token mixing is
(images, channels, hidden). So no matmul needs a transpose.
"""

import functools
import operator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from mixer_jax.kernels.triton.kernels import (
    ResidualInput,
    gelu_bwd,
    layer_norm_bwd,
    layer_norm_fwd,
)
from mixer_jax.kernels.triton.tiling import TileConfig
from mixer_jax.models.layers import Gelu

# Axis of (tokens, images, channels) that a matmul contracts.
Axis = Literal["tokens", "channels"]


class TileConfigs(NamedTuple):
    """Tile configuration of each kernel; the defaults were fastest on an H200 (BENCHMARKS.md)."""

    layer_norm_fwd: TileConfig = TileConfig(1, 256, num_warps=1, num_programs=132 * 32)
    layer_norm_bwd: TileConfig = TileConfig(1, 256, num_warps=2, num_programs=132 * 12)
    gelu_bwd: TileConfig = TileConfig(8, 256, num_warps=8, num_programs=132 * 24)


TILE_CONFIGS = TileConfigs()


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def add_layer_norm(
    x: Float[Array, "s n c"],
    branch: Float[Array, "s n c"],
    branch_bias: Float[Array, " c"] | None,
    mask: Float[Array, " n"] | None,
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    interpret: bool = False,
    tile_configs: TileConfigs = TILE_CONFIGS,
) -> tuple[Float[Array, "s n c"], Float[Array, "s n c"]]:
    """Computes `x + mask * (branch + branch_bias)`, and LayerNorm of that over channels.

    Args:
        x: Residual stream.
        branch: Output of an MLP's last matmul, without its bias.
        branch_bias: Bias of the residual branch; None means zeros.
        mask: Drop-path mask, which gets no gradient; None means ones.
        scale: Scale of LayerNorm.
        bias: Bias of LayerNorm.
        interpret: Whether to run the kernels without a GPU.
        tile_configs: Tile configuration of each kernel.
    """
    return _add_layer_norm((x, branch, branch_bias, mask, scale, bias), interpret, tile_configs)[0]


def _add_layer_norm_fwd(*args: Any) -> Any:
    *primals, interpret, tile_configs = args
    return _add_layer_norm(_values(primals), interpret, tile_configs)


def _add_layer_norm(args: Any, interpret: bool, tile_configs: TileConfigs) -> Any:
    x, branch, branch_bias, mask, scale, bias = args
    added = ResidualInput(as_matrix(branch), branch_bias, mask)
    x_new, y, mean, rstd = layer_norm_fwd(
        as_matrix(x), added, scale, bias, x.shape[1], tile_configs.layer_norm_fwd,
        interpret=interpret,
    )  # fmt: skip
    x_new, y = x_new.reshape(x.shape), y.reshape(x.shape)
    return (x_new, y), (x_new, mean, rstd, branch_bias, mask, scale, bias)


def _add_layer_norm_bwd(
    interpret: bool, tile_configs: TileConfigs, residuals: Any, cotangents: Any
) -> Any:
    x, mean, rstd, branch_bias, mask, scale, bias = residuals
    dx, dy = _as_matrices(cotangents)
    grads = layer_norm_bwd(
        dx, dy, as_matrix(x), mean, rstd, scale, None, mask, x.shape[1],
        branch_bias is not None, tile_configs.layer_norm_bwd, interpret=interpret,
    )  # fmt: skip
    dx_new = grads.x.reshape(x.shape)
    dbranch = dx_new if grads.branch is None else grads.branch.reshape(x.shape)
    dbranch_bias = None if branch_bias is None else grads.col_sums[2].astype(branch_bias.dtype)
    dscale, dbias = grads.col_sums[0].astype(scale.dtype), grads.col_sums[1].astype(bias.dtype)
    return dx_new, dbranch, dbranch_bias, None, dscale, dbias


add_layer_norm.defvjp(_add_layer_norm_fwd, _add_layer_norm_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def bias_layer_norm(
    x: Float[Array, "s n c"],
    bias_sum: Float[Array, " c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    interpret: bool = False,
    tile_configs: TileConfigs = TILE_CONFIGS,
) -> tuple[Float[Array, "s n c"], Float[Array, "s n c"]]:
    """Returns `x` as it is, and LayerNorm over channels of `x + bias_sum`.

    The residual stream continues from the first result, so that the backward kernel adds up the
    gradients of both.

    Args:
        x: Residual stream, to which biases have yet to be added.
        bias_sum: Sum of these biases, float32.
        scale: Scale of LayerNorm.
        bias: Bias of LayerNorm.
        interpret: Whether to run the kernels without a GPU.
        tile_configs: Tile configuration of each kernel.
    """
    return _bias_layer_norm((x, bias_sum, scale, bias), interpret, tile_configs)[0]


def _bias_layer_norm_fwd(*args: Any) -> Any:
    *primals, interpret, tile_configs = args
    return _bias_layer_norm(_values(primals), interpret, tile_configs)


def _bias_layer_norm(args: Any, interpret: bool, tile_configs: TileConfigs) -> Any:
    x, bias_sum, scale, bias = args
    # The matmul that adds to x takes it as a matrix of this shape. Without another reader of that
    # shape, XLA would write the result over x, and copy x first for those who read it later.
    aliased_input = x.reshape(len(x), -1)
    _, y, mean, rstd = layer_norm_fwd(
        as_matrix(x), ResidualInput(None, bias_sum, None), scale, bias, x.shape[1],
        tile_configs.layer_norm_fwd, aliased_input, interpret=interpret,
    )  # fmt: skip
    return (x, y.reshape(x.shape)), (x, mean, rstd, bias_sum, scale, bias)


def _bias_layer_norm_bwd(
    interpret: bool, tile_configs: TileConfigs, residuals: Any, cotangents: Any
) -> Any:
    x, mean, rstd, bias_sum, scale, bias = residuals
    dx, dy = _as_matrices(cotangents)
    grads = layer_norm_bwd(
        dx, dy, as_matrix(x), mean, rstd, scale, bias_sum, None, x.shape[1], True,
        tile_configs.layer_norm_bwd, interpret=interpret,
    )  # fmt: skip
    dscale, dbias = grads.col_sums[0].astype(scale.dtype), grads.col_sums[1].astype(bias.dtype)
    return grads.x.reshape(x.shape), grads.col_sums[2], dscale, dbias


bias_layer_norm.defvjp(_bias_layer_norm_fwd, _bias_layer_norm_bwd, symbolic_zeros=True)


def _values(primals: Any) -> Any:
    """Unwraps `CustomVJPPrimal`s, which also say whether a gradient is needed."""
    return jax.tree.map(operator.attrgetter("value"), primals)


def _as_matrices(cotangents: Any) -> tuple[Any, Any]:
    """Returns the cotangents of the residual stream and of its LayerNorm as matrices.

    The first is None if the stream is not used further, as after the last block.
    """
    dx, dy = cotangents
    if isinstance(dy, SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)
    return None if isinstance(dx, SymbolicZero) else as_matrix(dx), as_matrix(dy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def dense_gelu(
    y: Float[Array, "s n c"],
    kernel: Float[Array, "w d"],
    bias: Float[Array, " d"],
    contract_axis: Axis,
    gelu: Gelu = "tanh",
    interpret: bool = False,
    tile_configs: TileConfigs = TILE_CONFIGS,
) -> Float[Array, "_ _ d"]:
    """Computes GELU of a dense layer: (s, n, d) of channels, (n, c, d) of tokens.

    Args:
        y: Normalized tokens.
        kernel: Kernel of the layer, which is computed in the dtype of `y`.
        bias: Bias of the layer.
        contract_axis: "tokens" for token mixing, "channels" for channel mixing.
        gelu: "tanh" or "exact".
        interpret: Whether to run the kernels without a GPU.
        tile_configs: Tile configuration of each kernel.
    """
    return _dense_gelu_fwd(y, kernel, bias, contract_axis, gelu, interpret, tile_configs)[0]


def _dense_gelu_fwd(
    y: Any, kernel: Any, bias: Any, contract_axis: Axis, gelu: Gelu, *_: Any
) -> Any:
    # XLA turns matmul, bias and GELU into one call of cuBLASLt, whose epilogue adds the bias and
    # applies the GELU. It does not see through reshapes, so that all are matrices.
    contracts_tokens = contract_axis == "tokens"
    matrix = y.reshape(y.shape[0], -1) if contracts_tokens else as_matrix(y)
    hidden = lax.dot_general(
        matrix, kernel.astype(y.dtype), (((0 if contracts_tokens else 1,), (0,)), ((), ()))
    )
    hidden = hidden + bias.astype(y.dtype)[None, :]
    activations = jax.nn.gelu(hidden, approximate=gelu == "tanh")
    shape = y.shape[1:] if contracts_tokens else y.shape[:2]
    return activations.reshape(*shape, -1), (y, kernel, bias, hidden)


def _dense_gelu_bwd(
    contract_axis: Axis,
    gelu: Gelu,
    interpret: bool,
    tile_configs: TileConfigs,
    residuals: Any,
    da: Any,
) -> Any:
    y, kernel, bias, hidden = residuals
    config = tile_configs.gelu_bwd
    dhidden, dbias = gelu_bwd(as_matrix(da), hidden, gelu, config, interpret=interpret)
    dhidden = dhidden.reshape(da.shape)
    weights = kernel.astype(y.dtype)
    if contract_axis == "tokens":
        dkernel = lax.dot_general(y, dhidden, (((1, 2), (0, 1)), ((), ())))
        dy = lax.dot_general(weights, dhidden, (((1,), (2,)), ((), ())))
    else:
        dkernel = lax.dot_general(y, dhidden, (((0, 1), (0, 1)), ((), ())))
        dy = lax.dot_general(dhidden, weights, (((2,), (1,)), ((), ())))
    return dy, dkernel.astype(kernel.dtype), dbias.astype(bias.dtype)


dense_gelu.defvjp(_dense_gelu_fwd, _dense_gelu_bwd)


def as_matrix(x: Float[Array, "a b c"]) -> Float[Array, "a*b c"]:
    """Reshapes an array to a matrix that keeps its last axis."""
    return x.reshape(-1, x.shape[-1])
