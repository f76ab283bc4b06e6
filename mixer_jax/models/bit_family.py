"""BiT-ResNet as a model family. Does not import JAX until a model is built."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from mixer_jax.errors import UserError
from mixer_jax.models import bit_costs
from mixer_jax.models.bit_config import (
    MAX_BLOCKS,
    MAX_UNITS,
    ROOTS,
    VARIANTS,
    BitConfig,
    convolutions,
    num_groups,
    output_sizes,
    unit_path,
)
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
    TensorMapping,
    TimmModel,
    WeightLayout,
    head_layers,
)

# timm has no models of these variants.
_NOT_IN_TIMM = ("R50x2", "R152x1", "R200x3")
# Narrowest of timm's models with the same units per block.
_TIMM_BASES = ("R50x1", "R101x1", "R152x2")


class BitFamily(ModelFamily):
    """BiT-ResNet (arXiv 1912.11370)."""

    name = "bit"
    display_name = "BiT"
    config_class = BitConfig
    variants: ClassVar[Mapping[str, Any]] = VARIANTS
    regions: ClassVar[Mapping[str, str]] = bit_costs.REGIONS
    has_gelu = False
    # Its kernel is standardized, it has no bias, and it is padded with zeros.
    stem = ""

    def get_module_class(self) -> Any:
        """Returns `BitResNet`."""
        from mixer_jax.models.bit import BitResNet

        return BitResNet

    def param_shapes(
        self, config: BitConfig, image_size: int | ImageSize, num_classes: int
    ) -> dict[str, Shape]:
        """Returns the shape of each parameter by its slash-separated path."""
        shapes: dict[str, Shape] = {}
        # No size is needed for the shapes.
        for conv in convolutions(config, image_size=1):
            *layers, name = conv.path.split("/")
            if name.startswith("conv") and name != "conv_proj":
                norm = "/".join([*layers, name.replace("conv", "norm")])
                shapes |= {f"{norm}/{leaf}": (conv.shape[2],) for leaf in ("scale", "bias")}
            shapes[f"{conv.path}/kernel"] = conv.shape
        features = config.num_features
        shapes |= {"norm/scale": (features,), "norm/bias": (features,)}
        if num_classes:
            shapes |= {"head/kernel": (features, num_classes), "head/bias": (num_classes,)}
        return shapes

    def layers(
        self, config: BitConfig, image_size: ImageSize, num_classes: int
    ) -> dict[str, Layer]:
        """Returns the activations that the module sows, by name in the order of computation."""
        _, root_size, *block_sizes = output_sizes(config, image_size)
        layers = {"stem": Layer((*root_size, config.root_width), "root")}
        shape = layers["stem"].shape
        for block, num_units in enumerate(config.units_per_block):
            shape = (*block_sizes[block], 4 * config.middle_width(block))
            for unit in range(num_units):
                name = unit_path(block, unit).replace("/", ".")
                layers[name] = Layer(shape, f"output of unit {unit + 1} of block {block + 1}")
            layers[f"block{block + 1}"] = Layer(shape, f"output of block {block + 1}")
        return {
            **layers,
            "feature_map": Layer(shape, "output of the last GroupNorm and ReLU"),
            "pooled": Layer((config.num_features,), "mean over positions"),
            **head_layers(config.num_features, num_classes),
        }

    def layer_groups(self, config: BitConfig) -> dict[str, Sequence[str]]:
        """Groups modules by depth: root, units, and head."""
        units = [
            unit_path(block, unit).replace("/", ".")
            for block, num_units in enumerate(config.units_per_block)
            for unit in range(num_units)
        ]
        groups: dict[str, Sequence[str]] = {"stem": ["stem"], **{unit: [unit] for unit in units}}
        return groups | {units[-1]: [units[-1], "norm"], "head": ["head"]}

    def forward_flops(
        self, config: BitConfig, image_size: int | ImageSize, num_classes: int
    ) -> int:
        """Returns the FLOPs of one image's forward pass, counting convolutions and matmuls only."""
        flops = sum(conv.flops for conv in convolutions(config, image_size))
        return flops + 2 * config.num_features * num_classes

    @property
    def cost_model(self) -> CostModel:
        """Memory, recomputation and memory traffic per step."""
        return bit_costs

    def check_image_size(self, config: BitConfig, height: int, width: int) -> None:
        """Raises UserError unless there is a pixel: sizes are rounded up wherever they halve."""
        if min(height, width) < 1:
            raise UserError(f"image_size must be at least 1, got {min(height, width)}.")

    def resize_config(self, config: BitConfig, old: ImageSize, new: ImageSize) -> ResizedConfig:
        """Returns the same config: the weights fit any image size."""
        return ResizedConfig(config, "identity", "")

    def resize_params(self, params: Any, config: BitConfig, old: ImageSize, new: ImageSize) -> Any:
        """Returns the parameters as they are."""
        return params

    def stem_filters(self, params: Any) -> Any:
        """Returns the filters of the root convolution, standardized as the model applies them."""
        import jax.numpy as jnp

        from mixer_jax.models.bit import standardize_kernel

        return standardize_kernel(jnp.asarray(params["stem"]["kernel"]))

    def weight_layouts(self) -> tuple[WeightLayout, ...]:
        """Returns Google's and timm's layouts."""
        return published_layouts()

    def timm_expression(
        self,
        variant: str,
        config: BitConfig,
        image_size: ImageSize,
        num_classes: int,
        gelu: str,
    ) -> str:
        """Returns an expression that creates timm's model by name if it has one, or its class.

        timm has no small root, and 32 groups in every layer.
        """
        if VARIANTS.get(variant) == config and variant not in _NOT_IN_TIMM:
            return f'timm.create_model("{_timm_name(variant)}", num_classes={num_classes})'
        if _has_other_layers(config):
            return super().timm_expression(variant, config, image_size, num_classes, gelu)
        channels = (4 * config.middle_width(b) for b in range(len(config.units_per_block)))
        args = [
            f"num_classes={num_classes}",
            f"layers={config.units_per_block}",
            f"channels=({', '.join(map(str, channels))},)",
            f"stem_chs={config.root_width}",
            'stem_type="fixed"',
            # As in timm's models of BiT.
            "conv_layer=timm.models.resnetv2.partial(timm.layers.StdConv2d, eps=1e-8)",
        ]
        return f"timm.models.resnetv2.ResNetV2({', '.join(args)})"

    def timm_model(self, config: BitConfig, gelu: str) -> TimmModel:
        """Finds timm's model with these units per block, whose number it cannot override."""
        if _has_other_layers(config):
            raise self.not_in_timm(
                config, "timm's ResNets have a root of 7x7 and 32 groups in every layer"
            )
        variant = self.infer_variant(config)
        if variant != CUSTOM and variant not in _NOT_IN_TIMM:
            return TimmModel(_timm_name(variant), {})
        base = next((name for name in _TIMM_BASES if VARIANTS[name].units == config.units), "")
        if not base:
            raise self.not_in_timm(config, f"timm names no BiT with units {config.units}")
        # Both are multiplied by the width factor of the model.
        factor = VARIANTS[base].root_width // 64
        channels = [4 * config.middle_width(block) // factor for block in range(4)]
        args = {"stem_chs": config.root_width // factor, "channels": channels}
        return TimmModel(_timm_name(base), args)

    def infer_config(self, num_blocks: int, shape: FileShapes) -> InferredConfig:
        """Infers the architecture from the root's kernel and the names of the units."""
        kernel_size, _, _, root_width = shape("stem/kernel")
        roots = {size: root for root, (size, _) in ROOTS.items()}
        blocks = (_count_units(shape, block) for block in range(MAX_BLOCKS))
        units = ",".join(map(str, itertools.takewhile(bool, blocks)))
        # Another root or no unit contradicts the tensors, which are then named.
        config = BitConfig(units or "1", root_width, roots.get(kernel_size, "7x7"))
        return InferredConfig(config, 0)

    def matrix_axes(self, path: Path) -> MatrixAxes | None:
        """Returns the axes of a unit's convolution as a matrix from its patches to its channels."""
        is_unit = path[0].startswith("block") and path[-1] == "kernel"
        return ((-4, -3, -2), (-1,)) if is_unit else None

    def is_cast(self, path: Path) -> bool:
        """Returns False: kernels are standardized in float32 before they are cast."""
        return False


def _timm_name(variant: str) -> str:
    return f"resnetv2_{variant.removeprefix('R')}_bit"


def _has_other_layers(config: BitConfig) -> bool:
    """Returns whether a model has a root or groups that timm's models do not have."""
    return config.root != "7x7" or num_groups(config.root_width) != num_groups(64)


def _count_units(shape: FileShapes, block: int) -> int:
    paths = (f"{unit_path(block, unit)}/conv1/kernel" for unit in range(MAX_UNITS))
    return sum(1 for _ in itertools.takewhile(shape.__contains__, paths))


# Our names of layers, Google's and timm's.
_LAYERS = {
    "stem": ("root_block/standardized_conv2d", "stem.conv"),
    "norm1": ("a/group_norm", "norm1"),
    "conv1": ("a/standardized_conv2d", "conv1"),
    "norm2": ("b/group_norm", "norm2"),
    "conv2": ("b/standardized_conv2d", "conv2"),
    "norm3": ("c/group_norm", "norm3"),
    "conv3": ("c/standardized_conv2d", "conv3"),
    "conv_proj": ("a/proj/standardized_conv2d", "downsample.conv"),
    "norm": ("group_norm", "norm"),
    "head": ("head/conv2d", "head.fc"),
}
_GROUP_NORM_LEAVES = {"scale": "gamma", "bias": "beta"}


def _google_tensor(path: str) -> TensorMapping:
    *unit, layer, leaf = path.split("/")
    leaf = {"scale": "gamma", "bias": "beta"}[leaf] if layer.startswith("norm") else leaf
    name = "/".join(["resnet", *unit, _LAYERS[layer][0], leaf])
    return TensorMapping(name, path, ((), (), 0, 1) if path == "head/kernel" else None)


def _timm_tensor(path: str) -> TensorMapping:
    *unit, layer, leaf = path.split("/")
    indices = (int(part.lstrip("blockunit")) - 1 for part in unit)
    parts = [f"{part}.{index}" for part, index in zip(("stages", "blocks"), indices, strict=False)]
    name = ".".join([*parts, _LAYERS[layer][1], "bias" if leaf == "bias" else "weight"])
    if leaf != "kernel":
        return TensorMapping(name, path)
    return TensorMapping(name, path, (1, 0, (), ()) if layer == "head" else (3, 2, 0, 1))


class _Tensors(Sequence[TensorMapping]):
    """Tensors of a layout, with as many blocks and units as the names allow.

    They are created at the first use, which only files of BiT need: it takes 25 ms.
    """

    def __init__(self, make_tensor: Callable[[str], TensorMapping]):
        self._make_tensor = make_tensor

    @functools.cached_property
    def _tensors(self) -> tuple[TensorMapping, ...]:
        largest = BitConfig(",".join([str(MAX_UNITS)] * MAX_BLOCKS), root_width=1)
        paths = BitFamily().param_shapes(largest, image_size=1, num_classes=1)
        return tuple(map(self._make_tensor, paths))

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, index: Any) -> Any:
        return self._tensors[index]

    def __iter__(self) -> Iterator[TensorMapping]:
        return iter(self._tensors)


@functools.cache
def published_layouts() -> tuple[WeightLayout, ...]:
    """Returns Google's and timm's layouts."""
    return (
        WeightLayout(
            "Google",
            _Tensors(_google_tensor),
            ("resnet/root_block/standardized_conv2d/kernel",),
            "tanh",
            "resize",
            # Some files number the layers.
            aliases=((r"(standardized_conv2d|group_norm|conv2d)_\d+/", r"\1/"),),
        ),
        WeightLayout(
            "timm",
            _Tensors(_timm_tensor),
            ("stem.conv.weight", "stages.0.blocks.0.conv1.weight"),
            "tanh",
            # Fine-tuned weights are for 448 or 480 px, and the whole image.
            "bilinear",
            eval_crop_fractions={0: 0.875, 384: 1.0},
        ),
    )
