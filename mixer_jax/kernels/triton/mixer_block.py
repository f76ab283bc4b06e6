"""Block backend of Mixer for GPUs: matmuls by XLA, all between them by custom kernels."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from mixer_jax.kernels.triton.ops import add_layer_norm, as_matrix, bias_layer_norm, dense_gelu
from mixer_jax.models.layers import MLP_OUTPUT, DropPathMask


class DeferredBranch(NamedTuple):
    """Residual stream whose last branch is added by the next LayerNorm kernel.

    Attributes:
        x: Tokens before that branch, (s, n, c).
        branch: Output of an MLP's last matmul.
        bias: Bias of that matmul; None means zeros.
        mask: Drop-path mask of the branch.
    """

    x: Float[Array, "s n c"]
    branch: Float[Array, "s n c"]
    bias: Float[Array, " c"] | None
    mask: DropPathMask

    def add_and_normalize(
        self, params: Mapping[str, Any], interpret: bool
    ) -> tuple["DeferredBranch", Float[Array, "s n c"]]:
        """Adds the branch, and applies LayerNorm with parameters `params`."""
        x, y = add_layer_norm(*self, params["scale"], params["bias"], interpret)
        return self._replace(x=x), y

    def add_branch(
        self, branch: Float[Array, "_ _"], bias: Float[Array, " c"] | None, mask: DropPathMask
    ) -> "DeferredBranch":
        """Defers the addition of another branch."""
        return DeferredBranch(self.x, branch.reshape(self.x.shape), bias, mask)

    def with_checkpoint_name(self, name: str) -> "DeferredBranch":
        """Names the last branch for rematerialization policies."""
        return self._replace(branch=checkpoint_name(self.branch, name))


class DeferredBias(NamedTuple):
    """Residual stream with branch biases still to be added.

    A branch's last matmul adds its result to the stream itself; the LayerNorm kernel adds the
    biases.

    Attributes:
        x: Tokens, (s, n, c).
        bias_sum: Sum of the biases so far, float32.
    """

    x: Float[Array, "s n c"]
    bias_sum: Float[Array, " c"]

    def add_and_normalize(
        self, params: Mapping[str, Any], interpret: bool
    ) -> tuple["DeferredBias", Float[Array, "s n c"]]:
        """Applies LayerNorm with parameters `params` to the sum of tokens and biases."""
        x, y = bias_layer_norm(*self, params["scale"], params["bias"], interpret)
        return self._replace(x=x), y

    def add_branch(
        self, branch: Float[Array, "_ _"], bias: Float[Array, " c"] | None, mask: DropPathMask
    ) -> "DeferredBias":
        """Adds a branch, which all images keep, and defers its bias."""
        # As a matrix of the matmul's shape: XLA fuses the addition into the matmul.
        x = (self.x.reshape(branch.shape) + branch).reshape(self.x.shape)
        return DeferredBias(x, self.bias_sum if bias is None else self.bias_sum + bias)

    def with_checkpoint_name(self, name: str) -> "DeferredBias":
        """Names the stream for rematerialization policies."""
        return self._replace(x=checkpoint_name(self.x, name))


class TritonMixerBackend:
    """Computes Mixer blocks from token-major activations.

    Args:
        model: An `MlpMixer`.
        num_tokens: Tokens per image.
    """

    token_major: ClassVar[bool] = True

    def __init__(self, model: Any, num_tokens: int):
        del num_tokens
        self.gelu, self.interpret = model.gelu, model.execution.interpret

    def begin(
        self, tokens: Float[Array, "s n c"], drop_path: bool
    ) -> DeferredBranch | DeferredBias:
        """Returns the carry before the first block."""
        _, n, c = tokens.shape
        if drop_path:
            branch, bias, mask = jnp.zeros_like(tokens), jnp.zeros(c), jnp.ones(n, tokens.dtype)
            return DeferredBranch(tokens, branch, bias, mask)
        return DeferredBias(tokens, jnp.zeros(c))

    def block(
        self,
        params: Mapping[str, Any],
        carry: DeferredBranch | DeferredBias,
        masks: tuple[DropPathMask, DropPathMask],
    ) -> DeferredBranch | DeferredBias:
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

    def end(
        self, norm_params: Mapping[str, Any], carry: DeferredBranch | DeferredBias
    ) -> Float[Array, "n s c"]:
        """Applies the final LayerNorm."""
        y = carry.add_and_normalize(norm_params, self.interpret)[1]
        return jnp.swapaxes(y, 0, 1)


def _dense_pair(params: Mapping[str, Any]) -> list[tuple[Array, Array]]:
    return [(params[name]["kernel"], params[name]["bias"]) for name in ("Dense_0", "Dense_1")]
