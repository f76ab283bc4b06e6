"""Baseline in JAX: the same ViT in straightforward Flax, without any optimization."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mixer_jax.models.vit_config import VitConfig


class _Mlp(nn.Module):
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = nn.gelu(nn.Dense(self.width, dtype=self.dtype)(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype)(hidden)


class _Block(nn.Module):
    config: VitConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = nn.LayerNorm(dtype=self.dtype)(x)
        attention = nn.MultiHeadDotProductAttention(
            self.config.num_heads, dtype=self.dtype, force_fp32_for_softmax=True, name="attention"
        )
        x = x + attention(y, y)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        return x + _Mlp(self.config.mlp_dim, self.dtype, name="mlp")(y)


class Reference(nn.Module):
    """ViT with a class token, Flax's own attention, unrolled blocks and separate parameters.

    Computes the function of `VisionTransformer` in its default form: pooling by the class token,
    learned position embedding, no hidden layer before the head. The parameters are the same, too,
    except that those of the blocks are not stacked but separate, as "block_0", "block_1", ….
    """

    config: VitConfig
    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n classes"]:
        """Computes float32 logits from images in [-1, 1]."""
        config, zeros = self.config, nn.initializers.zeros
        patch = (config.patch_size, config.patch_size)
        x = nn.Conv(config.hidden_dim, patch, patch, "VALID", dtype=self.dtype, name="stem")(images)
        x = x.reshape(x.shape[0], -1, config.hidden_dim)
        cls = self.param("cls", zeros, (1, 1, config.hidden_dim))
        cls = jnp.tile(cls.astype(self.dtype), (x.shape[0], 1, 1))
        x = jnp.concatenate([cls, x], axis=1)
        shape = (1, x.shape[1], config.hidden_dim)
        embedding = self.param("pos_embedding", nn.initializers.normal(0.02), shape)
        x = x + embedding.astype(self.dtype)
        for index in range(config.num_blocks):
            x = _Block(config, self.dtype, name=f"block_{index}")(x)
        x = nn.LayerNorm(dtype=self.dtype, name="encoder_norm")(x)[:, 0]
        return nn.Dense(self.num_classes, kernel_init=zeros, name="head")(x)
