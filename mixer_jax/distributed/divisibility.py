"""What divides over devices and what does not: meshes and batches, in plain numbers."""

from mixer_jax.errors import UserError


def check_mesh(data: int, fsdp: int, devices: int, slices: int = 1) -> None:
    """Checks that a mesh is made up of so many devices.

    Args:
        data: devices along the data axis; 0: all that `fsdp` leaves.
        fsdp: devices that the kernels are split over.
        devices: in all.
        slices: of TPUs, that they lie in.

    Raises:
        UserError: data × fsdp is not the number of devices, or fsdp does not divide a slice.
    """
    if devices % fsdp or (data and data * fsdp != devices):
        raise UserError(
            f"mesh.data={data} and mesh.fsdp={fsdp} do not make up the {devices} devices; "
            f"set mesh.fsdp to a divisor of {devices} and mesh.data to 0"
        )
    in_slice = devices // slices
    if in_slice % fsdp:
        raise UserError(
            f"mesh.fsdp={fsdp} does not divide the {in_slice} devices of a slice; "
            f"set it to a divisor of {in_slice}"
        )


def check_divisible(key: str, size: int, devices: int, pieces: int = 1) -> None:
    """Checks that each of `pieces` parts of a batch divides over the devices.

    Raises:
        UserError: it does not; names the nearest sizes that do.
    """
    unit = devices * pieces
    if size % unit:
        below = size // unit * unit
        nearest = " and ".join(str(near) for near in (below, below + unit) if near)
        what = f"{devices} devices" + (f" × {pieces} accumulation steps" if pieces > 1 else "")
        raise UserError(f"{key}={size} is not divisible by {what}; the nearest are {nearest}")
