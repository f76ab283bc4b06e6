"""BiT-ResNet as a model family. Does not import JAX until a model is built."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from mixer_jax.errors import UserError
from mixer_jax.models.bit_config import (
    MAX_BLOCKS,
    MAX_UNITS,
    ROOTS,
    VARIANTS,
    BitConfig,
    output_sizes,
)
from mixer_jax.models.family import (
    ImageSize,
    InferredConfig,
    ModelFamily,
    Path,
    ResizedConfig,
    Shape,
)


class BitFamily(ModelFamily):
    """BiT-ResNet (arXiv 1912.11370)."""

    name = "bit"
    display_name = "BiT"
    config_class = BitConfig
    variants: ClassVar[Mapping[str, Any]] = VARIANTS

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
        for conv in _convolutions(config, image_size=1):
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

    def forward_flops(
        self, config: BitConfig, image_size: int | ImageSize, num_classes: int
    ) -> int:
        """Returns the FLOPs of one image's forward pass, counting convolutions and matmuls only."""
        convolutions = sum(conv.flops for conv in _convolutions(config, image_size))
        return convolutions + 2 * config.num_features * num_classes

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

    def infer_config(self, num_blocks: int, shape: Callable[[str], Shape]) -> InferredConfig:
        """Infers the architecture from the root's kernel and the names of the units."""
        kernel_size, _, _, root_width = shape("stem/kernel")
        roots = {size: root for root, (size, _) in ROOTS.items()}
        blocks = (_count_units(shape, f"block{b + 1}") for b in range(MAX_BLOCKS))
        units = ",".join(str(n) for n in itertools.takewhile(bool, blocks))
        return InferredConfig(BitConfig(units, root_width, roots.get(kernel_size, "7x7")), 0)

    def is_cast(self, path: Path) -> bool:
        """Returns False: kernels are standardized in float32 before they are cast."""
        return False


def _count_units(shape: Callable[[str], Shape], block: str) -> int:
    for index in range(MAX_UNITS):
        try:
            shape(f"{block}/unit{index + 1:02}/conv1/kernel")
        except (KeyError, UserError):
            return index
    return MAX_UNITS


class Convolution(NamedTuple):
    """A convolution: its path in the parameters, shape (h, w, in, out) and output size."""

    path: str
    shape: tuple[int, int, int, int]
    output_size: ImageSize

    @property
    def flops(self) -> int:
        """FLOPs per image; a multiply-add is two."""
        height, width, inputs, _ = self.shape
        return 2 * self.num_outputs * height * width * inputs

    @property
    def num_outputs(self) -> int:
        """Elements of its output per image."""
        return self.output_size[0] * self.output_size[1] * self.shape[-1]


def _convolutions(config: BitConfig, image_size: int | ImageSize) -> Iterator[Convolution]:
    """Yields all convolutions of a model in the order of the published layout."""
    root_size, size, *block_sizes = output_sizes(config, image_size)
    kernel_size, _ = ROOTS[config.root]
    yield Convolution("stem", (kernel_size, kernel_size, 3, config.root_width), root_size)
    inputs = config.root_width
    for block, (num_units, block_size) in enumerate(
        zip(config.units_per_block, block_sizes, strict=True)
    ):
        width = config.middle_width(block)
        for unit in range(num_units):
            path = f"block{block + 1}/unit{unit + 1:02}"
            # The stride is that of the 3×3 convolution.
            yield Convolution(f"{path}/conv1", (1, 1, inputs, width), size)
            yield Convolution(f"{path}/conv2", (3, 3, width, width), block_size)
            yield Convolution(f"{path}/conv3", (1, 1, width, 4 * width), block_size)
            if unit == 0:
                yield Convolution(f"{path}/conv_proj", (1, 1, inputs, 4 * width), block_size)
            inputs, size = 4 * width, block_size
