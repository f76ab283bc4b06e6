"""Architecture of the paper's models: dimensions, parameter counts, FLOPs. Does not import JAX."""

import dataclasses

from mixer_jax.errors import UserError
from mixer_jax.models.family import ImageSize, Shape, architecture_key, resolve_config


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """Dimensions of a Mixer (Table 1 of the paper).

    Attributes:
        num_blocks: Number of Mixer blocks, N.
        patch_size: Side of a square patch in pixels, P.
        hidden_dim: Channels per token, C.
        tokens_mlp_dim: Hidden units of the token-mixing MLP, D_S.
        channels_mlp_dim: Hidden units of the channel-mixing MLP, D_C.
    """

    num_blocks: int = architecture_key("number of blocks")
    patch_size: int = architecture_key("side of a square patch", unit="px")
    hidden_dim: int = architecture_key("channels per token")
    tokens_mlp_dim: int = architecture_key("hidden units of the token-mixing MLPs")
    channels_mlp_dim: int = architecture_key("hidden units of the channel-mixing MLPs")


# Table 1 of the paper.
VARIANTS: dict[str, MixerConfig] = {
    "S/32": MixerConfig(8, 32, 512, 256, 2048),
    "S/16": MixerConfig(8, 16, 512, 256, 2048),
    "B/32": MixerConfig(12, 32, 768, 384, 3072),
    "B/16": MixerConfig(12, 16, 768, 384, 3072),
    "L/32": MixerConfig(24, 32, 1024, 512, 4096),
    "L/16": MixerConfig(24, 16, 1024, 512, 4096),
    "H/14": MixerConfig(32, 14, 1280, 640, 5120),
}

# Custom kernels that compute a block, as "module:class"; see `ModelFamily.block_backends`.
BLOCK_BACKENDS = {
    "triton": "mixer_jax.kernels.triton.mixer_block:TritonMixerBackend",
    "mosaic": "mixer_jax.kernels.mosaic.mixer_block:MosaicMixerBackend",
}


def get_config(variant: str, **overrides: int) -> MixerConfig:
    """Returns a variant's config with overrides applied.

    Args:
        variant: A name in `VARIANTS`, or "custom", which needs all five dimensions.
        **overrides: Fields of `MixerConfig`; 0 keeps the variant's own value.

    Raises:
        UserError: The variant is unknown, a dimension is negative, or one is missing.
    """
    config = resolve_config(MixerConfig, VARIANTS, variant, **overrides)
    assert isinstance(config, MixerConfig)
    return config


def check_image_size(height: int, width: int, patch_size: int) -> None:
    """Raises UserError, naming the nearest valid sizes, unless whole patches cover the image."""
    for size in (height, width):
        if size < patch_size or size % patch_size:
            below = max(size // patch_size, 1) * patch_size
            raise UserError(
                f"image_size must be a multiple of patch_size ({patch_size}), got {size}. "
                f"The nearest valid sizes are {below} and {below + patch_size}."
            )


def num_tokens(config: MixerConfig, image_size: int | ImageSize) -> int:
    """Returns the number of tokens, S.

    Args:
        config: Architecture config.
        image_size: Height and width in pixels, or the side of a square image.
    """
    height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
    return (height // config.patch_size) * (width // config.patch_size)


def num_params(config: MixerConfig, image_size: int | ImageSize, num_classes: int) -> int:
    """Returns the number of parameters; `num_classes` 0 means no head."""
    tokens, channels = num_tokens(config, image_size), config.hidden_dim
    stem = (3 * config.patch_size**2 + 1) * channels
    token_mixing = (2 * tokens + 1) * config.tokens_mlp_dim + tokens
    channel_mixing = (2 * channels + 1) * config.channels_mlp_dim + channels
    blocks = config.num_blocks * (4 * channels + token_mixing + channel_mixing)
    return stem + blocks + 2 * channels + (channels + 1) * num_classes


def param_shapes(config: MixerConfig, num_tokens: int, num_classes: int) -> dict[str, Shape]:
    """Returns the shape of each parameter by its slash-separated path.

    Args:
        config: Architecture config.
        num_tokens: Number of tokens, S.
        num_classes: Outputs of the head; 0 means no head.
    """
    blocks, patch, channels = config.num_blocks, config.patch_size, config.hidden_dim
    shapes: dict[str, Shape] = {
        "stem/kernel": (patch, patch, 3, channels),
        "stem/bias": (channels,),
    }
    mlps = {
        "token_mixing": (num_tokens, config.tokens_mlp_dim),
        "channel_mixing": (channels, config.channels_mlp_dim),
    }
    for index, (name, (outer, inner)) in enumerate(mlps.items()):
        shapes |= {
            f"blocks/LayerNorm_{index}/scale": (blocks, channels),
            f"blocks/LayerNorm_{index}/bias": (blocks, channels),
            f"blocks/{name}/Dense_0/kernel": (blocks, outer, inner),
            f"blocks/{name}/Dense_0/bias": (blocks, inner),
            f"blocks/{name}/Dense_1/kernel": (blocks, inner, outer),
            f"blocks/{name}/Dense_1/bias": (blocks, outer),
        }
    shapes |= {
        "pre_head_layer_norm/scale": (channels,),
        "pre_head_layer_norm/bias": (channels,),
    }
    if num_classes:
        shapes |= {"head/kernel": (channels, num_classes), "head/bias": (num_classes,)}
    return shapes


def forward_flops(config: MixerConfig, image_size: int | ImageSize, num_classes: int) -> int:
    """Returns the FLOPs of one image's forward pass, counting matmuls only.

    A multiply-add is two FLOPs. A training step costs three forward passes.
    """
    tokens, channels = num_tokens(config, image_size), config.hidden_dim
    stem = tokens * 3 * config.patch_size**2 * channels
    token_mixing = 2 * tokens * config.tokens_mlp_dim * channels
    channel_mixing = 2 * tokens * config.channels_mlp_dim * channels
    blocks = config.num_blocks * (token_mixing + channel_mixing)
    return 2 * (stem + blocks + channels * num_classes)
