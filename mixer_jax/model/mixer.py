"""MLP-Mixer: patches, then blocks that mix tokens and channels by turns (the paper's Section 2)."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key

from mixer_jax.model.variants import check_image_size, resolve_widths

Gelu = Literal["tanh", "exact"]
Remat = Literal["none", "dots", "mlp_hidden", "full"]

# What the backward pass keeps of a block beside the block's input.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "mlp_hidden": jax.checkpoint_policies.save_only_these_names("mlp_output"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class MlpBlock(nn.Module):
    """Dense, GELU, dense on the last axis, back to its own width.

    The block knows nothing of tokens or channels: `MixerBlock` maps it over one or the other.
    """

    mlp_dim: int
    gelu: Gelu = "tanh"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "n d"], places: Int[Array, " n"], train: bool
    ) -> Float[Array, "n d"]:
        """Returns the MLP's output, of the shape of its input.

        Args:
            x: one vector of each image.
            places: of the images in their batch, as `MlpMixer` takes them.
            train: whether dropout is active.
        """
        width = x.shape[-1]
        x = nn.Dense(self.mlp_dim, dtype=self.dtype)(x)
        x = nn.gelu(x, approximate=self.gelu == "tanh")
        x = self.drop(x, places, train)
        x = nn.Dense(width, dtype=self.dtype)(x)
        return self.drop(x, places, train)

    def drop(
        self, x: Float[Array, "n d"], places: Int[Array, " n"], train: bool
    ) -> Float[Array, "n d"]:
        """Sets a share of the numbers to zero, and scales the others up to keep the mean."""
        if not (train and self.dropout):
            return x
        kept = draw_masks(self.make_rng("dropout"), places, 1.0 - self.dropout, x.shape[1:])
        return jnp.where(kept, x / (1.0 - self.dropout), 0.0).astype(x.dtype)


def map_mlp(axis: int) -> type[MlpBlock]:
    """Returns MlpBlock mapped over `axis` of its input with one shared set of parameters."""
    return nn.vmap(
        MlpBlock,
        in_axes=(axis, None, None),
        out_axes=axis,
        variable_axes={"params": None},
        split_rngs={"params": False, "dropout": True},
    )


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing, each after LayerNorm and with a skip connection."""

    tokens_mlp_dim: int
    channels_mlp_dim: int
    gelu: Gelu = "tanh"
    dropout: float = 0.0
    stochastic_depth: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n s c"],
        drop_rate: Float[Array, ""],
        places: Int[Array, " n"],
        train: bool,
    ) -> tuple[Float[Array, "n s c"], None]:
        """Returns the mixed tokens and, for `nn.scan`, no per-block output.

        Args:
            x: tokens of a batch of images.
            drop_rate: probability of skipping each of the two branches for an image.
            places: of the images in their batch, as `MlpMixer` takes them.
            train: whether dropout and stochastic depth are active.
        """
        mlp = {"gelu": self.gelu, "dropout": self.dropout, "dtype": self.dtype}
        y = nn.LayerNorm(dtype=self.dtype)(x)
        over_channels = map_mlp(axis=2)
        y = over_channels(self.tokens_mlp_dim, name="token_mixing", **mlp)(y, places, train)
        y = checkpoint_name(y, "mlp_output")
        x = x + self.keep_mask(x, drop_rate, places, train) * y
        y = nn.LayerNorm(dtype=self.dtype)(x)
        over_tokens = map_mlp(axis=1)
        y = over_tokens(self.channels_mlp_dim, name="channel_mixing", **mlp)(y, places, train)
        return x + self.keep_mask(x, drop_rate, places, train) * y, None

    def keep_mask(
        self,
        x: Float[Array, "n s c"],
        drop_rate: Float[Array, ""],
        places: Int[Array, " n"],
        train: bool,
    ) -> Float[Array, "n 1 1"] | float:
        """Draws which images keep a branch. Kept ones are not rescaled, as the authors did."""
        if not (train and self.stochastic_depth):
            return 1.0
        rng = self.make_rng("stochastic_depth")
        return draw_masks(rng, places, 1.0 - drop_rate, (1, 1)).astype(x.dtype)


def draw_masks(
    rng: Key[Array, ""], places: Int[Array, " n"], probability: Any, shape: tuple[int, ...]
) -> Bool[Array, "n ..."]:
    """Draws a mask for each image, from nothing but the key and the image's place in its batch.

    So masks are the same on any number of devices and in any number of pieces of the batch.

    Args:
        rng: common to the batch.
        places: of the images.
        probability: that an element is true.
        shape: of each image's mask.
    """

    def draw(place: Int[Array, ""]) -> Bool[Array, "..."]:
        return jax.random.bernoulli(jax.random.fold_in(rng, place), probability, shape)

    return jax.vmap(draw)(places)


