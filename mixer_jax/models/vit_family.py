"""Vision Transformer as a model family. Does not import JAX until a model is built."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from mixer_jax.errors import UserError
from mixer_jax.models import vit_costs
from mixer_jax.models.family import (
    CUSTOM,
    CostModel,
    FileShapes,
    ImageSize,
    InferredConfig,
    Layer,
    MatrixAxes,
    ModelFamily,
    Path,
    ResizedConfig,
    Shape,
    TimmModel,
    WeightLayout,
    check_image_size,
    head_layers,
    stack_layers,
)
from mixer_jax.models.vit_config import VARIANTS, VitConfig, grid_shape, num_tokens
from mixer_jax.models.vit_layouts import LAYOUTS

# timm's names of sizes, and the image size of its named models.
_TIMM_SIZES = {
    "Ti": "tiny",
    "S": "small",
    "B": "base",
    "L": "large",
    "H": "huge",
    "g": "giant",
    "G": "gigantic",
}
_TIMM_IMAGE_SIZE = (224, 224)
_TIMM_POOLING = {"gap": "avg", "map": "map"}


class VitFamily(ModelFamily):
    """Vision Transformer, ViT (arXiv 2010.11929)."""

    name = "vit"
    display_name = "ViT"
    config_class = VitConfig
    variants = VARIANTS
    head_modules = ("map_head", "pre_logits", "head")
    regions: ClassVar[Mapping[str, str]] = vit_costs.REGIONS

    def infer_variant(self, config: VitConfig) -> str:
        """Returns the name of the variant with these dimensions, with any pooling and embedding."""
        dimensions = _dimensions(config)
        matches = (name for name, known in VARIANTS.items() if _dimensions(known) == dimensions)
        return next(matches, CUSTOM)

    def get_module_class(self) -> Any:
        """Returns `VisionTransformer`."""
        from mixer_jax.models.vit import VisionTransformer

        return VisionTransformer

    def param_shapes(
        self, config: VitConfig, image_size: int | ImageSize, num_classes: int
    ) -> dict[str, Shape]:
        """Returns the shape of each parameter by its slash-separated path."""
        patch, width = config.patch_size, config.hidden_dim
        shapes: dict[str, Shape] = {
            "stem/kernel": (patch, patch, 3, width),
            "stem/bias": (width,),
        }
        if config.has_class_token:
            shapes["cls"] = (1, 1, width)
        if config.pos_embedding == "learned":
            shapes["pos_embedding"] = (1, num_tokens(config, image_size), width)
        block = {
            **_layer_norm_shapes("LayerNorm_0", width),
            **_attention_shapes(config),
            **_layer_norm_shapes("LayerNorm_1", width),
            **_mlp_shapes(config),
        }
        shapes |= {f"blocks/{path}": (config.num_blocks, *shape) for path, shape in block.items()}
        shapes |= _layer_norm_shapes("encoder_norm", width)
        if config.pooling == "map":
            head = {
                "probe": (1, 1, width),
                **_attention_shapes(config),
                **_layer_norm_shapes("LayerNorm_0", width),
                **_mlp_shapes(config),
            }
            shapes |= {f"map_head/{path}": shape for path, shape in head.items()}
        if config.pre_logits:
            shapes |= {"pre_logits/kernel": (width, width), "pre_logits/bias": (width,)}
        if num_classes:
            shapes |= {"head/kernel": (width, num_classes), "head/bias": (num_classes,)}
        return shapes

    def layers(
        self, config: VitConfig, image_size: ImageSize, num_classes: int
    ) -> dict[str, Layer]:
        """Returns the activations that the module sows, by name in the order of computation."""
        rows, columns = grid_shape(config, image_size)
        shape = (num_tokens(config, image_size), config.hidden_dim)
        branches = {
            "attention": "attention of block {}, before it is added",
            "mlp": "MLP of block {}, before it is added",
        }
        pooling = {
            "token": "class token",
            "gap": "mean over tokens",
            "map": "attention pooling",
        }
        return {
            "stem": Layer((rows * columns, config.hidden_dim), "patch embedding"),
            **stack_layers(config.num_blocks, shape, "output of block {}", branches),
            "pooled": Layer((config.hidden_dim,), pooling[config.pooling]),
            **head_layers(config.hidden_dim, num_classes),
        }

    def forward_flops(
        self, config: VitConfig, image_size: int | ImageSize, num_classes: int
    ) -> int:
        """Returns the FLOPs of one image's forward pass, counting matmuls only."""
        tokens, width = num_tokens(config, image_size), config.hidden_dim
        patches = tokens - config.has_class_token
        stem = patches * 3 * config.patch_size**2 * width
        projections, attention = 4 * tokens * width**2, 2 * tokens**2 * width
        block = projections + attention + 2 * tokens * width * config.mlp_dim
        head = width * num_classes
        if config.pooling == "map":
            # Query and output of one token, keys and values of all.
            head += (2 + 2 * tokens) * width**2 + 2 * tokens * width + 2 * width * config.mlp_dim
        if config.pre_logits:
            head += width**2
        return 2 * (stem + config.num_blocks * block + head)

    @property
    def cost_model(self) -> CostModel:
        """Memory, recomputation and memory traffic per step."""
        return vit_costs

    def image_size_multiple(self, config: VitConfig) -> int:
        """Returns the patch size."""
        return config.patch_size

    def check_image_size(self, config: VitConfig, height: int, width: int) -> None:
        """Raises UserError, naming the nearest valid sizes, unless patches cover the image."""
        check_image_size(height, width, config.patch_size)

    def resize_config(self, config: VitConfig, old: ImageSize, new: ImageSize) -> ResizedConfig:
        """Returns the same config: only the learned position embedding is resampled."""
        if config.pos_embedding != "learned" or grid_shape(config, old) == grid_shape(config, new):
            return ResizedConfig(config, "identity", "")
        return ResizedConfig(config, "interpolated", "position embedding interpolated from {}")

    def resize_params(self, params: Any, config: VitConfig, old: ImageSize, new: ImageSize) -> Any:
        """Resamples the learned position embedding, as ViT's authors do."""
        from mixer_jax.models.vit_resize import resize_params

        return resize_params(params, grid_shape(config, old), grid_shape(config, new))

    def weight_layouts(self) -> tuple[WeightLayout, ...]:
        """Returns Google's, big_vision's and timm's layouts."""
        return LAYOUTS

    def timm_expression(
        self, variant: str, config: VitConfig, image_size: ImageSize, num_classes: int, gelu: str
    ) -> str:
        """Returns an expression that creates timm's model by name if it has one, or its class.

        Raises:
            UserError: timm's model has no such position embedding or hidden layer.
        """
        if reason := _not_in_timm(config):
            raise UserError(
                f"timm must have a model for these weights, got {self.full_name(variant)} with "
                f"{reason}."
            )
        # timm's default GELU is exact.
        act_layer = ["act_layer=timm.layers.GELUTanh"] if gelu == "tanh" else []
        if VARIANTS.get(variant) == config and image_size == _TIMM_IMAGE_SIZE:
            args = [f'"{_timm_name(variant)}"', f"num_classes={num_classes}", *act_layer]
            return f"timm.create_model({', '.join(args)})"
        height, width = image_size
        args = [
            f"num_classes={num_classes}",
            f"img_size={height if height == width else (height, width)}",
            f"patch_size={config.patch_size}",
            f"depth={config.num_blocks}",
            f"embed_dim={config.hidden_dim}",
            f"num_heads={config.num_heads}",
            # timm multiplies it by embed_dim and truncates.
            f"mlp_ratio={config.mlp_dim + 0.5} / {config.hidden_dim}",
        ]
        if config.pooling != "token":
            # The last LayerNorm precedes the mean.
            args += [
                f'global_pool="{_TIMM_POOLING[config.pooling]}"',
                "class_token=False",
                "fc_norm=False",
            ]
        args += act_layer
        return f"timm.models.vision_transformer.VisionTransformer({', '.join(args)})"

    def timm_model(self, config: VitConfig, gelu: str) -> TimmModel:
        """Finds the model of the variant with these dimensions, or one of other dimensions."""
        if reason := _not_in_timm(config):
            raise self.not_in_timm(config, f"timm's ViTs have no {reason}")
        variant = self.infer_variant(config)
        args: dict[str, Any] = {}
        if variant == CUSTOM:
            variant = "B/16"
            args = {
                "patch_size": config.patch_size,
                "depth": config.num_blocks,
                "embed_dim": config.hidden_dim,
                "num_heads": config.num_heads,
                # timm multiplies it by embed_dim and truncates.
                "mlp_ratio": (config.mlp_dim + 0.5) / config.hidden_dim,
            }
        if config.pooling != "token":
            # The last LayerNorm precedes the mean.
            pooling = _TIMM_POOLING[config.pooling]
            args |= {"global_pool": pooling, "class_token": False, "fc_norm": False}
        if gelu == "tanh":
            args["act_layer"] = "gelu_tanh"
        return TimmModel(_timm_name(variant), args)

    def config_for_new_head(self, config: VitConfig) -> VitConfig:
        """Returns the config without pre_logits (arXiv 2010.11929, Section 3.2)."""
        return dataclasses.replace(config, pre_logits=False)

    def infer_config(self, num_blocks: int, shape: FileShapes) -> InferredConfig:
        """Infers the architecture from the shapes of three kernels, and the optional parameters.

        Where a layout merges the heads, their number is the one stored with the weights, or that of
        the variant with the other dimensions.

        Raises:
            UserError: The number of heads is not stored, and the dimensions are those of no
                variant; or the class token has no position embedding, as stored by timm.
        """
        patch_size, _, _, hidden_dim = shape("stem/kernel")
        _, mlp_dim = shape("blocks/mlp/Dense_0/kernel")
        _, num_heads, _ = shape("blocks/attention/query/kernel")
        if not num_heads:
            num_heads = _find_num_heads(shape.recorded, num_blocks, hidden_dim, mlp_dim)
        has_class_token, is_learned = "cls" in shape, "pos_embedding" in shape
        has_probe = "map_head/probe" in shape
        config = VitConfig(
            num_blocks,
            patch_size,
            hidden_dim,
            mlp_dim,
            num_heads,
            pooling="token" if has_class_token else "map" if has_probe else "gap",
            pos_embedding="learned" if is_learned else "sincos2d",
            pre_logits="pre_logits/kernel" in shape,
        )
        if has_class_token and shape.recorded.get("no_embed_class"):
            raise UserError(
                "no_embed_class must be false for weights with a class token, got true: the class "
                "token has no position embedding. Use weights of another model."
            )
        num_entries = shape("pos_embedding")[1] if is_learned else 0
        return InferredConfig(config, num_entries - (is_learned and has_class_token))

    def matrix_axes(self, path: Path) -> MatrixAxes | None:
        """Returns the axes of a block's matrix; those of attention are over all heads."""
        axes = super().matrix_axes(path)
        if axes is None or path[1] != "attention":
            return axes
        return ((-3, -2), (-1,)) if path[2] == "out" else ((-3,), (-2, -1))

    def is_cast(self, path: Path) -> bool:
        """Returns whether the model casts a parameter to the computation's dtype."""
        return super().is_cast(path) and path[0] != "pre_logits"


