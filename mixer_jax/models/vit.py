"""Vision Transformer (Section 3.1 of arXiv 2010.11929): patches, then attention and MLPs.

Settings that the paper leaves open follow the code of its authors, as far as it is published, which
also has the attention pooling and the fixed position embedding.
"""

import functools
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mixer_jax.models.execution import Execution
from mixer_jax.models.family import check_image_size
from mixer_jax.models.layers import (
    ATTENTION,
    Context,
    DropPathMask,
    Gelu,
    LayerNorm,
    MlpBlock,
    PatchEmbed,
    add_branch,
    classifier_head,
    dot_product_attention,
    drop_tokens,
    map_over_vectors,
)
from mixer_jax.models.stack import block_stack, make_context
from mixer_jax.models.vit_config import VitConfig

# Initial values of the authors' code.
_XAVIER = nn.initializers.xavier_uniform()
apply_mlp = functools.partial(
    map_over_vectors,
    MlpBlock,
    over="tokens",
    kernel_init=_XAVIER,
    bias_init=nn.initializers.normal(1e-6),
    name="mlp",
)


def sincos2d(rows: int, columns: int, width: int) -> Float[Array, "1 s c"]:
    """Computes the fixed embedding of each patch's column x and row y, in raster order.

    Channels are sin(xω), cos(xω), sin(yω) and cos(yω), with width / 4 frequencies ω that fall
    geometrically from 1 to 1/10,000.
    """
    num = width // 4
    frequencies = 10_000.0 ** -(jnp.arange(num) / max(num - 1, 1))
    y, x = jnp.mgrid[:rows, :columns]
    angles = [jnp.outer(axis, frequencies) for axis in (x, y)]
    waves = [wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)]
    return jnp.concatenate(waves, axis=1)[None]


