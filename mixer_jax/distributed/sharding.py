"""The device mesh and where arrays lie on it: batches, parameters and their moments."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mixer_jax.distributed.divisibility import check_divisible, check_mesh

DATA, FSDP = "data", "fsdp"


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh ("data", "fsdp"), laid out so that neighbours on it are neighbours indeed.

    Of several TPU slices each takes a part of the data axis, so that only gradients cross the
    slow network between them.

    Args:
        data: devices along the data axis; 0 takes all that `fsdp` leaves.
        fsdp: devices that the kernels are split over.
        devices: to use; None: all of all hosts.

    Raises:
        UserError: data × fsdp is not the number of devices, or fsdp does not divide a slice.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    check_mesh(data, fsdp, count, slices)
    # Such as 8 of 4 × 4 × 4 chips: no product of whole sides, so that a side is divided.
    split = {"allow_split_physical_axes": True}
    if slices == 1:
        shape = (count // fsdp, fsdp)
        laid_out = mesh_utils.create_device_mesh(shape, devices, **split)
    else:
        shape = (count // slices // fsdp, fsdp)
        laid_out = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1), devices, **split)
    return Mesh(laid_out, (DATA, FSDP), axis_types=(AxisType.Auto, AxisType.Auto))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns arrays, in a compiled function, that every device is to hold whole."""
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def state_sharding(tree: Any, mesh: Mesh) -> Any:
    """Returns a sharding for each array: kernels lie split over "fsdp", all else on every device.

    Kernels are all but a thousandth of a Mixer; splitting the rest would save nothing and send
    many small messages.

    Args:
        tree: arrays or their shapes; optimizer moments have their parameter's name and shape and
            so fall where their parameter does.
        mesh: from `make_mesh`.
    """

    def shard(path: Any, array: Any) -> NamedSharding:
        spec: list[str | None] = [None] * len(array.shape)
        axis = fsdp_axis(array.shape, mesh)
        if axis is not None and getattr(path[-1], "key", None) == "kernel":
            spec[axis] = FSDP
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(shard, tree)


def fsdp_axis(shape: tuple[int, ...], mesh: Mesh) -> int | None:
    """Returns the axis that a kernel is split along: the largest divisible one, if there is one."""
    width = mesh.shape[FSDP]
    divisible = [axis for axis, size in enumerate(shape) if size and size % width == 0]
    if width == 1 or not divisible:
        return None
    return max(divisible, key=lambda axis: shape[axis])


def check_batch_size(key: str, batch_size: int, mesh: Mesh, pieces: int = 1) -> None:
    """Raises UserError unless each of `pieces` parts of a batch divides over the devices."""
    check_divisible(key, batch_size, mesh.size, pieces)
