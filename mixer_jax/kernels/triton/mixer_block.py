"""Mixer blocks on GPUs: everything memory-bound is a custom kernel, matmuls remain XLA's.

XLA runs matmuls at their peak rate, and the element-wise ops and normalization between them far
below the memory's. So what is between two matmuls is one kernel in each direction.

Activations are token-major, (tokens, images, channels); the hidden layer of token mixing is
(images, channels, hidden). So no matmul needs a transpose.
"""

import functools
import operator
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from mixer_jax.kernels.triton.kernels import (
    ResidualInput,
    gelu_bwd,
    layer_norm_bwd,
    layer_norm_fwd,
)
from mixer_jax.kernels.triton.tiling import TileConfig
from mixer_jax.models.layers import MLP_OUTPUT, DropPathMask, Gelu

# Axis of (tokens, images, channels) that a matmul contracts.
Axis = Literal["tokens", "channels"]


class TileConfigs(NamedTuple):
    """Tile configuration of each kernel; the defaults were fastest on an H200 (BENCHMARKS.md)."""

    layer_norm_fwd: TileConfig = TileConfig(1, 256, num_warps=1, num_programs=132 * 32)
    layer_norm_bwd: TileConfig = TileConfig(1, 256, num_warps=2, num_programs=132 * 12)
    gelu_bwd: TileConfig = TileConfig(8, 256, num_warps=8, num_programs=132 * 24)


TILE_CONFIGS = TileConfigs()


class ResidualStream(NamedTuple):
    """Residual stream, and what the next LayerNorm kernel is to add to it.

    With stochastic depth that is the last branch. Without it, a branch's last matmul adds its
    result to the stream itself, and only the sum of all biases so far is left to the kernel.

    Attributes:
        x: Tokens, (s, n, c).
        branch: Output of an MLP's last matmul; None without stochastic depth.
        bias: Bias of that matmul, None if it has none; without stochastic depth, the float32 sum of
            biases.
        mask: Drop-path mask of the branch.
    """

    x: Float[Array, "s n c"]
    branch: Float[Array, "s n c"] | None
    bias: Float[Array, " c"] | None
    mask: DropPathMask

    def add_and_normalize(
        self, params: Mapping[str, Any], interpret: bool
    ) -> tuple["ResidualStream", Float[Array, "s n c"]]:
        """Adds the branch, and applies LayerNorm with parameters `params`."""
        x, y = add_layer_norm(*self, params["scale"], params["bias"], interpret)
        return self._replace(x=x), y

    def add_branch(
        self, branch: Float[Array, "_ _"], bias: Float[Array, " c"] | None, mask: DropPathMask
    ) -> "ResidualStream":
        """Adds a branch, or defers the addition."""
        if self.branch is not None:
            return ResidualStream(self.x, branch.reshape(self.x.shape), bias, mask)
        # As a matrix of the matmul's shape: XLA fuses the addition into the matmul.
        x = (self.x.reshape(branch.shape) + branch).reshape(self.x.shape)
        if bias is None:
            return self._replace(x=x)
        return self._replace(x=x, bias=bias if self.bias is None else self.bias + bias)

    def with_checkpoint_name(self, name: str) -> "ResidualStream":
        """Names the result of the last matmul for rematerialization policies."""
        if self.branch is not None:
            return self._replace(branch=checkpoint_name(self.branch, name))
        return self._replace(x=checkpoint_name(self.x, name))


class TritonMixerBackend:
    """Block backend of Mixer for GPUs, with token-major activations.

    Args:
        model: An `MlpMixer`.
        num_tokens: Tokens per image.
    """

    token_major: ClassVar[bool] = True

    def __init__(self, model: Any, num_tokens: int):
        del num_tokens
        self.gelu, self.interpret = model.gelu, model.execution.interpret

    def begin(self, tokens: Float[Array, "s n c"], drop_path: bool) -> ResidualStream:
        """Returns the carry before the first block."""
        _, n, c = tokens.shape
        if drop_path:
            branch, bias, mask = jnp.zeros_like(tokens), jnp.zeros(c), jnp.ones(n, tokens.dtype)
            return ResidualStream(tokens, branch, bias, mask)
        return ResidualStream(tokens, None, jnp.zeros(c), None)

    def block(
        self,
        params: Mapping[str, Any],
        carry: ResidualStream,
        masks: tuple[DropPathMask, DropPathMask],
    ) -> ResidualStream:
        """Applies one block.

        The last bias of token mixing is omitted: it adds one number to all channels of a token,
        which every LayerNorm removes. So no output depends on it, and its gradient is zero.
        """
        (kernel, bias), (kernel_out, _) = _dense_pair(params["token_mixing"])
        carry, y = carry.add_and_normalize(params["LayerNorm_0"], self.interpret)
        hidden = as_matrix(dense_gelu(y, kernel, bias, "tokens", self.gelu, self.interpret))
        # Rows of, say, 196 tokens of 16 bits are not a multiple of 16 bytes, which fast matmuls
        # need, here and in the backward pass.
        kernel_out = with_layout_constraint(kernel_out.astype(y.dtype).T, Layout((0, 1)))
        branch = lax.dot_general(kernel_out, hidden, (((1,), (1,)), ((), ())))
        carry = carry.add_branch(branch, None, masks[0]).with_checkpoint_name(MLP_OUTPUT)
        carry, y = carry.add_and_normalize(params["LayerNorm_1"], self.interpret)
        (kernel, bias), (kernel_out, bias_out) = _dense_pair(params["channel_mixing"])
        hidden = as_matrix(dense_gelu(y, kernel, bias, "channels", self.gelu, self.interpret))
        return carry.add_branch(hidden @ kernel_out.astype(y.dtype), bias_out, masks[1])

    def end(self, norm_params: Mapping[str, Any], carry: ResidualStream) -> Float[Array, "n s c"]:
        """Applies the final LayerNorm."""
        y = carry.add_and_normalize(norm_params, self.interpret)[1]
        return jnp.swapaxes(y, 0, 1)


