"""The paper's models as plain numbers: widths, parameter counts, FLOPs. Imports nothing heavy."""

import dataclasses

from mixer_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Widths:
    """The five numbers that make a Mixer (Table 1 of the paper).

    Attributes:
        num_blocks: number of Mixer blocks, N.
        patch_size: side of a square patch in pixels, P.
        hidden_dim: channels of a token, C.
        tokens_mlp_dim: hidden units of the token-mixing MLP, D_S.
        channels_mlp_dim: hidden units of the channel-mixing MLP, D_C.
    """

    num_blocks: int
    patch_size: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int


# Table 1 of the paper.
VARIANTS: dict[str, Widths] = {
    "S/32": Widths(8, 32, 512, 256, 2048),
    "S/16": Widths(8, 16, 512, 256, 2048),
    "B/32": Widths(12, 32, 768, 384, 3072),
    "B/16": Widths(12, 16, 768, 384, 3072),
    "L/32": Widths(24, 32, 1024, 512, 4096),
    "L/16": Widths(24, 16, 1024, 512, 4096),
    "H/14": Widths(32, 14, 1280, 640, 5120),
}
CUSTOM = "custom"
# Widths and GELU are those of the weights in config.init_from.
INIT_FROM = "init_from"


def resolve_widths(variant: str, **overrides: int) -> Widths:
    """Returns the widths of a variant, each replaced by its override where that is not zero.

    Args:
        variant: a name of `VARIANTS`, or "custom", for which all five widths must be given.
        **overrides: any field of `Widths`; zero stands for "the variant's own".

    Raises:
        UserError: the variant is unknown, or a custom one leaves a width open or negative.
    """
    given = {name: value for name, value in overrides.items() if value != 0}
    for name, value in given.items():
        if value < 0:
            raise UserError(f"model.{name}={value} is negative; pass a positive number")
    if variant == CUSTOM:
        missing = [f.name for f in dataclasses.fields(Widths) if f.name not in given]
        if missing:
            raise UserError(f'model.variant="custom" needs every width; set {", ".join(missing)}')
        return Widths(**given)
    if variant not in VARIANTS:
        known = ", ".join([*VARIANTS, CUSTOM])
        raise UserError(f"model.variant={variant!r} is unknown; choose one of {known}")
    return dataclasses.replace(VARIANTS[variant], **given)


def check_image_size(height: int, width: int, patch_size: int) -> None:
    """Raises UserError, naming the nearest sizes that fit, unless whole patches cover the image."""
    for side in (height, width):
        if side < patch_size or side % patch_size:
            below = max(side // patch_size, 1) * patch_size
            nearest = f"{below} and {below + patch_size}"
            raise UserError(
                f"image_size {side} is not divisible by patch_size {patch_size}; "
                f"the nearest are {nearest}"
            )


def num_tokens(widths: Widths, image_size: int) -> int:
    """Returns the number of tokens S of a square image of `image_size` pixels (Section 2)."""
    return (image_size // widths.patch_size) ** 2


def num_parameters(widths: Widths, image_size: int, num_classes: int) -> int:
    """Returns the number of parameters; `num_classes` 0 means a model without head."""
    tokens, channels, patch = num_tokens(widths, image_size), widths.hidden_dim, widths.patch_size
    stem = (3 * patch**2 + 1) * channels
    token_mixing = (2 * tokens + 1) * widths.tokens_mlp_dim + tokens
    channel_mixing = (2 * channels + 1) * widths.channels_mlp_dim + channels
    blocks = widths.num_blocks * (4 * channels + token_mixing + channel_mixing)
    return stem + blocks + 2 * channels + (channels + 1) * num_classes


def parameter_shapes(
    widths: Widths, num_tokens: int, num_classes: int
) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array of a model's parameters, by its path in their tree.

    Args:
        widths: of the model.
        num_tokens: of an image.
        num_classes: outputs of the head; 0: there is none.
    """
    blocks, patch, channels = widths.num_blocks, widths.patch_size, widths.hidden_dim
    shapes: dict[str, tuple[int, ...]] = {
        "stem/kernel": (patch, patch, 3, channels),
        "stem/bias": (channels,),
    }
    mlps = {
        "token_mixing": (num_tokens, widths.tokens_mlp_dim),
        "channel_mixing": (channels, widths.channels_mlp_dim),
    }
    for number, (name, (outer, inner)) in enumerate(mlps.items()):
        shapes |= {
            f"blocks/LayerNorm_{number}/scale": (blocks, channels),
            f"blocks/LayerNorm_{number}/bias": (blocks, channels),
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


def forward_flops(widths: Widths, image_size: int, num_classes: int) -> int:
    """Returns the FLOPs of one image's forward pass, counting matrix products only.

    A multiplication and its addition are two FLOPs. A training step costs three forwards.
    """
    tokens, channels = num_tokens(widths, image_size), widths.hidden_dim
    stem = tokens * 3 * widths.patch_size**2 * channels
    token_mixing = 2 * tokens * widths.tokens_mlp_dim * channels
    channel_mixing = 2 * tokens * widths.channels_mlp_dim * channels
    products = stem + widths.num_blocks * (token_mixing + channel_mixing) + channels * num_classes
    return 2 * products
