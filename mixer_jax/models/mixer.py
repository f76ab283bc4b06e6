"""MLP-Mixer (Section 2 of arXiv 2105.01601): patches, then blocks that mix tokens and channels."""

import functools
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixer_jax.models.execution import Execution
from mixer_jax.models.family import check_image_size
from mixer_jax.models.layers import (
    MLP_OUTPUT,
    Context,
    DropPathMask,
    Gelu,
    LayerNorm,
    MlpBlock,
    PatchEmbed,
    add_branch,
    classifier_head,
    map_over_vectors,
)
from mixer_jax.models.mixer_config import BLOCK_BACKENDS, MixerConfig
from mixer_jax.models.stack import block_stack, make_context


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing, each after LayerNorm and with a skip connection.

    Stochastic depth drops each branch with a separate mask; branches that are kept are not rescaled
    (the authors' code).
    """

    num_branches: ClassVar[int] = 2

    config: MixerConfig
    gelu: Gelu = "tanh"
    dropout: float = 0.0
    ctx: Context = Context()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n s c"],
        masks: tuple[DropPathMask, DropPathMask],
        example_index: Int[Array, " n"],
    ) -> Float[Array, "n s c"]:
        """Mixes tokens, then channels.

        Args:
            x: Tokens of a batch of images.
            masks: Drop-path masks of token mixing and of channel mixing.
            example_index: Index of each image in the global batch; seeds dropout.
        """
        config, (token_mask, channel_mask) = self.config, masks
        apply_mlp = functools.partial(
            map_over_vectors, MlpBlock, ctx=self.ctx, gelu=self.gelu, dropout=self.dropout
        )
        # One MLP, shared by all channels, sees each column of the table (s, c) ...
        y = LayerNorm()(x)
        y = apply_mlp(
            y, example_index, over="channels", mlp_dim=config.tokens_mlp_dim, name="token_mixing"
        )
        self.sow("intermediates", "token_mixing_output", y)
        x = add_branch(x, y, token_mask, self.ctx.dtype, save_as=MLP_OUTPUT)
        # ... and one, shared by all tokens, sees each row.
        y = LayerNorm()(x)
        y = apply_mlp(
            y, example_index, over="tokens", mlp_dim=config.channels_mlp_dim, name="channel_mixing"
        )
        self.sow("intermediates", "channel_mixing_output", y)
        return add_branch(x, y, channel_mask, self.ctx.dtype)


class MlpMixer(nn.Module):
    """The whole model: patch embedding, blocks, LayerNorm, mean over tokens, linear head.

    Training with dropout or stochastic depth needs the random stream of that name:
    `model.apply(variables, images, train=True, rngs={"dropout": key, "stochastic_depth": key})`.

    Attributes:
        config: Dimensions (Table 1).
        num_classes: Outputs of the head; 0 returns features.
        gelu: "tanh" as in the authors' code, "exact" as in timm.
        stochastic_depth: Drop probability p of the last block; block i has p·i/(N−1).
        dropout: Dropout rate after each dense layer of the MLPs.
        head_bias: Initial value of the head's bias.
        execution: Execution settings, which do not change what the model computes.
    """

    family: ClassVar[str] = "mixer"
    block_backends: ClassVar[dict[str, str]] = BLOCK_BACKENDS

    config: MixerConfig
    num_classes: int
    gelu: Gelu = "tanh"
    stochastic_depth: float = 0.0
    dropout: float = 0.0
    head_bias: float = 0.0
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "n h w 3"],
        train: bool = False,
        example_index: Int[Array, " n"] | None = None,
    ) -> Float[Array, "n outputs"]:
        """Computes float32 logits, or features of `hidden_dim` channels if `num_classes` is 0.

        Args:
            images: Pixels in [-1, 1]; height and width must be multiples of the patch size.
            train: Whether dropout and stochastic depth are active.
            example_index: Index of each image in the global batch; seeds its dropout and
                drop-path masks. None: 0 to n − 1.
        """
        config = self.config
        check_image_size(images.shape[1], images.shape[2], config.patch_size)
        example_index = jnp.arange(images.shape[0]) if example_index is None else example_index
        ctx = make_context(self, train)
        x = PatchEmbed(config.hidden_dim, config.patch_size, ctx, name="stem")(images)
        self.sow("intermediates", "stem_output", x)
        block = MixerBlock(config, self.gelu, self.dropout, ctx, parent=None)
        # N blocks, then LayerNorm.
        x = block_stack(self, block, x, example_index, norm_name="pre_head_layer_norm")
        x = jnp.mean(x, axis=1, dtype=jnp.float32)
        for name in ("pooled", "pre_logits"):
            self.sow("intermediates", name, x)
        return classifier_head(self.num_classes, self.head_bias)(x) if self.num_classes else x
