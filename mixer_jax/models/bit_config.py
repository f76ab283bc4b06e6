"""Architecture of BiT's ResNets: dimensions and variants. Does not import JAX."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from mixer_jax.errors import UserError
from mixer_jax.models.family import ImageSize, architecture_key

Root = Literal["7x7", "3x3"]
# Side of the root's kernel, and its stride. One of stride 2 is followed by pooling of stride 2.
ROOTS: dict[Root, tuple[int, int]] = {"7x7": (7, 2), "3x3": (3, 1)}
# The published files name blocks by one digit and their units by two.
MAX_BLOCKS, MAX_UNITS = 9, 99
_MAX_GROUPS = 32


@dataclasses.dataclass(frozen=True)
class BitConfig:
    """Dimensions of a BiT-ResNet (Section 3.3 of arXiv 1912.11370).

    Block b, counted from 0, has a middle width of `root_width`·2^b and 4 times as many outputs.

    Attributes:
        units: Bottleneck units per block, separated by commas, e.g. "3,4,6,3".
        root_width: Channels of the root convolution: 64 times the width factor of the paper.
        root: "7x7": a convolution of stride 2, and max-pooling of stride 2. "3x3": a convolution
            of stride 1 alone, for images of about 32 px.
    """

    units: str = architecture_key("bottleneck units per block of a ResNet, e.g. 3,4,6,3")
    root_width: int = architecture_key("channels of a ResNet's root, 64 × its width factor")
    root: Root = dataclasses.field(
        default="7x7",
        metadata={"help": "root of a ResNet: 7x7 and max-pooling, or 3x3 for small images"},
    )

    def __post_init__(self) -> None:
        """Checks the values; raises UserError."""
        counts = self.units.split(",")
        valid = {str(count + 1) for count in range(MAX_UNITS)}
        if not valid.issuperset(counts) or len(counts) > MAX_BLOCKS:
            raise UserError(
                f"model.units must be 1 to {MAX_BLOCKS} numbers from 1 to {MAX_UNITS}, separated "
                f"by commas, got {self.units!r}. ResNet-50 has 3,4,6,3."
            )
        if self.root_width < 1:
            raise UserError(f"model.root_width must be positive, got {self.root_width}.")

    @property
    def units_per_block(self) -> tuple[int, ...]:
        """Number of units of each block."""
        return tuple(map(int, self.units.split(",")))

    @property
    def num_features(self) -> int:
        """Channels of the last block's output."""
        return 4 * self.middle_width(len(self.units_per_block) - 1)

    def middle_width(self, block: int) -> int:
        """Returns the channels of the middle convolution in a block, counted from 0."""
        return self.root_width * 2**block


_UNITS = {50: "3,4,6,3", 101: "3,4,23,3", 152: "3,8,36,3", 200: "3,24,36,3"}
_WIDTH_FACTORS = {50: (1, 2, 3), 101: (1, 3), 152: (1, 2, 4), 200: (3,)}
# Depth and width factor: the paper's, and those that Mixer and ViT are compared with.
VARIANTS: dict[str, BitConfig] = {
    f"R{depth}x{factor}": BitConfig(_UNITS[depth], 64 * factor)
    for depth, factors in _WIDTH_FACTORS.items()
    for factor in factors
}


def num_groups(channels: int) -> int:
    """Returns the number of groups of a GroupNorm.

    It is 32 in all variants. Layers of fewer channels have fewer groups: at most as many as leave
    two channels in each, as in the narrowest layers of R50x1.
    """
    return max(min(math.gcd(_MAX_GROUPS, channels), channels // 2), 1)


def output_sizes(config: BitConfig, image_size: int | ImageSize) -> list[ImageSize]:
    """Returns the height and width of the root's convolution, of the root, and of each block."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    _, root_stride = ROOTS[config.root]
    sizes = []
    for stride in (root_stride, root_stride, 1, *(2,) * (len(config.units_per_block) - 1)):
        size = (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        sizes.append(size)
    return sizes


def unit_path(block: int, unit: int) -> str:
    """Returns the path of a unit's parameters; both are counted from 0."""
    return f"block{block + 1}/unit{unit + 1:02}"


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


def convolutions(config: BitConfig, image_size: int | ImageSize) -> Iterator[Convolution]:
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
            path = unit_path(block, unit)
            # The stride is that of the 3×3 convolution.
            yield Convolution(f"{path}/conv1", (1, 1, inputs, width), size)
            yield Convolution(f"{path}/conv2", (3, 3, width, width), block_size)
            yield Convolution(f"{path}/conv3", (1, 1, width, 4 * width), block_size)
            if unit == 0:
                yield Convolution(f"{path}/conv_proj", (1, 1, inputs, 4 * width), block_size)
            inputs, size = 4 * width, block_size