def _dense_pair(params: Mapping[str, Any]) -> list[tuple[Array, Array]]:
    return [(params[name]["kernel"], params[name]["bias"]) for name in ("Dense_0", "Dense_1")]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def add_layer_norm(
    x: Float[Array, "s n c"],
    branch: Float[Array, "s n c"] | None,
    added_bias: Float[Array, " c"] | None,
    mask: Float[Array, " n"] | None,
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    interpret: bool = False,
    tile_configs: TileConfigs = TILE_CONFIGS,
) -> tuple[Float[Array, "s n c"], Float[Array, "s n c"]]:
    """Computes `x + mask * (branch + added_bias)`, and LayerNorm of that over channels.

    Without a branch, the first result is `x` as it is, and the second is LayerNorm of
    `x + added_bias`. The residual stream continues from the first result, so that the backward
    kernel adds up the gradients of both.

    Args:
        x: Residual stream.
        branch: Output of an MLP's last matmul, without its bias.
        added_bias: Bias of the branch, where None means zeros; without a branch, the float32 sum of
            biases that have yet to be added to `x`.
        mask: Drop-path mask, which gets no gradient; None means ones.
        scale: Scale of LayerNorm.
        bias: Bias of LayerNorm.
        interpret: Whether to run the kernels without a GPU.
        tile_configs: Tile configuration of each kernel.
    """
    return _add_layer_norm((x, branch, added_bias, mask, scale, bias), interpret, tile_configs)[0]


def _add_layer_norm_fwd(*args: Any) -> Any:
    *primals, interpret, tile_configs = args
    # Unwraps `CustomVJPPrimal`s, which also say whether a gradient is needed.
    values = jax.tree.map(operator.attrgetter("value"), primals)
    return _add_layer_norm(values, interpret, tile_configs)


def _add_layer_norm(args: Any, interpret: bool, tile_configs: TileConfigs) -> Any:
    x, branch, added_bias, mask, scale, bias = args
    # The matmul that adds to x takes it as a matrix of this shape. Without another reader of that
    # shape, XLA would write the result over x, and copy x first for those who read it later.
    aliased_input = x.reshape(len(x), -1) if branch is None else None
    added = ResidualInput(None if branch is None else as_matrix(branch), added_bias, mask)
    total, y, mean, rstd = layer_norm_fwd(
        as_matrix(x), added, scale, bias, x.shape[1], tile_configs.layer_norm_fwd,
        aliased_input, interpret=interpret,
    )  # fmt: skip
    total = x if branch is None else total.reshape(x.shape)
    # Of the two biases, one is None.
    branch_bias, deferred_bias = (None, added_bias) if branch is None else (added_bias, None)
    residuals = (total, mean, rstd, branch_bias, deferred_bias, mask, scale, bias)
    return (total, y.reshape(x.shape)), residuals


def _add_layer_norm_bwd(
    interpret: bool, tile_configs: TileConfigs, residuals: Any, cotangents: Any
) -> Any:
    x, mean, rstd, branch_bias, deferred_bias, mask, scale, bias = residuals
    dx, dy = cotangents
    # The residual stream is not used further after the last block.
    dx = None if isinstance(dx, SymbolicZero) else as_matrix(dx)
    dy = as_matrix(jnp.zeros(dy.shape, dy.dtype) if isinstance(dy, SymbolicZero) else dy)
    has_bias = branch_bias is not None or deferred_bias is not None
    grads = layer_norm_bwd(
        dx, dy, as_matrix(x), mean, rstd, scale, deferred_bias, mask, x.shape[1], has_bias,
        tile_configs.layer_norm_bwd, interpret=interpret,
    )  # fmt: skip

    def col_sums(index: int, param: Any) -> Any:
        return grads.col_sums[index].astype(param.dtype)

    if deferred_bias is not None:
        dscale, dbias = col_sums(0, scale), col_sums(1, bias)
        dx = grads.x.reshape(x.shape)
        return dx, None, col_sums(2, deferred_bias), None, dscale, dbias
    dx = grads.x.reshape(x.shape)
    dbranch = dx if grads.branch is None else grads.branch.reshape(x.shape)
    dbranch_bias = None if branch_bias is None else col_sums(2, branch_bias)
    return dx, dbranch, dbranch_bias, None, col_sums(0, scale), col_sums(1, bias)


add_layer_norm.defvjp(_add_layer_norm_fwd, _add_layer_norm_bwd, symbolic_zeros=True)


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
