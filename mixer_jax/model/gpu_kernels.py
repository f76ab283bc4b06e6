"""What is memory-bound in a block, as GPU kernels: LayerNorm after a skip connection, and GELU.

XLA runs the matrix products at their peak and what lies between them far below the memory's speed.
So the products stay XLA's, and what lies between two of them is one kernel in each direction.

Activations are token-major, (tokens, images, channels); the hidden layer of token mixing is
(images, channels, hidden). So no product needs a transpose.
"""

import functools
import operator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from mixer_jax.model.gpu_passes import Added, gelu_grad, norm, norm_grad
from mixer_jax.model.gpu_tiles import Tiling
from mixer_jax.model.layers import Gelu

# Which axis of (tokens, images, channels) a product contracts: tokens or channels.
Axis = Literal["first", "last"]


class Tilings(NamedTuple):
    """How each kernel cuts its matrix; by default as was fastest on an H200 (BENCHMARKS.md)."""

    norm: Tiling = Tiling(rows=1, columns=256, warps=1, programs=132 * 32)
    norm_grad: Tiling = Tiling(rows=1, columns=256, warps=2, programs=132 * 12)
    gelu_grad: Tiling = Tiling(rows=8, columns=256, warps=8, programs=132 * 24)


TILINGS = Tilings()


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def add_layer_norm(
    x: Float[Array, "s n c"],
    branch: Float[Array, "s n c"],
    branch_bias: Float[Array, " c"] | None,
    keep: Float[Array, " n"] | None,
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    interpret: bool = False,
    tilings: Tilings = TILINGS,
) -> tuple[Float[Array, "s n c"], Float[Array, "s n c"]]:
    """Returns `x + keep * (branch + branch_bias)` and LayerNorm of that over channels.

    Args:
        x: tokens.
        branch: output of an MLP's last product, without its bias.
        branch_bias: that bias; None stands for zeros.
        keep: factor of each image's branch, which gets no gradient; None stands for ones.
        scale: of LayerNorm.
        bias: of LayerNorm.
        interpret: whether to run the kernels without a GPU.
        tilings: how the kernels are cut.
    """
    return _add_layer_norm((x, branch, branch_bias, keep, scale, bias), interpret, tilings)[0]


def _add_layer_norm_forward(*args: Any) -> Any:
    *primals, interpret, tilings = args
    return _add_layer_norm(_values(primals), interpret, tilings)


def _add_layer_norm(args: Any, interpret: bool, tilings: Tilings) -> Any:
    x, branch, branch_bias, keep, scale, bias = args
    added = Added(flat(branch), branch_bias, keep)
    x_new, y, mean, rstd = norm(
        flat(x), added, scale, bias, x.shape[1], tilings.norm, interpret=interpret
    )
    x_new, y = x_new.reshape(x.shape), y.reshape(x.shape)
    return (x_new, y), (x_new, mean, rstd, branch_bias, keep, scale, bias)


def _add_layer_norm_backward(interpret: bool, tilings: Tilings, kept: Any, given: Any) -> Any:
    x, mean, rstd, branch_bias, keep, scale, bias = kept
    dx, dy = _flat_gradients(given)
    grads = norm_grad(
        dx, dy, flat(x), mean, rstd, scale, None, keep, x.shape[1],
        branch_bias is not None, tilings.norm_grad, interpret=interpret,
    )  # fmt: skip
    dx_new = grads.x.reshape(x.shape)
    dbranch = dx_new if grads.branch is None else grads.branch.reshape(x.shape)
    dbranch_bias = None if branch_bias is None else grads.sums[2].astype(branch_bias.dtype)
    dscale, dbias = grads.sums[0].astype(scale.dtype), grads.sums[1].astype(bias.dtype)
    return dx_new, dbranch, dbranch_bias, None, dscale, dbias


