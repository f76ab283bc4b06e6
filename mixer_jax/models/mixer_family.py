"""Mixer as a model family, with its published weights.

Does not import JAX until a model is built.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from mixer_jax.models import mixer_costs
from mixer_jax.models.family import (
    CUSTOM,
    CostModel,
    ImageSize,
    InferredConfig,
    Layer,
    ModelFamily,
    ResizedConfig,
    Shape,
    TensorMapping,
    TimmModel,
    WeightLayout,
    check_image_size,
    head_layers,
    stack_layers,
)
from mixer_jax.models.mixer_config import (
    BLOCK_BACKENDS,
    VARIANTS,
    MixerConfig,
    num_tokens,
)

# timm's named models have this image size; it has none of H/14.
_TIMM_IMAGE_SIZE = (224, 224)
_NOT_IN_TIMM = "H/14"


class MixerFamily(ModelFamily):
    """MLP-Mixer (arXiv 2105.01601)."""

    name = "mixer"
    display_name = "Mixer"
    config_class = MixerConfig
    variants = VARIANTS
    block_backends: ClassVar[Mapping[str, str]] = BLOCK_BACKENDS
    regions: ClassVar[Mapping[str, str]] = mixer_costs.REGIONS

    def infer_variant(self, config: MixerConfig) -> str:
        """Returns the name of the variant with this config, tiled (Appendix C) or not."""
        for name, variant in VARIANTS.items():
            factor, rest = divmod(config.tokens_mlp_dim, variant.tokens_mlp_dim)
            is_same = dataclasses.replace(config, tokens_mlp_dim=variant.tokens_mlp_dim) == variant
            # K × K copies of token mixing.
            if is_same and not rest and math.isqrt(factor) ** 2 == factor:
                return name
        return CUSTOM

    def get_module_class(self) -> Any:
        """Returns `MlpMixer`."""
        from mixer_jax.models.mixer import MlpMixer

        return MlpMixer

    def param_shapes(
        self, config: MixerConfig, image_size: int | ImageSize, num_classes: int
    ) -> dict[str, Shape]:
        """Returns the shape of each parameter by its slash-separated path."""
        blocks, patch, channels = config.num_blocks, config.patch_size, config.hidden_dim
        shapes: dict[str, Shape] = {
            "stem/kernel": (patch, patch, 3, channels),
            "stem/bias": (channels,),
        }
        mlps = {
            "token_mixing": (num_tokens(config, image_size), config.tokens_mlp_dim),
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

    def layers(
        self, config: MixerConfig, image_size: ImageSize, num_classes: int
    ) -> dict[str, Layer]:
        """Returns the activations that the module sows, by name in the order of computation."""
        shape = (num_tokens(config, image_size), config.hidden_dim)
        branches = {
            "token_mixing": "token mixing of block {}, before it is added",
            "channel_mixing": "channel mixing of block {}, before it is added",
        }
        return {
            "stem": Layer(shape, "patch embedding"),
            **stack_layers(config.num_blocks, shape, "output of block {}", branches),
            "pooled": Layer((config.hidden_dim,), "mean over tokens"),
            **head_layers(config.hidden_dim, num_classes),
        }

    def forward_flops(
        self, config: MixerConfig, image_size: int | ImageSize, num_classes: int
    ) -> int:
        """Returns the FLOPs of one image's forward pass, counting matmuls only."""
        tokens, channels = num_tokens(config, image_size), config.hidden_dim
        stem = tokens * 3 * config.patch_size**2 * channels
        token_mixing = 2 * tokens * config.tokens_mlp_dim * channels
        channel_mixing = 2 * tokens * config.channels_mlp_dim * channels
        blocks = config.num_blocks * (token_mixing + channel_mixing)
        return 2 * (stem + blocks + channels * num_classes)

    @property
    def cost_model(self) -> CostModel:
        """Memory, recomputation and memory traffic per step."""
        return mixer_costs

    def image_size_multiple(self, config: MixerConfig) -> int:
        """Returns the patch size."""
        return config.patch_size

    def check_image_size(self, config: MixerConfig, height: int, width: int) -> None:
        """Raises UserError, naming the nearest valid sizes, unless patches cover the image."""
        check_image_size(height, width, config.patch_size)

    def resize_config(self, config: MixerConfig, old: ImageSize, new: ImageSize) -> ResizedConfig:
        """Returns the config for another image size; D_S grows with tiled weights."""
        from mixer_jax.models.mixer_resize import integer_scale

        scale = integer_scale(_grid(config, old), _grid(config, new))
        if scale == 1:
            return ResizedConfig(config, "identity", "")
        if not scale:
            note = "interpolated from {}, which the paper does not do"
            return ResizedConfig(config, "interpolated", note)
        tiled = dataclasses.replace(config, tokens_mlp_dim=scale**2 * config.tokens_mlp_dim)
        return ResizedConfig(tiled, "tiled", "tiled from {} (the paper's Appendix C)")

    def resize_params(
        self, params: Any, config: MixerConfig, old: ImageSize, new: ImageSize
    ) -> Any:
        """Adapts token mixing, all that depends on the image size."""
        from mixer_jax.models.mixer_resize import resize_token_mixing

        return resize_token_mixing(params, _grid(config, old), _grid(config, new))

    def token_mixing_units(self, params: Any, config: MixerConfig, image_size: ImageSize) -> Any:
        """Returns the input weights of the hidden units of token mixing, over the patches."""
        kernel = params["blocks"]["token_mixing"]["Dense_0"]["kernel"]
        num_blocks, _, num_units = kernel.shape
        return kernel.swapaxes(1, 2).reshape(num_blocks, num_units, *_grid(config, image_size))

    def weight_layouts(self) -> tuple[WeightLayout, ...]:
        """Returns Google's and timm's layouts."""
        return GOOGLE, GOOGLE_LEGACY, TIMM

    def timm_expression(
        self,
        variant: str,
        config: MixerConfig,
        image_size: ImageSize,
        num_classes: int,
        gelu: str,
    ) -> str:
        """Returns an expression that creates timm's model by name if it has one, or its class."""
        # timm's default GELU is exact.
        act_layer = ["act_layer=timm.layers.GELUTanh"] if gelu == "tanh" else []
        is_named = variant != _NOT_IN_TIMM and VARIANTS.get(variant) == config
        if is_named and image_size == _TIMM_IMAGE_SIZE:
            args = [f'"{_timm_name(variant)}"', f"num_classes={num_classes}"]
            return f"timm.create_model({', '.join(args + act_layer)})"
        height, width = image_size
        mlp_dims = (config.tokens_mlp_dim, config.channels_mlp_dim)
        args = [
            f"num_classes={num_classes}",
            f"img_size={height if height == width else (height, width)}",
            f"patch_size={config.patch_size}",
            f"num_blocks={config.num_blocks}",
            f"embed_dim={config.hidden_dim}",
            f"mlp_ratio=({', '.join(_timm_ratio_source(d, config.hidden_dim) for d in mlp_dims)})",
        ]
        return f"timm.models.mlp_mixer.MlpMixer({', '.join(args + act_layer)})"

    def timm_model(self, config: MixerConfig, gelu: str) -> TimmModel:
        """Finds timm's model with this patch size, width and depth, which it cannot override."""
        names = (name for name in VARIANTS if name != _NOT_IN_TIMM)
        name = next((n for n in names if _fixed_in_timm(VARIANTS[n]) == _fixed_in_timm(config)), "")
        if not name:
            raise self.not_in_timm(
                config,
                "timm's Mixers have fixed patch sizes, widths and numbers of blocks, and none has "
                f"{config.patch_size}, {config.hidden_dim} and {config.num_blocks}",
            )
        args: dict[str, Any] = {}
        if config != VARIANTS[name]:
            dims = (config.tokens_mlp_dim, config.channels_mlp_dim)
            args["mlp_ratio"] = [_timm_mlp_ratio(dim, config.hidden_dim) for dim in dims]
        python_args = {}
        if gelu == "tanh":
            # timm's Mixer takes a class only. With the name of one, it fails instead of computing
            # another function.
            args["act_layer"] = "gelu_tanh"
            python_args["act_layer"] = "timm.layers.GELUTanh"
        return TimmModel(_timm_name(name), args, python_args)

    def infer_config(self, num_blocks: int, shape: Callable[[str], Shape]) -> InferredConfig:
        """Infers the architecture from the shapes of three kernels."""
        patch_size, _, _, hidden_dim = shape("stem/kernel")
        num_tokens, tokens_mlp_dim = shape("blocks/token_mixing/Dense_0/kernel")
        _, channels_mlp_dim = shape("blocks/channel_mixing/Dense_0/kernel")
        dims = (num_blocks, patch_size, hidden_dim, tokens_mlp_dim, channels_mlp_dim)
        return InferredConfig(MixerConfig(*dims), num_tokens)


