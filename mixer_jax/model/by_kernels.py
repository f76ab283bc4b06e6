"""A block by hand-written kernels, from the parameters of `MixerBlock`, for GPUs and for TPUs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mixer_jax.errors import UserError
from mixer_jax.model.layers import Gelu
from mixer_jax.model.variants import Widths

# A number for each image: whether it keeps a branch. None: all do.
Keep = Float[Array, " n"] | None


class Pending(NamedTuple):
    """Tokens of a GPU's block, whose last branch the kernel of the next LayerNorm adds.

    Attributes:
        x: tokens before it, (s, n, c).
        branch: output of an MLP's last product.
        bias: of that product.
        keep: which images keep the branch.
    """

    x: Float[Array, "s n c"]
    branch: Float[Array, "s n c"]
    bias: Float[Array, " c"]
    keep: Keep


# Products want sides that are multiples of this; XLA copies what has others.
_SIDE = 8
# Share of an image's tokens that may be added so that there is nothing to copy.
_MOST_ADDED = 0.04


def more_tokens(tokens: int) -> int:
    """Returns how many tokens a GPU adds to an image's, to make products of a better size.

    Token mixing's kernels are zero for them, so that they change nothing.
    """
    added = -tokens % _SIDE
    return added if added <= _MOST_ADDED * tokens else 0


def pending(x: Float[Array, "s n c"], keep: Keep) -> Pending:
    """Returns the stem's tokens as the first block takes them, with a branch of zeros."""
    return Pending(x, jnp.zeros_like(x), jnp.zeros(x.shape[-1], x.dtype), keep)


def gpu_block(
    params: Mapping[str, Any],
    tokens: Pending,
    keep: tuple[Keep, Keep],
    gelu: Gelu,
    interpret: bool,
) -> Pending:
    """Returns the tokens after a block: products by XLA, what lies between them by kernels.

    Args:
        params: of the block.
        tokens: before it.
        keep: of token mixing and of channel mixing.
        gelu: which.
        interpret: whether to run the kernels without a GPU.
    """
    from mixer_jax.model.gpu_kernels import add_layer_norm, dense_gelu

    first, second = params["LayerNorm_0"], params["LayerNorm_1"]
    (kernel, bias), (kernel_out, bias_out) = _dense_pair(params["token_mixing"])
    added = (0, len(tokens.x) - len(kernel))
    kernel, bias_out = jnp.pad(kernel, (added, (0, 0))), jnp.pad(bias_out, added)
    kernel_out = jnp.pad(kernel_out, ((0, 0), added))
    x, y = add_layer_norm(*tokens, first["scale"], first["bias"], "last", interpret)
    hidden = dense_gelu(y, kernel, bias, "first", gelu, interpret)
    branch = lax.dot_general(kernel_out.astype(y.dtype), hidden, (((0,), (2,)), ((), ())))
    branch = checkpoint_name(branch, "mlp_output")
    norm = (second["scale"], second["bias"], "first", interpret)
    x, y = add_layer_norm(x, branch, bias_out, keep[0], *norm)
    (kernel, bias), (kernel_out, bias_out) = _dense_pair(params["channel_mixing"])
    hidden = dense_gelu(y, kernel, bias, "last", gelu, interpret)
    branch = lax.dot_general(hidden, kernel_out.astype(y.dtype), (((2,), (0,)), ((), ())))
    return Pending(x, branch, bias_out.astype(x.dtype), keep[1])


def gpu_norm(params: Mapping[str, Any], tokens: Pending, interpret: bool) -> Float[Array, "s n c"]:
    """Returns LayerNorm of the tokens after the last block.

    Args:
        params: of the LayerNorm.
        tokens: after the last block.
        interpret: whether to run the kernel without a GPU.
    """
    from mixer_jax.model.gpu_kernels import add_layer_norm

    return add_layer_norm(*tokens, params["scale"], params["bias"], "last", interpret)[1]


def tpu_sizes(tokens: int, widths: Widths, device_kind: str, itemsize: int, interpret: bool) -> Any:
    """Returns how the kernels of a TPU divide their work.

    Args:
        tokens: of an image.
        widths: of the model.
        device_kind: of the device, as JAX names it; empty: of this machine's.
        itemsize: bytes of a number of the computation.
        interpret: whether there is no TPU.

    Raises:
        UserError: the kernels do not fit on its chip.
    """
    from mixer_jax.model.tpu_kernel_sizes import choose_sizes

    kind = "TPU v5e" if interpret else device_kind or jax.devices()[0].device_kind
    shape = (tokens, widths.hidden_dim, widths.tokens_mlp_dim, widths.channels_mlp_dim)
    sizes = choose_sizes(*shape, kind, itemsize)
    if sizes is None:
        raise UserError(
            f"model.kernels=mosaic: MLPs of {tokens} tokens and {widths.hidden_dim} channels do "
            f"not fit on the chip of a {kind}; set xla"
        )
    return sizes


def tpu_block(
    params: Mapping[str, Any],
    x: Float[Array, "n s c"],
    keep: tuple[Keep, Keep],
    gelu: Gelu,
    sizes: Any,
    interpret: bool,
) -> Float[Array, "n s c"]:
    """Returns the tokens after a block: each branch is one kernel.

    Args:
        params: of the block.
        x: tokens before it.
        keep: of token mixing and of channel mixing.
        gelu: which.
        sizes: from `tpu_sizes`.
        interpret: whether to run the kernels without a TPU.
    """
    from mixer_jax.model.tpu_kernels import BranchParams, channel_mixing, token_mixing

    def branch(number: int, name: str) -> BranchParams:
        norm = params[f"LayerNorm_{number}"]
        (kernel, bias), (kernel_out, bias_out) = _dense_pair(params[name])
        return BranchParams(norm["scale"], norm["bias"], kernel, bias, kernel_out, bias_out)

    first, second = (jnp.ones(len(x), x.dtype) if k is None else k for k in keep)
    by_tokens, by_channels = branch(0, "token_mixing"), branch(1, "channel_mixing")
    x = token_mixing(x, first, by_tokens, sizes.token_mixing, gelu, interpret)
    return channel_mixing(x, second, by_channels, sizes.channel_mixing, gelu, interpret)


def _dense_pair(params: Mapping[str, Any]) -> list[tuple[Array, Array]]:
    return [(params[name]["kernel"], params[name]["bias"]) for name in ("Dense_0", "Dense_1")]