def _timm_name(variant: str) -> str:
    size, _, patch = variant.partition("/")
    return f"vit_{_TIMM_SIZES[size]}_patch{patch}_{_TIMM_IMAGE_SIZE[0]}"


def _not_in_timm(config: VitConfig) -> str:
    """Returns the feature of a model that timm's do not have, or ""."""
    if config.pre_logits:
        return "pre_logits"
    return config.pos_embedding if config.pos_embedding != "learned" else ""


def _dimensions(config: VitConfig) -> VitConfig:
    """Returns a config with the default pooling, position embedding and head."""
    return dataclasses.replace(config, pooling="token", pos_embedding="learned", pre_logits=False)


def _find_num_heads(
    recorded: Mapping[str, Any], num_blocks: int, hidden_dim: int, mlp_dim: int
) -> int:
    num_heads = recorded.get("num_heads")
    if type(num_heads) is int and num_heads > 0:
        return num_heads
    for known in VARIANTS.values():
        if (known.num_blocks, known.hidden_dim, known.mlp_dim) == (num_blocks, hidden_dim, mlp_dim):
            return known.num_heads
    raise UserError(
        f"num_heads must be stored with {num_blocks} blocks of width {hidden_dim} and {mlp_dim}, "
        'which no variant has. Write {"model_args": {"num_heads": N}} to config.json next to the '
        "weights."
    )


def _layer_norm_shapes(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}/scale": (width,), f"{name}/bias": (width,)}


def _attention_shapes(config: VitConfig) -> dict[str, Shape]:
    width, heads = config.hidden_dim, (config.num_heads, config.hidden_dim // config.num_heads)
    shapes: dict[str, Shape] = {}
    for name in ("query", "key", "value"):
        shapes[f"attention/{name}/kernel"] = (width, *heads)
        shapes[f"attention/{name}/bias"] = heads
    return shapes | {"attention/out/kernel": (*heads, width), "attention/out/bias": (width,)}


def _mlp_shapes(config: VitConfig) -> dict[str, Shape]:
    width, hidden = config.hidden_dim, config.mlp_dim
    return {
        "mlp/Dense_0/kernel": (width, hidden),
        "mlp/Dense_0/bias": (hidden,),
        "mlp/Dense_1/kernel": (hidden, width),
        "mlp/Dense_1/bias": (width,),
    }