class MlpMixer(nn.Module):
    """The whole model: stem, blocks, LayerNorm, mean over tokens, linear head.

    Parameters are float32 and the blocks' lie stacked under "blocks" on a leading axis of length
    `num_blocks`. Training with dropout or stochastic depth needs the random stream of that name:
    `model.apply(variables, images, train=True, rngs={"dropout": key, "stochastic_depth": key})`.

    Attributes:
        num_classes: outputs of the head; 0 returns features instead.
        gelu: "tanh" as the authors, "exact" as timm.
        stochastic_depth: drop probability p of the last block; block i has p·i/(N−1).
        dropout: after each dense layer of the MLPs.
        head_bias: initial value of the head's bias.
        dtype: of the computation; LayerNorm statistics and the head are float32 throughout.
        unroll: blocks laid out one after the other per iteration of the scan; 0 means all.
        remat: what the backward pass recomputes: "none"; "dots", all but matrix products;
            "mlp_hidden", the hidden activations of the MLPs; "full", whole blocks.
    """

    num_classes: int
    num_blocks: int
    patch_size: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    gelu: Gelu = "tanh"
    stochastic_depth: float = 0.0
    dropout: float = 0.0
    head_bias: float = 0.0
    dtype: Any = jnp.float32
    unroll: int = 0
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "n h w 3"],
        train: bool = False,
        places: Int[Array, " n"] | None = None,
    ) -> Float[Array, "n outputs"]:
        """Returns float32 logits, or features of `hidden_dim` channels if `num_classes` is 0.

        Args:
            images: pixels in [-1, 1].
            train: whether dropout and stochastic depth are active.
            places: of the images in the whole batch, where these are only a part of it: what is
                dropped of an image follows from its place; None: 0 to n − 1.

        Raises:
            UserError: height or width is not a multiple of the patch size.
        """
        _, height, width, _ = images.shape
        check_image_size(height, width, self.patch_size)
        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(self.hidden_dim, patch, patch, "VALID", dtype=self.dtype, name="stem")(images)
        x = x.reshape(x.shape[0], -1, self.hidden_dim)
        places = jnp.arange(images.shape[0]) if places is None else places
        x, _ = self.make_blocks()(x, self.drop_rates(), places, train)
        x = nn.LayerNorm(dtype=self.dtype, name="pre_head_layer_norm")(x)
        x = jnp.mean(x, axis=1, dtype=jnp.float32)
        if self.num_classes == 0:
            return x
        bias_init = nn.initializers.constant(self.head_bias)
        zeros = nn.initializers.zeros
        return nn.Dense(self.num_classes, kernel_init=zeros, bias_init=bias_init, name="head")(x)

    def make_blocks(self) -> nn.Module:
        """Returns the stack of blocks as one module: a scan over stacked parameters."""
        block = MixerBlock
        if self.remat != "none":
            policy = REMAT_POLICIES[self.remat]
            # Inside a scan the compiler cannot undo the recomputation, so it needs no barrier.
            block = nn.remat(block, policy=policy, prevent_cse=False, static_argnums=(4,))
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True, "stochastic_depth": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=self.num_blocks,
            unroll=self.unroll or self.num_blocks,
        )
        return stack(
            self.tokens_mlp_dim,
            self.channels_mlp_dim,
            gelu=self.gelu,
            dropout=self.dropout,
            stochastic_depth=self.stochastic_depth > 0,
            dtype=self.dtype,
            name="blocks",
        )

    def drop_rates(self) -> Float[Array, " num_blocks"]:
        """Returns each block's drop probability, rising linearly from 0 to `stochastic_depth`."""
        return jnp.linspace(0.0, self.stochastic_depth, self.num_blocks, dtype=jnp.float32)


def create_model(variant: str, num_classes: int = 1000, **overrides: Any) -> MlpMixer:
    """Returns a Mixer by name, e.g. `create_model("B/16", num_classes=10)`.

    Args:
        variant: a name of `VARIANTS`, or "custom" with all five widths as overrides.
        num_classes: outputs of the head; 0 gives features.
        **overrides: any attribute of `MlpMixer`, the widths of `variants.Widths` among them.

    Raises:
        UserError: the variant is unknown or a custom width is missing.
    """
    names = ("num_blocks", "patch_size", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim")
    widths = resolve_widths(variant, **{k: overrides.pop(k) for k in names if k in overrides})
    return MlpMixer(num_classes=num_classes, **dataclasses.asdict(widths), **overrides)


def build_model(section: dict[str, Any], num_classes: int) -> MlpMixer:
    """Returns the model of a configuration's model section.

    Args:
        section: the keys under `model` in keys.py.
        num_classes: outputs of the head.
    """
    settings = dict(section)
    dtype = resolve_dtype(settings.pop("dtype"))
    return create_model(settings.pop("variant"), num_classes, dtype=dtype, **settings)


def cast_kernels(params: Any, dtype: Any) -> Any:
    """Returns parameters with the kernels in the type that `MlpMixer` casts them to itself.

    Before they are sent to other devices, that halves their bytes in bfloat16.

    Args:
        params: of an `MlpMixer`.
        dtype: of its computation.
    """

    def cast(path: Any, x: Array) -> Array:
        names = [key.key for key in path]
        return x.astype(dtype) if names[-1] == "kernel" and names[0] != "head" else x

    return jax.tree_util.tree_map_with_path(cast, params)


def resolve_dtype(name: str) -> Any:
    """Returns the type of that name; "auto" is bfloat16 on accelerators and float32 on the CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