def _grid(config: MixerConfig, image_size: ImageSize) -> tuple[int, int]:
    height, width = image_size
    return height // config.patch_size, width // config.patch_size


def _timm_name(variant: str) -> str:
    return f"mixer_{variant.replace('/', '').lower()}_{_TIMM_IMAGE_SIZE[0]}"


def _fixed_in_timm(config: MixerConfig) -> tuple[int, int, int]:
    """Returns the dimensions that timm's named models do not take as arguments."""
    return config.patch_size, config.hidden_dim, config.num_blocks


def _timm_mlp_ratio(mlp_dim: int, hidden_dim: int) -> float:
    """Returns a number that timm multiplies by `hidden_dim` and truncates to `mlp_dim`."""
    return _ratio_numerator(mlp_dim, hidden_dim) / hidden_dim


def _timm_ratio_source(mlp_dim: int, hidden_dim: int) -> str:
    """Formats `_timm_mlp_ratio` as source code."""
    return f"{_ratio_numerator(mlp_dim, hidden_dim)} / {hidden_dim}"


def _ratio_numerator(mlp_dim: int, hidden_dim: int) -> float:
    is_exact = math.floor(mlp_dim / hidden_dim * hidden_dim) == mlp_dim
    return mlp_dim if is_exact else mlp_dim + 0.5


