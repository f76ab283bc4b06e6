"""Architecture of Vision Transformers: dimensions and variants. Does not import JAX."""

import dataclasses
from typing import Literal

from mixer_jax.errors import UserError
from mixer_jax.models.family import ImageSize, architecture_key


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Dimensions and choices of a Vision Transformer.

    Attributes:
        num_blocks: Number of encoder blocks, N.
        patch_size: Side of a square patch in pixels, P.
        hidden_dim: Channels per token, D.
        mlp_dim: Hidden units of the MLPs, M.
        num_heads: Attention heads, H, each of width D/H.
        pooling: Features of an image: "token", those of an additional class token; "gap", the mean
            of all tokens; "map", those of a learned query that attends to all tokens.
        pos_embedding: "learned", or "sincos2d", sines and cosines of each patch's position.
        pre_logits: Whether a dense layer with tanh precedes the head.

    Raises:
        UserError: num_heads does not divide hidden_dim, or sincos2d does not fit in hidden_dim.
    """

    num_blocks: int = architecture_key("number of blocks")
    patch_size: int = architecture_key("side of a square patch", unit="px")
    hidden_dim: int = architecture_key("channels per token")
    mlp_dim: int = architecture_key("hidden units of the MLPs")
    num_heads: int = architecture_key("attention heads")
    pooling: Literal["token", "gap", "map"] = architecture_key(
        "features: class token, mean of tokens (gap), attention with a learned query (map)",
        default="token",
    )
    pos_embedding: Literal["learned", "sincos2d"] = architecture_key(
        "position embedding: parameters, or fixed sines and cosines", default="learned"
    )
    pre_logits: bool = architecture_key(
        "dense layer with tanh between features and head", default=False
    )

    def __post_init__(self) -> None:
        """Checks the sizes that depend on each other."""
        if self.hidden_dim % self.num_heads:
            divisors = [n for n in range(1, self.hidden_dim + 1) if self.hidden_dim % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.num_heads))
            raise UserError(
                f"model.num_heads must divide model.hidden_dim ({self.hidden_dim}), got "
                f"{self.num_heads}. The nearest divisor is {nearest}."
            )
        if self.pos_embedding == "sincos2d" and self.hidden_dim % 4:
            raise UserError(
                "model.hidden_dim must be a multiple of 4 for model.pos_embedding='sincos2d', got "
                f"{self.hidden_dim}. Use pos_embedding='learned' or another width."
            )

    @property
    def has_class_token(self) -> bool:
        """True if the first token is a class token, not a patch."""
        return self.pooling == "token"


# ViT, Table 1 (B, L, H); AugReg, Table 2 (Ti, S); Scaling Vision Transformers, Table 2 (g, G).
VARIANTS: dict[str, VitConfig] = {
    "Ti/16": VitConfig(12, 16, 192, 768, 3),
    "S/32": VitConfig(12, 32, 384, 1536, 6),
    "S/16": VitConfig(12, 16, 384, 1536, 6),
    "B/32": VitConfig(12, 32, 768, 3072, 12),
    "B/16": VitConfig(12, 16, 768, 3072, 12),
    "B/8": VitConfig(12, 8, 768, 3072, 12),
    "L/32": VitConfig(24, 32, 1024, 4096, 16),
    "L/16": VitConfig(24, 16, 1024, 4096, 16),
    "H/14": VitConfig(32, 14, 1280, 5120, 16),
    "g/14": VitConfig(40, 14, 1408, 6144, 16),
    "G/14": VitConfig(48, 14, 1664, 8192, 16),
}


def grid_shape(config: VitConfig, image_size: int | ImageSize) -> tuple[int, int]:
    """Returns the rows and columns of patches of a square image or one of (height, width)."""
    height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
    return height // config.patch_size, width // config.patch_size


def num_tokens(config: VitConfig, image_size: int | ImageSize) -> int:
    """Returns the number of tokens of an image, T, with the class token."""
    rows, columns = grid_shape(config, image_size)
    return rows * columns + config.has_class_token