class MultiHeadAttention(nn.Module):
    """Multi-head attention (the paper's Appendix A), with biases."""

    num_heads: int
    ctx: Context = Context()

    @nn.compact
    def __call__(
        self, x: Float[Array, "n q c"], context: Float[Array, "n s c"]
    ) -> Float[Array, "n q c"]:
        """Lets each token of `x` attend to all tokens of `context`."""
        width, ctx = x.shape[-1], self.ctx
        # Initialized as matrices (c, c), over all heads.
        project = functools.partial(
            nn.DenseGeneral, dtype=ctx.dtype, kernel_init=_XAVIER, dot_general=ctx.dot_general
        )
        heads = (self.num_heads, width // self.num_heads)
        query, key, value = (
            checkpoint_name(project(heads, name=name)(y).astype(ctx.dtype), ATTENTION)
            for name, y in (("query", x), ("key", context), ("value", context))
        )
        y = dot_product_attention(query, key, value, ctx)
        return project(width, axis=(-2, -1), name="out")(y).astype(ctx.dtype)


class EncoderBlock(nn.Module):
    """Self-attention, then an MLP, each after LayerNorm and with a skip connection.

    Stochastic depth drops each branch with a separate mask; branches that are kept are not rescaled
    (as in Mixer).
    """

    num_branches: ClassVar[int] = 2

    config: VitConfig
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
        """Applies the block.

        Args:
            x: Tokens of a batch of images.
            masks: Drop-path masks of attention and of the MLP.
            example_index: Index of each image in the global batch; seeds dropout.
        """
        config, ctx, (attention_mask, mlp_mask) = self.config, self.ctx, masks
        y = LayerNorm()(x)
        y = MultiHeadAttention(config.num_heads, ctx, name="attention")(y, y)
        y = drop_tokens(self, y, self.dropout, example_index, ctx.train)
        self.sow("intermediates", "attention_output", y)
        x = add_branch(x, y, attention_mask, ctx.dtype, save_as=ATTENTION)
        y = LayerNorm()(x)
        mlp = functools.partial(apply_mlp, mlp_dim=config.mlp_dim, gelu=self.gelu, ctx=ctx)
        y = mlp(y, example_index, dropout=self.dropout)
        self.sow("intermediates", "mlp_output", y)
        return add_branch(x, y, mlp_mask, ctx.dtype)


class MapHead(nn.Module):
    """Attention pooling with one learned query, the probe, and an MLP (arXiv 2106.04560)."""

    config: VitConfig
    gelu: Gelu = "tanh"
    ctx: Context = Context()

    @nn.compact
    def __call__(
        self, x: Float[Array, "n s c"], example_index: Int[Array, " n"]
    ) -> Float[Array, "n c"]:
        """Pools the tokens of each image."""
        config, ctx = self.config, self.ctx
        probe = self.param("probe", _XAVIER, (1, 1, config.hidden_dim))
        probe = jnp.broadcast_to(probe.astype(ctx.dtype), (x.shape[0], 1, config.hidden_dim))
        x = MultiHeadAttention(config.num_heads, ctx, name="attention")(probe, x)
        y = LayerNorm()(x)
        y = apply_mlp(y, example_index, ctx=ctx, mlp_dim=config.mlp_dim, gelu=self.gelu)
        return add_branch(x, y, None, ctx.dtype)[:, 0]


class VisionTransformer(nn.Module):
    """The whole model: patch and position embedding, blocks, LayerNorm, pooling, linear head.

    Training with dropout or stochastic depth needs the random stream of that name:
    `model.apply(variables, images, train=True, rngs={"dropout": key, "stochastic_depth": key})`.

    Attributes:
        config: Dimensions and choices.
        num_classes: Outputs of the head; 0 returns features.
        gelu: "tanh" as in the authors' code, "exact" as in timm.
        stochastic_depth: Drop probability p of the last block; block i has p·i/(N−1).
        dropout: Dropout rate after the position embedding, after attention, and after each dense
            layer of the MLPs.
        head_bias: Initial value of the head's bias.
        execution: Execution settings, which do not change what the model computes.
    """

    family: ClassVar[str] = "vit"

    config: VitConfig
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
        n, height, width, _ = images.shape
        check_image_size(height, width, config.patch_size)
        grid = height // config.patch_size, width // config.patch_size
        example_index = jnp.arange(n) if example_index is None else example_index
        ctx = make_context(self, train)
        x = PatchEmbed(config.hidden_dim, config.patch_size, ctx, name="stem")(images)
        self.sow("intermediates", "stem_output", x)
        x = self.add_positions(x, grid, ctx)
        x = drop_tokens(self, x, self.dropout, example_index, train)
        block = EncoderBlock(config, self.gelu, self.dropout, ctx, parent=None)
        # N blocks, then LayerNorm.
        x = block_stack(self, block, x, example_index, norm_name="encoder_norm")
        if config.pooling == "map":
            x = MapHead(config, self.gelu, ctx, name="map_head")(x, example_index)
        elif config.pooling == "gap":
            x = jnp.mean(x, axis=1, dtype=jnp.float32)
        else:
            x = x[:, 0]
        x = x.astype(jnp.float32)
        self.sow("intermediates", "pooled", x)
        if config.pre_logits:
            x = jnp.tanh(nn.Dense(config.hidden_dim, name="pre_logits")(x))
        self.sow("intermediates", "pre_logits_output", x)
        return classifier_head(self.num_classes, self.head_bias)(x) if self.num_classes else x

    def add_positions(
        self, x: Float[Array, "n s c"], grid: tuple[int, int], ctx: Context
    ) -> Float[Array, "n t c"]:
        """Adds the position embedding, and the class token before all others.

        The class token has a learned embedding, but no fixed one.
        """
        n, _, width = x.shape
        is_fixed = self.config.pos_embedding == "sincos2d"
        if is_fixed:
            x = x + sincos2d(*grid, width).astype(ctx.dtype)
        if self.config.has_class_token:
            cls = self.param("cls", nn.initializers.zeros, (1, 1, width))
            x = jnp.concatenate([jnp.tile(cls.astype(ctx.dtype), (n, 1, 1)), x], axis=1)
        if not is_fixed:
            init = nn.initializers.normal(0.02)
            x = x + self.param("pos_embedding", init, (1, *x.shape[1:])).astype(ctx.dtype)
        return x
