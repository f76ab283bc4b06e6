"""A block by hand-written kernels, from the parameters of `MixerBlock`, for GPUs and for TPUs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
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
        bias: of that product; None stands for zeros.
        keep: which images keep the branch.
    """

    x: Float[Array, "s n c"]
    branch: Float[Array, "s n c"]
    bias: Float[Array, " c"] | None
    keep: Keep

    def normalize(
        self, params: Mapping[str, Any], interpret: bool
    ) -> tuple["Pending", Float[Array, "s n c"]]:
        """Returns the tokens with their branch, and LayerNorm of them.

        Args:
            params: of the LayerNorm.
            interpret: whether to run the kernel without a GPU.
        """
        from mixer_jax.model.gpu_kernels import add_layer_norm

        x, y = add_layer_norm(*self, params["scale"], params["bias"], interpret)
        return self._replace(x=x), y

    def add(
        self, branch: Float[Array, "_ _"], bias: Float[Array, " c"] | None, keep: Keep
    ) -> "Pending":
        """Returns the tokens with another branch to add; the arguments are its attributes."""
        return Pending(self.x, branch.reshape(self.x.shape), bias, keep)

    def named(self, name: str) -> "Pending":
        """Returns the tokens with a name for what the backward pass may keep."""
        return self._replace(branch=checkpoint_name(self.branch, name))


class Summed(NamedTuple):
    """Tokens of a GPU's block, all of whose branches are added but for their biases.

    The last product of a branch adds its result to the tokens itself; the kernel of LayerNorm adds
    the biases.

    Attributes:
        x: tokens, (s, n, c).
        shift: sum of the biases so far, float32.
    """

    x: Float[Array, "s n c"]
    shift: Float[Array, " c"]

    def normalize(
        self, params: Mapping[str, Any], interpret: bool
    ) -> tuple["Summed", Float[Array, "s n c"]]:
        """Returns the tokens, and LayerNorm of them; the arguments are those of `Pending`."""
        from mixer_jax.model.gpu_kernels import shift_layer_norm

        x, y = shift_layer_norm(*self, params["scale"], params["bias"], interpret)
        return self._replace(x=x), y

    def add(
        self, branch: Float[Array, "_ _"], bias: Float[Array, " c"] | None, keep: Keep
    ) -> "Summed":
        """Returns the tokens with another branch, which all images keep."""
        # As a matrix of the product's shape: XLA makes the sum a part of the product.
        x = (self.x.reshape(branch.shape) + branch).reshape(self.x.shape)
        return Summed(x, self.shift if bias is None else self.shift + bias)

    def named(self, name: str) -> "Summed":
        """Returns the tokens with a name for what the backward pass may keep."""
        return self._replace(x=checkpoint_name(self.x, name))


def gpu_tokens(x: Float[Array, "s n c"], drops: bool) -> Pending | Summed:
    """Returns the stem's tokens as a GPU's first block takes them.

    Args:
        x: tokens.
        drops: whether images drop branches.
    """
    _, n, c = x.shape
    if drops:
        return Pending(x, jnp.zeros_like(x), jnp.zeros(c), jnp.ones(n, x.dtype))
    return Summed(x, jnp.zeros(c))


def gpu_block(
    params: Mapping[str, Any],
    tokens: Pending | Summed,
    keep: tuple[Keep, Keep],
    gelu: Gelu,
    interpret: bool,
) -> Pending | Summed:
    """Returns the tokens after a block: products by XLA, what lies between them by kernels.

    The last bias of token mixing is left out: it adds one number to all channels of a token, which
    every LayerNorm takes away, so that nothing depends on it and its gradient is zero.

    Args:
        params: of the block.
        tokens: before it.
        keep: of token mixing and of channel mixing.
        gelu: which.
        interpret: whether to run the kernels without a GPU.
    """
    from mixer_jax.model.gpu_kernels import dense_gelu, flat

    (kernel, bias), (kernel_out, _) = _dense_pair(params["token_mixing"])
    tokens, y = tokens.normalize(params["LayerNorm_0"], interpret)
    hidden = flat(dense_gelu(y, kernel, bias, "first", gelu, interpret))
    # Of 196 tokens a row of 16-bit numbers would not be a multiple of 16 bytes, as fast products
    # want it, here and in the backward pass.
    kernel_out = with_layout_constraint(kernel_out.astype(y.dtype).T, Layout((0, 1)))
    branch = lax.dot_general(kernel_out, hidden, (((1,), (1,)), ((), ())))
    tokens = tokens.add(branch, None, keep[0]).named("mlp_output")
    tokens, y = tokens.normalize(params["LayerNorm_1"], interpret)
    (kernel, bias), (kernel_out, bias_out) = _dense_pair(params["channel_mixing"])
    hidden = flat(dense_gelu(y, kernel, bias, "last", gelu, interpret))
    return tokens.add(hidden @ kernel_out.astype(y.dtype), bias_out, keep[1])


def gpu_norm(
    params: Mapping[str, Any], tokens: Pending | Summed, interpret: bool
) -> Float[Array, "s n c"]:
    """Returns LayerNorm of the tokens after the last block.

    Args:
        params: of the LayerNorm.
        tokens: after the last block.
        interpret: whether to run the kernel without a GPU.
    """
    return tokens.normalize(params, interpret)[1]


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
            f"model.backend=mosaic: MLPs of {tokens} tokens and {widths.hidden_dim} channels do "
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
