"""What a training step costs by formula: memory, recomputed FLOPs, what devices send."""

import dataclasses
import math
from typing import NamedTuple

from ml_collections import ConfigDict

from mixer_jax.config.config import architecture_overrides
from mixer_jax.models.mixer_config import (
    MixerConfig,
    forward_flops,
    get_config,
    num_tokens,
    param_shapes,
)
from mixer_jax.planning.hlo.collectives import Collective
from mixer_jax.planning.hlo.replica_groups import Groups
from mixer_jax.planning.hlo.tensor_roles import GRADIENTS, MIXUP_ROWS, PARAMETERS, SCALARS

_FLOAT32 = 4


class RunSpec(NamedTuple):
    """A training run in numbers.

    Attributes:
        widths: of the model.
        image_size: pixels.
        num_classes: of the head.
        itemsize: bytes of a number of the computation.
        batch_size: images a step.
        pieces: that a batch is computed in.
        fsdp: devices that parameters are split over.
        devices: in all.
        remat: policy.
        unroll: blocks an iteration; 0: all.
        moments: arrays of the optimizer, and averages, for each parameter.
        mixup: whether rows are mixed.
        num_steps: of the run.
    """

    widths: MixerConfig
    image_size: int
    num_classes: int
    itemsize: int
    batch_size: int
    pieces: int
    fsdp: int
    devices: int
    remat: str
    unroll: int
    moments: int
    mixup: bool
    num_steps: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, by path."""
        tokens = num_tokens(self.widths, self.image_size)
        return param_shapes(self.widths, tokens, self.num_classes)

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def rows(self) -> float:
        """Images that a device computes at once."""
        return self.batch_size / self.devices / self.pieces

    @property
    def model_flops(self) -> int:
        """FLOPs of a step over all devices that the model asks for: three forward passes."""
        return 3 * self.batch_size * forward_flops(self.widths, self.image_size, self.num_classes)

    @property
    def recomputed_flops(self) -> int:
        """FLOPs of a step over all devices that the remat policy adds, in matrix products."""
        whole = forward_flops(self.widths, self.image_size, 0)
        bare = dataclasses.replace(self.widths, num_blocks=0)
        blocks = whole - forward_flops(bare, self.image_size, 0)
        tokens, channels = self.widths.tokens_mlp_dim, self.widths.channels_mlp_dim
        # An MLP has two products of the same size. The outputs of the second are kept, or all is
        # recomputed but the last, whose output only the next block needs, which has it.
        again = {"mlp_hidden": tokens + channels, "full": 2 * tokens + channels}
        return self.batch_size * blocks * again.get(self.remat, 0) // (2 * (tokens + channels))


class Memory(NamedTuple):
    """Bytes on a device.

    Attributes:
        parameters: float32.
        moments: of the optimizer, and averaged parameters.
        batch: of images and labels.
        activations: kept for the backward pass, and the largest that are not.
        gradients: float32, and parameters in the type of the computation.
    """

    parameters: float
    moments: float
    batch: float
    activations: float
    gradients: float

    @property
    def total(self) -> float:
        """Sum of all."""
        return sum(self)


def run_spec(config: ConfigDict, num_classes: int, num_steps: int, devices: int) -> RunSpec:
    """Returns a config in numbers.

    Args:
        config: valid, as `plannable` returns it.
        num_classes: of its data.
        num_steps: of its run.
        devices: to run on.
    """
    moments = 2 if config.optimizer.name == "adam" else 1
    return RunSpec(
        get_config(config.model.variant, **architecture_overrides(config.model)),
        config.image_size,
        num_classes,
        4 if config.model.dtype == "float32" else 2,
        config.batch_size,
        config.recipe.grad_accum_steps,
        config.mesh.fsdp,
        devices,
        config.model.remat,
        config.model.scan_unroll,
        moments + (config.recipe.ema_decay > 0),
        config.recipe.mixup > 0,
        num_steps,
    )


def estimate_memory(work: RunSpec) -> Memory:
    """Returns an estimate of what lies on a device at most; compilers may do better or worse."""
    split = sum(
        math.prod(shape) / (work.fsdp if is_fsdp_sharded(path, shape, work.fsdp) else 1)
        for path, shape in work.shapes.items()
    )
    whole = work.num_parameters
    # Gradients of every piece are added up whole; kernels are gathered in the computation's type.
    sums = _FLOAT32 * whole * (2 if work.pieces > 1 else 1)
    return Memory(
        _FLOAT32 * split,
        _FLOAT32 * split * work.moments,
        work.batch_size / work.devices * (3 * work.image_size**2 + _FLOAT32),
        work.rows
        * (work.widths.num_blocks * saved_activation_bytes(work) + live_block_bytes(work)),
        sums + work.itemsize * whole,
    )


def estimate_eval_memory(work: RunSpec, batch_size: int) -> float:
    """Returns an estimate of the bytes on a device where a batch is only scored.

    Args:
        work: the training run.
        batch_size: images of all devices that are scored at once.
    """
    lies = estimate_memory(work)
    rows = batch_size / work.devices
    images = rows * (3 * work.image_size**2 + _FLOAT32)
    return (
        lies.parameters
        + work.itemsize * work.num_parameters
        + images
        + rows * live_block_bytes(work)
    )


def saved_activation_bytes(work: RunSpec) -> float:
    """Returns the bytes that the backward pass keeps of a block, for one image."""
    x, hidden = _sizes(work)
    arrays = {
        # x before and after both LayerNorms, hidden layers before and after GELU.
        "none": 4 * x + 2 * hidden,
        # The block's input and the outputs of its four products.
        "dots": 3 * x + hidden,
        "mlp_hidden": 3 * x,
        "full": x,
    }[work.remat]
    return work.itemsize * arrays


def live_block_bytes(work: RunSpec) -> float:
    """Returns the bytes that are live in the middle of one block, for one image."""
    x, hidden = _sizes(work)
    return work.itemsize * (4 * x + 3 * hidden) + _FLOAT32 * 2 * x


def _sizes(work: RunSpec) -> tuple[int, int]:
    """Returns the numbers of an image's tokens, and of the hidden layers of both MLPs."""
    tokens, widths = num_tokens(work.widths, work.image_size), work.widths
    hidden = widths.hidden_dim * widths.tokens_mlp_dim + tokens * widths.channels_mlp_dim
    return tokens * widths.hidden_dim, hidden


