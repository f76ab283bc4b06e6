"""Costs of training a BiT-ResNet: activations, recomputation, traffic. Does not import JAX."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from mixer_jax.models.bit_config import BitConfig, Convolution, convolutions
from mixer_jax.models.family import Traffic

_FLOAT32 = 4
STEM, POINTWISE, SPATIAL = "stem", "1×1 convolutions", "3×3 convolutions"
GROUP_NORM, HEAD = "GroupNorm", "head and loss"
# Patterns of the regions' operations in compiled programs.
REGIONS = {
    STEM: r"\bstem\b|\bimage\b|reduce_window|select_and_scatter",
    SPATIAL: r"\bconv2\b",
    POINTWISE: r"\b(conv1|conv3|conv_proj)\b",
    GROUP_NORM: r"\bnorm\d?\b",
    HEAD: r"\b(head|loss|label)\b|log_sigmoid|log_softmax",
}


def recomputed_flops(config: BitConfig, image_size: int, remat: str) -> int:
    """Returns the FLOPs per image that a remat policy recomputes, counting convolutions only."""
    if remat in ("none", "dots"):
        return 0
    # The backward pass of a unit does not need the outputs of the convolutions that are added.
    units = _units(config, image_size)
    return sum(unit.conv1.flops + unit.conv2.flops for unit in units)


def saved_activation_bytes(config: BitConfig, image_size: int, remat: str, itemsize: int) -> float:
    """Returns the bytes of residuals saved for the backward pass, per image, in all units."""
    units = list(_units(config, image_size))
    # The input of the root's max-pooling, and of the last GroupNorm.
    root = itemsize * next(convolutions(config, image_size)).num_outputs
    last = itemsize * units[-1].num_outputs
    inputs = sum(unit.num_inputs for unit in units)
    middle = sum(unit.conv1.num_outputs + unit.conv2.num_outputs for unit in units)
    # "none" also saves the output of each ReLU, which the TPU compiler recomputes in the
    # convolutions that read it.
    elements = {
        "none": 2 * (inputs + middle),
        "dots": inputs + middle,
        "mlp_hidden": inputs,
        "full": inputs,
    }[remat]
    return root + last + itemsize * elements


def live_block_bytes(config: BitConfig, image_size: int, itemsize: int) -> float:
    """Returns the bytes that are live in the middle of one unit, per image."""

    def live_elements(unit: "_Unit") -> float:
        # GroupNorm and ReLU are fused into the convolutions.
        middle = unit.conv1.num_outputs + unit.conv2.num_outputs
        return 2 * max(unit.num_inputs, unit.num_outputs) + middle

    return itemsize * max(map(live_elements, _units(config, image_size)))


class _Unit(NamedTuple):
    """A bottleneck unit: the elements of its input, per image, and its convolutions."""

    num_inputs: int
    conv1: Convolution
    conv2: Convolution
    conv3: Convolution
    conv_proj: Convolution | None

    @property
    def num_outputs(self) -> int:
        """Elements of the unit's output, per image."""
        return self.conv3.num_outputs


def _units(config: BitConfig, image_size: int) -> Iterator[_Unit]:
    units: dict[str, dict[str, Convolution]] = {}
    for conv in convolutions(config, image_size):
        path, _, name = conv.path.rpartition("/")
        if path:
            units.setdefault(path, {})[name] = conv
    for by_name in units.values():
        conv1 = by_name["conv1"]
        # The 1×1 convolution keeps the size.
        num_inputs = conv1.num_outputs // conv1.shape[3] * conv1.shape[2]
        convs = (conv1, by_name["conv2"], by_name["conv3"], by_name.get("conv_proj"))
        yield _Unit(num_inputs, *convs)


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

    Standardized kernels are written, and read by each convolution, in the computation's dtype; the
    kernels themselves, their gradients and the head are float32. GroupNorm and ReLU are fused into
    the convolutions before and after them.
    """

    def weight_bytes(num_weights: int) -> float:
        # The gradient of a standardized kernel is written, read with the kernel, and replaced.
        num_float32, num_reads = (5, 2) if train else (1, 1)
        return num_weights * (num_float32 * _FLOAT32 + (1 + num_reads) * itemsize) / batch_size

    def conv_traffic(convs: list[tuple[Convolution, int]], recomputed: float) -> Traffic:
        flops = unfused = weights = 0.0
        for conv, num_inputs in convs:
            flops += passes * conv.flops
            weights += weight_bytes(math.prod(conv.shape))
            # In the backward pass, the input is read by the gradient of the kernel and by that of
            # GroupNorm, and its gradient written; that of the output is read twice.
            reads_in, reads_out = (4, 3) if train else (1, 1)
            unfused += itemsize * (reads_in * num_inputs + reads_out * conv.num_outputs)
        return Traffic(flops, unfused + weights, flops + recomputed, weights)

    passes = 3 if train else 1
    units = list(_units(config, image_size))
    spatial = [(unit.conv2, unit.conv1.num_outputs) for unit in units]
    pointwise = [(unit.conv1, unit.num_inputs) for unit in units]
    pointwise += [(unit.conv3, unit.conv2.num_outputs) for unit in units]
    pointwise += [(unit.conv_proj, unit.num_inputs) for unit in units if unit.conv_proj]
    # If each unit is one kernel, it reads its input and writes its output. Its backward pass reads
    # the input and the gradient of the output, writes that of the input, and recomputes.
    unit_bytes = itemsize * sum(
        (3 if train else 1) * unit.num_inputs + (2 if train else 1) * unit.num_outputs
        for unit in units
    )
    recomputed = {
        name: sum(getattr(unit, name).flops for unit in units) if train else 0
        for name in ("conv1", "conv2")
    }
    pointwise_traffic = conv_traffic(pointwise, recomputed["conv1"])
    stem = next(convolutions(config, image_size))
    # The gradient of the image, which is uint8, is not computed.
    stem_passes = 2 if train else 1
    stem_flops = stem_passes * stem.flops
    stem_bytes: float = stem_passes * (3 * image_size**2 + itemsize * stem.num_outputs)
    stem_bytes += weight_bytes(math.prod(stem.shape))
    num_weights = config.num_features * num_classes
    head_flops = 2.0 * passes * num_weights
    head_bytes: float = passes * itemsize * units[-1].num_outputs
    head_bytes += num_weights * _FLOAT32 * passes / batch_size
    return {
        STEM: Traffic(stem_flops, stem_bytes, stem_flops, stem_bytes),
        SPATIAL: conv_traffic(spatial, recomputed["conv2"]),
        POINTWISE: pointwise_traffic._replace(
            fused_bytes=pointwise_traffic.fused_bytes + unit_bytes
        ),
        GROUP_NORM: Traffic(0.0, 0.0, 0.0, 0.0),  # Fused into the convolutions.
        HEAD: Traffic(head_flops, head_bytes, head_flops, head_bytes),
    }
