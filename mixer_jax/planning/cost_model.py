"""Memory, traffic and communication of a training step, by formula."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from mixer_jax.models.family import Shape
from mixer_jax.planning.hlo_collectives import (
    GRADIENTS,
    MIXUP_EXAMPLES,
    PARAMETERS,
    SCALARS,
    Collective,
    ReplicaGroups,
)
from mixer_jax.planning.run_spec import RunSpec

_FLOAT32 = 4


class Memory(NamedTuple):
    """Bytes of memory per device.

    Attributes:
        parameters: Float32 parameters.
        moments: Optimizer moments and averaged parameters.
        activations: Residuals saved for the backward pass, and live activations of one block.
        gradients: Float32 gradients, and parameters cast to the computation's dtype.
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

    @property
    def arguments(self) -> float:
        """Arguments of the training step: state and batch."""
        return self.parameters + self.moments + self.batch


def estimate_memory(run: RunSpec) -> Memory:
    """Estimates the peak memory of a training step; compilers may do better or worse."""

    def sharded_size(arrays: Iterable[tuple[str, Shape]]) -> float:
        return sum(
            math.prod(shape) / (run.fsdp if _is_fsdp_sharded(run, path, shape) else 1)
            for path, shape in arrays
        )

    microbatch_per_device = run.images_per_device / run.num_microbatches
    # Microbatches' gradients are summed unsharded; kernels are gathered in the computation's dtype.
    gradients = _FLOAT32 * run.num_params * (2 if run.num_microbatches > 1 else 1)
    return Memory(
        parameters=_FLOAT32 * sharded_size(run.param_shapes.items()),
        moments=_FLOAT32 * sharded_size(run.moments),
        batch=run.images_per_device * _example_bytes(run),
        activations=microbatch_per_device * (run.saved_activation_bytes + run.live_block_bytes),
        gradients=gradients + run.itemsize * run.num_params,
    )


def estimate_eval_memory(run: RunSpec, batch_size: int) -> float:
    """Estimates the bytes per device in an evaluation step of `batch_size` images in total."""
    images = batch_size / run.num_devices
    return (
        estimate_memory(run).parameters
        + run.itemsize * run.num_params
        + images * (_example_bytes(run) + run.live_block_bytes)
    )


def _example_bytes(run: RunSpec) -> int:
    return 3 * run.image_size**2 + _FLOAT32


def _is_fsdp_sharded(run: RunSpec, path: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a parameter is sharded over `fsdp` devices; see `state_sharding`."""
    is_divisible = any(size % run.fsdp == 0 for size in shape)
    return run.fsdp > 1 and is_divisible and run.family.is_fsdp_sharded(tuple(path.split("/")))


def min_hbm_bytes(run: RunSpec) -> float:
    """Returns a lower bound on memory traffic per device per training step, in bytes.

    The optimizer reads parameters, moments and gradients, and writes all but the gradients. Saved
    activations are written and read. Kernels are read in the forward and the backward pass.
    """
    memory = estimate_memory(run)
    update = 2 * (memory.parameters + memory.moments) + memory.parameters
    activations = 2 * run.images_per_device * run.saved_activation_bytes
    kernels = 2 * run.num_microbatches * run.itemsize * run.num_params
    return update + run.num_gradients * (activations + kernels)


def estimate_collectives(run: RunSpec) -> list[Collective]:
    """Estimates the collectives of a training step; see `sharded_value_and_grad`."""
    if run.num_devices == 1:
        return []
    data, fsdp = run.num_devices // run.fsdp, run.fsdp
    devices = range(run.num_devices)
    world: ReplicaGroups = (tuple(devices),)
    ring: ReplicaGroups = tuple((n, (n + 1) % run.num_devices) for n in devices)
    fsdp_groups: ReplicaGroups = tuple(tuple(devices[n : n + fsdp]) for n in devices[::fsdp])
    data_groups: ReplicaGroups = tuple(tuple(devices[n::fsdp]) for n in range(fsdp))
    cast = not_cast = replicated = 0
    for path, shape in run.param_shapes.items():
        size = math.prod(shape)
        if not _is_fsdp_sharded(run, path, shape):
            replicated += size
        elif run.family.is_cast(tuple(path.split("/"))):
            cast += size  # Gathered in the computation's dtype.
        else:
            not_cast += size
    dtype = "bf16" if run.itemsize == 2 else "f32"
    axis = "all" if data > 1 and fsdp > 1 else "fsdp" if fsdp > 1 else "data"
    sharded = _FLOAT32 * (cast + not_cast)
    example = 3 * run.image_size**2 + _FLOAT32 * run.num_classes
    collectives = [
        Collective("all-reduce", "f32", axis, GRADIENTS, 1, _FLOAT32 * replicated, world),
        Collective("all-gather", dtype, "fsdp", PARAMETERS, 1, run.itemsize * cast, fsdp_groups),
        Collective("all-gather", "f32", "fsdp", PARAMETERS, 1, _FLOAT32 * not_cast, fsdp_groups),
        Collective("reduce-scatter", "f32", "fsdp", GRADIENTS, 1, sharded, fsdp_groups),
        Collective("all-reduce", "f32", "data", GRADIENTS, 1, sharded / fsdp, data_groups),
        Collective("collective-permute", "u8", axis, MIXUP_EXAMPLES, 1, example * run.mixup, ring),
        Collective("all-reduce", "f32", axis, SCALARS, 1, _FLOAT32, world),
    ]
    count = run.num_gradients
    return [
        c
        if c.tensor_role == MIXUP_EXAMPLES
        else c._replace(num_executions=count, num_bytes=count * c.num_bytes)
        for c in collectives
        if c.num_bytes and len(c.replica_groups[0]) > 1
    ]