def is_fsdp_sharded(path: str, shape: tuple[int, ...], fsdp: int) -> bool:
    """Returns whether a parameter is split over `fsdp` devices; see `state_sharding`."""
    is_kernel = path.endswith("kernel")
    return is_kernel and fsdp > 1 and any(side % fsdp == 0 for side in shape)


def min_hbm_bytes(work: RunSpec) -> float:
    """Returns bytes that a device moves at the least to and from its memory in a step.

    The optimizer reads parameters, moments and gradients and writes all but the gradients;
    what is kept of activations is written and read; kernels are read forward and backward.
    """
    lies = estimate_memory(work)
    update = 2 * (lies.parameters + lies.moments) + lies.parameters
    kept_bytes = (
        work.batch_size / work.devices * work.widths.num_blocks * saved_activation_bytes(work)
    )
    return update + 2 * kept_bytes + 2 * work.pieces * work.itemsize * work.num_parameters


def estimate_collectives(work: RunSpec) -> list[Collective]:
    """Returns what the devices send each other in a step; see `parallel/gradients.py`."""
    data = work.devices // work.fsdp
    everyone: Groups = (tuple(range(work.devices)),)
    ring: Groups = tuple((at, (at + 1) % work.devices) for at in range(work.devices))
    along_fsdp: Groups = tuple(
        tuple(range(first, first + work.fsdp)) for first in range(0, work.devices, work.fsdp)
    )
    along_data: Groups = tuple(
        tuple(range(first, work.devices, work.fsdp)) for first in range(work.fsdp)
    )
    kernels = head = rest = 0
    for path, shape in work.shapes.items():
        size = math.prod(shape)
        if not is_fsdp_sharded(path, shape, work.fsdp):
            rest += size
        elif path.startswith("head"):
            head += size  # It computes, and so travels, in float32.
        else:
            kernels += size
    low = "bf16" if work.itemsize == 2 else "f32"
    every = "all" if data > 1 and work.fsdp > 1 else "fsdp" if work.fsdp > 1 else "data"
    split, sums = kernels + head, _FLOAT32 * rest
    row = 3 * work.image_size**2 + _FLOAT32 * work.num_classes
    found = [
        Collective("all-reduce", "f32", every, GRADIENTS, 1, sums, everyone),
        Collective("all-gather", low, "fsdp", PARAMETERS, 1, work.itemsize * kernels, along_fsdp),
        Collective("all-gather", "f32", "fsdp", PARAMETERS, 1, _FLOAT32 * head, along_fsdp),
        Collective("reduce-scatter", "f32", "fsdp", GRADIENTS, 1, _FLOAT32 * split, along_fsdp),
        Collective(
            "all-reduce", "f32", "data", GRADIENTS, 1, _FLOAT32 * split / work.fsdp, along_data
        ),
        Collective("collective-permute", "u8", every, MIXUP_ROWS, 1, row * work.mixup, ring),
        Collective("all-reduce", "f32", every, SCALARS, 1, _FLOAT32, everyone),
    ]
    alone = work.devices == 1
    return [] if alone else [t for t in found if t.num_bytes and len(t.groups[0]) > 1]
