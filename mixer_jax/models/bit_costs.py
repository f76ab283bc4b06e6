"""Costs of training a BiT-ResNet: activations, recomputation, traffic. Does not import JAX."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from mixer_jax.models.bit_config import BitConfig, Convolution, convolutions
from mixer_jax.models.family import Traffic

_FLOAT32 = 4
STEM, CONVOLUTIONS, GROUP_NORM = "stem", "convolutions", "GroupNorm"
HEAD = "head and loss"
# Patterns of the regions' operations in compiled programs.
REGIONS = {
    STEM: r"\bstem\b|\bimage\b|reduce_window|select_and_scatter",
    GROUP_NORM: r"\bnorm\d?\b",
    CONVOLUTIONS: r"\bblock\d\b",
    HEAD: r"\b(head|loss|label)\b|log_sigmoid|log_softmax",
}


class _Unit(NamedTuple):
    """Elements per image of the arrays of a unit: input, outputs of its convolutions and FLOPs."""

    input: int
    conv1: Convolution
    conv2: Convolution
    conv3: Convolution
    projection: Convolution | None

    @property
    def hidden(self) -> int:
        """Elements of the two arrays between the convolutions."""
        return self.conv1.num_outputs + self.conv2.num_outputs

    @property
    def output(self) -> int:
        """Elements of the unit's output."""
        return self.conv3.num_outputs

    @property
    def convolutions(self) -> list[Convolution]:
        """All convolutions of the unit."""
        found = (self.conv1, self.conv2, self.conv3, self.projection)
        return [conv for conv in found if conv is not None]


def _root_and_units(config: BitConfig, image_size: int) -> tuple[Convolution, list[_Unit]]:
    root, *rest = convolutions(config, image_size)
    return root, list(_group_units(rest))


def _group_units(convs: list[Convolution]) -> Iterator[_Unit]:
    by_unit: dict[str, dict[str, Convolution]] = {}
    for conv in convs:
        unit, _, name = conv.path.rpartition("/")
        by_unit.setdefault(unit, {})[name] = conv
    for named in by_unit.values():
        conv1 = named["conv1"]
        size = math.prod(conv1.output_size) * conv1.shape[2]
        yield _Unit(size, conv1, named["conv2"], named["conv3"], named.get("conv_proj"))


def recomputed_flops(config: BitConfig, image_size: int, remat: str) -> int:
    """Returns the FLOPs per image that a remat policy recomputes, counting convolutions only."""
    if remat in ("none", "dots"):
        return 0
    # The output of the third convolution and of the projection are not needed again.
    _, units = _root_and_units(config, image_size)
    return sum(unit.conv1.flops + unit.conv2.flops for unit in units)


def saved_activation_bytes(config: BitConfig, image_size: int, remat: str, itemsize: int) -> float:
    """Returns the bytes of residuals saved for the backward pass, per image, in root and units."""
    root, units = _root_and_units(config, image_size)
    # The output of the root, which max-pooling compares, and of the last unit, and its activation.
    elements = root.num_outputs + 2 * units[-1].output
    for unit in units:
        elements += {
            # Three activations before and after GroupNorm and ReLU.
            "none": 2 * unit.input + 2 * unit.hidden,
            "dots": unit.input + unit.hidden,
            "mlp_hidden": unit.input,
            "full": unit.input,
        }[remat]
    return itemsize * elements


def live_block_bytes(config: BitConfig, image_size: int, itemsize: int) -> float:
    """Returns the bytes that are live in the middle of the largest unit, per image."""
    _, units = _root_and_units(config, image_size)
    # All of its activations, and the gradients of its output and of the largest of the others.
    return max(
        itemsize * (2 * unit.input + 2 * unit.hidden + 2 * unit.output)
        + (itemsize + _FLOAT32) * max(unit.input, unit.output)
        for unit in units
    )


def estimate_traffic(
    config: BitConfig,
    image_size: int,
    num_classes: int,
    *,
    batch_size: int,
    itemsize: int,
    train: bool,
) -> dict[str, Traffic]:
    """Estimates the traffic per region, step and image, without the optimizer.

    Kernels are read in float32 once and standardized, and their gradients are written in float32.
    GroupNorm and ReLU are part of the convolutions before and after them.
    """
    root, units = _root_and_units(config, image_size)
    # Reads of the kernel, and a write of its gradient.
    kernel_bytes = (3 if train else 1) * _FLOAT32 / batch_size

    def weights(*convs: Convolution) -> float:
        return kernel_bytes * sum(math.prod(conv.shape) for conv in convs)

    # The gradient of the image, which is uint8, is not computed. Pooling reads the convolution's
    # output, and in the backward pass reads it again and writes its gradient.
    pooled = units[0].input
    stem_passes = 2 if train else 1
    stem_bytes = stem_passes * 3 * image_size**2 + weights(root)
    stem_bytes += itemsize * (5 if train else 2) * root.num_outputs
    stem_bytes += itemsize * stem_passes * pooled if pooled != root.num_outputs else 0
    stem_flops = stem_passes * root.flops
    flops = unfused = fused = 0.0
    fused_flops = 3.0 * sum(conv.flops for unit in units for conv in unit.convolutions)
    fused_flops += recomputed_flops(config, image_size, "full")
    for unit in units:
        flops += (3 if train else 1) * sum(conv.flops for conv in unit.convolutions)
        sizes = [
            (unit.input, unit.conv1.num_outputs),
            (unit.conv1.num_outputs, unit.conv2.num_outputs),
            (unit.conv2.num_outputs, unit.conv3.num_outputs),
        ]
        if unit.projection is not None:
            sizes.append((unit.input, unit.projection.num_outputs))
        # Forward, the gradient of the input and that of the kernel: each reads two arrays of the
        # three and writes the third, which is small for kernels.
        per_input, per_output = (3, 3) if train else (1, 1)
        elements = sum(per_input * i + per_output * o for i, o in sizes)
        # The sum with the shortcut.
        elements += (2 if train else 1) * unit.output
        unfused += itemsize * elements + weights(*unit.convolutions)
        # One kernel per unit keeps hidden activations on-chip and recomputes them.
        elements = 3 * unit.input + 2 * unit.output if train else unit.input + unit.output
        fused += itemsize * elements + weights(*unit.convolutions)
    # The last GroupNorm and the mean read all features; the backward pass reads and writes them.
    passes = 3 if train else 1
    num_weights = config.num_features * num_classes
    head_bytes = passes * (itemsize * units[-1].output + _FLOAT32 * num_weights / batch_size)
    head_flops = 2.0 * passes * num_weights
    return {
        STEM: Traffic(stem_flops, stem_bytes, stem_flops, stem_bytes),
        GROUP_NORM: Traffic(0.0, 0.0, 0.0, 0.0),
        CONVOLUTIONS: Traffic(flops, unfused, fused_flops if train else flops, fused),
        HEAD: Traffic(head_flops, head_bytes, head_flops, head_bytes),
    }
