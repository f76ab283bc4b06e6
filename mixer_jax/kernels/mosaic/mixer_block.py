"""Block backend of Mixer for TPUs: each branch is one kernel."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mixer_jax.errors import UserError
from mixer_jax.kernels.mosaic.block_sizes import BlockSizes, choose_block_sizes
from mixer_jax.kernels.mosaic.ops import BranchParams, channel_mixing, token_mixing
from mixer_jax.models.layers import DropPathMask, layer_norm

# Device whose limits the interpreter assumes.
_INTERPRETED_DEVICE_KIND = "TPU v5e"


class MosaicMixerBackend:
    """Computes Mixer blocks.

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
        sizes, settings = self.block_sizes, (self.gelu, self.interpret)
        mask_0, mask_1 = (jnp.ones(len(carry), carry.dtype) if m is None else m for m in masks)
        token_params = _branch_params(params, 0, "token_mixing")
        channel_params = _branch_params(params, 1, "channel_mixing")
        x = token_mixing(carry, mask_0, token_params, sizes.token_mixing, *settings)
        return channel_mixing(x, mask_1, channel_params, sizes.channel_mixing, *settings)

    def end(
        self, norm_params: Mapping[str, Any], carry: Float[Array, "n s c"]
    ) -> Float[Array, "n s c"]:
        """Applies the final LayerNorm."""
        return layer_norm(carry, norm_params["scale"], norm_params["bias"])


def select_block_sizes(model: Any, num_tokens: int) -> BlockSizes:
    """Returns the block sizes of a model's kernels on the device it is compiled for.

    Args:
        model: An `MlpMixer`.
        num_tokens: Tokens per image.

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


def _branch_params(params: Mapping[str, Any], index: int, name: str) -> BranchParams:
    norm, dense_0, dense_1 = (
        params[f"LayerNorm_{index}"],
        params[name]["Dense_0"],
        params[name]["Dense_1"],
    )
    return BranchParams(
        norm["scale"],
        norm["bias"],
        dense_0["kernel"],
        dense_0["bias"],
        dense_1["kernel"],
        dense_1["bias"],
    )