def _map_tensors(
    renames: Mapping[str, str], axes: Callable[[str], tuple[int, ...] | None] = lambda _: None
) -> tuple[TensorMapping, ...]:
    """Maps all tensors of a layout, named after the parameters with parts of their paths renamed.

    Args:
        renames: Parts of paths, replaced one after another.
        axes: Function from the path of a parameter to `TensorMapping.axes`.
    """
    tensors = []
    for path in MixerFamily().param_shapes(MixerConfig(1, 1, 1, 1, 1), image_size=1, num_classes=1):
        name = path
        for old, new in renames.items():
            name = name.replace(old, new)
        tensors.append(TensorMapping(name, path, axes(path)))
    return tuple(tensors)


def _torch_axes(path: str) -> tuple[int, ...] | None:
    if path == "stem/kernel":
        return (3, 2, 0, 1)
    return (1, 0) if path.endswith("/kernel") else None


GOOGLE = WeightLayout(
    "Google",
    _map_tensors({"blocks": "MixerBlock_{}"}),
    ("pre_head_layer_norm/scale",),
    "tanh",
    "shorter_side",
)
# Some of its tensors have additional axes of length 1, which are dropped.
GOOGLE_LEGACY = WeightLayout(
    "Google, older names",
    _map_tensors(
        {
            "stem": "embedding",
            "pre_head_layer_norm": "Mixer/encoder_norm",
            "blocks": "Mixer/encoderblock_{}",
            "mixing/Dense_0/kernel": "mixing_phase_0/kernel1",
            "mixing/Dense_0/bias": "mixing_phase_0/bias1",
            "mixing/Dense_1/kernel": "mixing_phase_0/kernel2",
            "mixing/Dense_1/bias": "mixing_phase_0/bias2",
        }
    ),
    ("Mixer/encoder_norm/scale",),
    "tanh",
    "shorter_side",
)
TIMM = WeightLayout(
    "timm",
    _map_tensors(
        {
            "stem": "stem.proj",
            "pre_head_layer_norm": "norm",
            "blocks": "blocks.{}",
            "LayerNorm_0": "norm1",
            "LayerNorm_1": "norm2",
            "token_mixing": "mlp_tokens",
            "channel_mixing": "mlp_channels",
            "Dense_0": "fc1",
            "Dense_1": "fc2",
            "kernel": "weight",
            "scale": "weight",
            "/": ".",
        },
        _torch_axes,
    ),
    # Its stem has the names of other families' stems in timm.
    ("blocks.0.mlp_tokens.fc1.weight",),
    "exact",
    "bicubic",
)
