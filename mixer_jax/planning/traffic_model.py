"""Lower bounds on the FLOPs and memory traffic of a step, by region of the model.

The traffic depends on what a kernel fuses, so there are two bounds:

- unfused: Each matmul reads its operands and writes its result once. LayerNorm and GELU are fused
  into reading operands, additions and multiplications into writing results. Hidden units are
  written before GELU, and read again for its derivative. A program can do better if a matmul's
  result is still in on-chip memory when the next one reads it.
- fused: Hidden units never leave the chip. The backward pass reads the input of an MLP once and
  recomputes the hidden units for all four gradients: seven matmuls instead of six.
"""

import math
from typing import NamedTuple

from mixer_jax.models.mixer_config import MixerConfig, num_tokens, param_shapes
from mixer_jax.planning import mixer_costs
from mixer_jax.planning.hlo.attribution import OPTIMIZER, OTHER
from mixer_jax.planning.mixer_costs import Traffic

_FLOAT32 = 4
# Adam reads parameters, two moments and gradients, these twice because of clipping by their norm,
# and writes parameters and moments.
_ADAM_ACCESSES = 8


class StepSpec(NamedTuple):
    """A step on one device.

    Attributes:
        architecture: Architecture config of the model.
        image_size: Side of the square input, in pixels.
        num_classes: Outputs of the head.
        batch_size: Images, which share the traffic of parameters and optimizer.
        itemsize: Bytes per element of the computation's dtype.
        train: Whether the step trains, with Adam and clipping, or only infers.
    """

    architecture: MixerConfig
    image_size: int
    num_classes: int
    batch_size: int
    itemsize: int = 2
    train: bool = True


def estimate_traffic(step: StepSpec) -> dict[str, Traffic]:
    """Estimates the traffic of each region of a step, per image."""
    config, image_size = step.architecture, step.image_size
    traffic = mixer_costs.estimate_traffic(
        config,
        image_size,
        step.num_classes,
        batch_size=step.batch_size,
        itemsize=step.itemsize,
        train=step.train,
    )
    update = 0.0
    if step.train:
        shapes = param_shapes(config, num_tokens(config, image_size), step.num_classes)
        num_parameters = sum(map(math.prod, shapes.values()))
        update = _ADAM_ACCESSES * _FLOAT32 * num_parameters / step.batch_size
    no_traffic = Traffic(0.0, 0.0, 0.0, 0.0)
    optimizer = no_traffic._replace(unfused_bytes=update, fused_bytes=update)
    return {**traffic, OPTIMIZER: optimizer, OTHER: no_traffic}
