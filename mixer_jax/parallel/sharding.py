"""The device mesh and where arrays lie on it: batches, parameters and their moments."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mixer_jax.errors import UserError

DATA, FSDP = "data", "fsdp"


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh ("data", "fsdp").

    Args:
        data: devices along the data axis; 0 takes all that `fsdp` leaves.
        fsdp: devices that each parameter is split over.
        devices: to use; None: all of all hosts.

    Raises:
        UserError: data × fsdp is not the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    if (data or 1) * fsdp > count or count % fsdp or (data and data * fsdp != count):
        raise UserError(
            f"mesh.data={data} and mesh.fsdp={fsdp} do not make up the {count} devices; "
            f"set mesh.fsdp to a divisor of {count} and mesh.data to 0"
        )
    shape, auto = (count // fsdp, fsdp), (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(shape, (DATA, FSDP), axis_types=auto, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(tree: Any, mesh: Mesh) -> Any:
    """Returns a sharding for each array: split over "fsdp" along its largest divisible axis.

    Args:
        tree: arrays or their shapes; optimizer moments have their parameter's shape and so fall
            where their parameter does.
        mesh: from `make_mesh`.
    """

    def shard(array: Any) -> NamedSharding:
        spec: list[str | None] = [None] * len(array.shape)
        divisible = [a for a, n in enumerate(array.shape) if n and n % mesh.shape[FSDP] == 0]
        if divisible:
            spec[max(divisible, key=lambda axis: array.shape[axis])] = FSDP
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(shard, tree)


def check_batch_size(key: str, batch_size: int, mesh: Mesh, pieces: int = 1) -> None:
    """Raises UserError unless each of `pieces` parts of a batch divides over the devices."""
    unit = mesh.size * pieces
    if batch_size % unit:
        below = batch_size // unit * unit
        nearest = " and ".join(str(size) for size in (below, below + unit) if size)
        what = f"{mesh.size} devices" + (f" × {pieces} accumulation steps" if pieces > 1 else "")
        raise UserError(f"{key}={batch_size} is not divisible by {what}; the nearest are {nearest}")