add_layer_norm.defvjp(_add_layer_norm_forward, _add_layer_norm_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def shift_layer_norm(
    x: Float[Array, "s n c"],
    shift: Float[Array, " c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    interpret: bool = False,
    tilings: Tilings = TILINGS,
) -> tuple[Float[Array, "s n c"], Float[Array, "s n c"]]:
    """Returns `x` as it is, and LayerNorm over channels of `x + shift`.

    Whoever goes on with the first result has its gradient added by the backward pass' kernel.

    Args:
        x: tokens.
        shift: float32.
        scale: of LayerNorm.
        bias: of LayerNorm.
        interpret: whether to run the kernels without a GPU.
        tilings: how the kernels are cut.
    """
    return _shift_layer_norm((x, shift, scale, bias), interpret, tilings)[0]


def _shift_layer_norm_forward(*args: Any) -> Any:
    *primals, interpret, tilings = args
    return _shift_layer_norm(_values(primals), interpret, tilings)


def _shift_layer_norm(args: Any, interpret: bool, tilings: Tilings) -> Any:
    x, shift, scale, bias = args
    # The product that adds to x takes it as such a matrix. With no other reader of this shape XLA
    # would write the result over x, and copy x before for those who read it later.
    matrix = x.reshape(len(x), -1)
    _, y, mean, rstd = norm(
        flat(x), Added(None, shift, None), scale, bias, x.shape[1], tilings.norm, matrix,
        interpret=interpret,
    )  # fmt: skip
    return (x, y.reshape(x.shape)), (x, mean, rstd, shift, scale, bias)


def _shift_layer_norm_backward(interpret: bool, tilings: Tilings, kept: Any, given: Any) -> Any:
    x, mean, rstd, shift, scale, bias = kept
    dx, dy = _flat_gradients(given)
    grads = norm_grad(
        dx, dy, flat(x), mean, rstd, scale, shift, None, x.shape[1], True,
        tilings.norm_grad, interpret=interpret,
    )  # fmt: skip
    dscale, dbias = grads.sums[0].astype(scale.dtype), grads.sums[1].astype(bias.dtype)
    return grads.x.reshape(x.shape), grads.sums[2], dscale, dbias


shift_layer_norm.defvjp(_shift_layer_norm_forward, _shift_layer_norm_backward, symbolic_zeros=True)


def _values(primals: Any) -> Any:
    """Returns arguments without what JAX says of each: whether its gradient is wanted."""
    return jax.tree.map(operator.attrgetter("value"), primals)


def _flat_gradients(given: Any) -> tuple[Any, Any]:
    """Returns gradients by tokens and by their LayerNorm as matrices.

    The first is None if nobody uses those tokens, as after the last block.
    """
    dx, dy = given
    if isinstance(dy, SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)
    return None if isinstance(dx, SymbolicZero) else flat(dx), flat(dy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def dense_gelu(
    y: Float[Array, "s n c"],
    kernel: Float[Array, "w d"],
    bias: Float[Array, " d"],
    contract_axis: Axis,
    gelu: Gelu = "tanh",
    interpret: bool = False,
    tilings: Tilings = TILINGS,
) -> Float[Array, "_ _ d"]:
    """Returns GELU of a dense layer: (s, n, d) of channels, (n, c, d) of tokens.

    Args:
        y: normalized tokens.
        kernel: of the layer, which is computed in the type of `y`.
        bias: of the layer.
        contract_axis: "first" mixes tokens, "last" channels.
        gelu: "tanh" or "exact".
        interpret: whether to run the kernels without a GPU.
        tilings: how the kernels are cut.
    """
    return _dense_gelu_forward(y, kernel, bias, contract_axis, gelu, interpret, tilings)[0]


def _dense_gelu_forward(
    y: Any, kernel: Any, bias: Any, contract_axis: Axis, gelu: Gelu, *_: Any
) -> Any:
    # XLA makes the middle lines one call of cuBLASLt, whose epilogue adds the bias and takes the
    # GELU; all are matrices, for it does not see through reshapes.
    first = contract_axis == "first"
    matrix = y.reshape(y.shape[0], -1) if first else flat(y)
    hidden = lax.dot_general(
        matrix, kernel.astype(y.dtype), (((0 if first else 1,), (0,)), ((), ()))
    )
    hidden = hidden + bias.astype(y.dtype)[None, :]
    activations = jax.nn.gelu(hidden, approximate=gelu == "tanh")
    shape = y.shape[1:] if first else y.shape[:2]
    return activations.reshape(*shape, -1), (y, kernel, bias, hidden)


def _dense_gelu_backward(
    contract_axis: Axis, gelu: Gelu, interpret: bool, tilings: Tilings, kept: Any, da: Any
) -> Any:
    y, kernel, bias, hidden = kept
    dhidden, dbias = gelu_grad(flat(da), hidden, gelu, tilings.gelu_grad, interpret=interpret)
    dhidden = dhidden.reshape(da.shape)
    weights = kernel.astype(y.dtype)
    if contract_axis == "first":
        dkernel = lax.dot_general(y, dhidden, (((1, 2), (0, 1)), ((), ())))
        dy = lax.dot_general(weights, dhidden, (((1,), (2,)), ((), ())))
    else:
        dkernel = lax.dot_general(y, dhidden, (((0, 1), (0, 1)), ((), ())))
        dy = lax.dot_general(dhidden, weights, (((2,), (1,)), ((), ())))
    return dy, dkernel.astype(kernel.dtype), dbias.astype(bias.dtype)


dense_gelu.defvjp(_dense_gelu_forward, _dense_gelu_backward)


def flat(x: Float[Array, "a b c"]) -> Float[Array, "a*b c"]:
    """Returns an array as a matrix, its last axis that of the columns."""
    return x.reshape(-1, x.shape[-1])
