"""Baseline in JAX: the same Mixer in straightforward Flax, without any optimization."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class _Mlp(nn.Module):
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = nn.gelu(nn.Dense(self.width, dtype=self.dtype)(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype)(hidden)


class _Block(nn.Module):
    tokens_mlp_dim: int
    channels_mlp_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = jnp.swapaxes(nn.LayerNorm(dtype=self.dtype)(x), 1, 2)
        y = _Mlp(self.tokens_mlp_dim, self.dtype, name="token_mixing")(y)
        x = x + jnp.swapaxes(y, 1, 2)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        return x + _Mlp(self.channels_mlp_dim, self.dtype, name="channel_mixing")(y)


class ReferenceMixer(nn.Module):
    """Mixer with swapped axes, unrolled blocks and separate parameters per block.

    Computes the function of `MlpMixer`. The parameters are the same, too, except that those of the
    blocks are not stacked but separate, as "block_0", "block_1", ….
    """

    num_classes: int
    num_blocks: int
    patch_size: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        """Computes float32 logits from images in [-1, 1]."""
        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(self.hidden_dim, patch, patch, "VALID", dtype=self.dtype, name="stem")(images)
        x = x.reshape(x.shape[0], -1, self.hidden_dim)
        for index in range(self.num_blocks):
            name = f"block_{index}"
            x = _Block(self.tokens_mlp_dim, self.channels_mlp_dim, self.dtype, name=name)(x)
        x = nn.LayerNorm(dtype=self.dtype, name="pre_head_layer_norm")(x)
        x = jnp.mean(x, axis=1)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, name="head")(x)
