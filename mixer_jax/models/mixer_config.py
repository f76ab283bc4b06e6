"""Architecture of the paper's models: dimensions and variants. Does not import JAX."""

import dataclasses

from mixer_jax.models.family import ImageSize, architecture_key


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

# Custom kernels that compute a block; see `ModelFamily.block_backends`.
BLOCK_BACKENDS = {
    "triton": "mixer_jax.kernels.triton.mixer_block:TritonMixerBackend",
    "mosaic": "mixer_jax.kernels.mosaic.mixer_block:MosaicMixerBackend",
}


def num_tokens(config: MixerConfig, image_size: int | ImageSize) -> int:
    """Returns the number of tokens, S, of a square image or one of (height, width)."""
    height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
    return (height // config.patch_size) * (width // config.patch_size)
