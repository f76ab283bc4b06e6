"""Lower bounds on the FLOPs and memory traffic per step, by region of the model.

The traffic depends on what a kernel fuses, so there are two bounds:

- unfused: Each matmul reads its operands and writes its result once. LayerNorm and GELU are fused
  into reading operands, additions and multiplications into writing results. Hidden units are
  written before GELU, and read again for its derivative. A program can do better if a matmul's
  result is still in on-chip memory when the next one reads it.
- fused: Hidden units never leave the chip. The backward pass reads the input of an MLP once and
  recomputes the hidden units for all four gradients: seven matmuls instead of six.
"""

from typing import Any, NamedTuple

from mixer_jax.models.family import ModelFamily, Traffic
from mixer_jax.planning.hlo.attribution import OPTIMIZER, OTHER

_FLOAT32 = 4
# Adam reads parameters, two moments and gradients, these twice because of clipping by their norm,
# and writes parameters and moments.
_ADAM_ACCESSES = 8


class StepSpec(NamedTuple):
    """One step on one device.

    Attributes:
        family: Model family.
        architecture: Architecture config of the model.
        image_size: Side of the square input, in pixels.
        num_classes: Outputs of the head.
        batch_size: Images, which share the traffic of parameters and optimizer.
        itemsize: Bytes per element of the computation's dtype.
        train: Whether the step trains, with Adam and clipping, or only infers.
    """

    family: ModelFamily
    architecture: Any
    image_size: int
    num_classes: int
    batch_size: int
    itemsize: int = 2
    train: bool = True


def estimate_traffic(step: StepSpec) -> dict[str, Traffic]:
    """Estimates the traffic of each region of a step, per image."""
    model = (step.architecture, step.image_size, step.num_classes)
    traffic = step.family.cost_model.estimate_traffic(
        *model, batch_size=step.batch_size, itemsize=step.itemsize, train=step.train
    )
    update = 0.0
    if step.train:
        num_params = step.family.num_params(*model)
        update = _ADAM_ACCESSES * _FLOAT32 * num_params / step.batch_size
    no_traffic = Traffic(0.0, 0.0, 0.0, 0.0)
    optimizer = no_traffic._replace(unfused_bytes=update, fused_bytes=update)
    return {**traffic, OPTIMIZER: optimizer, OTHER: no_traffic}
