"""Baseline in JAX: the same Mixer in straightforward Flax, without any optimization."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mixer_jax.models.mixer_config import MixerConfig


class _Mlp(nn.Module):
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = nn.gelu(nn.Dense(self.width, dtype=self.dtype)(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype)(hidden)


class _Block(nn.Module):
    config: MixerConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = jnp.swapaxes(nn.LayerNorm(dtype=self.dtype)(x), 1, 2)
        y = _Mlp(self.config.tokens_mlp_dim, self.dtype, name="token_mixing")(y)
        x = x + jnp.swapaxes(y, 1, 2)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        return x + _Mlp(self.config.channels_mlp_dim, self.dtype, name="channel_mixing")(y)


class Reference(nn.Module):
    """Mixer with swapped axes, unrolled blocks and separate parameters per block.

    Computes the function of `MlpMixer`. The parameters are the same, too, except that those of the
    blocks are not stacked but separate, as "block_0", "block_1", ….
    """

    config: MixerConfig
    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        """Computes float32 logits from images in [-1, 1]."""
        config = self.config
        patch = (config.patch_size, config.patch_size)
        x = nn.Conv(config.hidden_dim, patch, patch, "VALID", dtype=self.dtype, name="stem")(images)
        x = x.reshape(x.shape[0], -1, config.hidden_dim)
        for index in range(config.num_blocks):
            x = _Block(config, self.dtype, name=f"block_{index}")(x)
        x = nn.LayerNorm(dtype=self.dtype, name="pre_head_layer_norm")(x)
        x = jnp.mean(x, axis=1)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, name="head")(x)
