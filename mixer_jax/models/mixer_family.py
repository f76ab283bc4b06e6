"""Mixer as a model family. Does not import JAX until a model is built."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from mixer_jax.models import mixer_config, mixer_costs
from mixer_jax.models.family import (
    CUSTOM,
    CostModel,
    ImageSize,
    InferredConfig,
    ModelFamily,
    ResizedConfig,
    Shape,
)
from mixer_jax.models.mixer_config import BLOCK_BACKENDS, VARIANTS, MixerConfig
from mixer_jax.models.weight_layout import WeightLayout


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
        num_tokens = mixer_config.num_tokens(config, image_size)
        return mixer_config.param_shapes(config, num_tokens, num_classes)

    def forward_flops(
        self, config: MixerConfig, image_size: int | ImageSize, num_classes: int
    ) -> int:
        """Returns the FLOPs of one image's forward pass, counting matmuls only."""
        return mixer_config.forward_flops(config, image_size, num_classes)

    @property
    def cost_model(self) -> CostModel:
        """Memory, recomputation and memory traffic of a step."""
        return mixer_costs

    def image_size_multiple(self, config: MixerConfig) -> int:
        """Returns the patch size."""
        return config.patch_size

    def check_image_size(self, config: MixerConfig, height: int, width: int) -> None:
        """Raises UserError, naming the nearest valid sizes, unless patches cover the image."""
        mixer_config.check_image_size(height, width, config.patch_size)

    def resize_config(self, config: MixerConfig, old: ImageSize, new: ImageSize) -> ResizedConfig:
        """Returns the config for another image size; D_S grows with tiled weights."""
        from mixer_jax.models.mixer_resize import resize_method, resized_tokens_mlp_dim

        grids = _grid(config, old), _grid(config, new)
        method = resize_method(*grids)
        mlp_dim = resized_tokens_mlp_dim(config.tokens_mlp_dim, *grids)
        note = {
            "identity": "",
            "tiled": "tiled from {} (the paper's Appendix C)",
            "interpolated": "interpolated from {}, which the paper does not do",
        }[method]
        return ResizedConfig(dataclasses.replace(config, tokens_mlp_dim=mlp_dim), method, note)

    def resize_params(
        self, params: Any, config: MixerConfig, old: ImageSize, new: ImageSize
    ) -> Any:
        """Adapts token mixing, all that depends on the image size."""
        from mixer_jax.models.mixer_resize import resize_token_mixing

        return resize_token_mixing(params, _grid(config, old), _grid(config, new))

    def weight_layouts(self) -> tuple[WeightLayout, ...]:
        """Returns Google's and timm's layouts."""
        from mixer_jax.models.mixer_layouts import LAYOUTS

        return LAYOUTS

    def timm_code(
        self,
        variant: str,
        config: MixerConfig,
        image_size: ImageSize,
        num_classes: int,
        gelu: str,
        path: str,
    ) -> list[str]:
        """Returns lines that create timm's model by name if it has one, or else its class."""
        from mixer_jax.models.mixer_layouts import timm_code

        return timm_code(variant, config, image_size, num_classes, gelu, path)

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
