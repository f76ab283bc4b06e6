"""Accelerator topologies named by `--topology`, and TPU devices to compile for without a TPU."""

import importlib.util
import math
import re
from typing import Any, NamedTuple

from mixer_jax.distributed.hardware import CHIPS, ChipSpec
from mixer_jax.errors import UserError, missing_library_error, summarize_error

# To be set before JAX is imported. Devices of this machine are not used, another process may be
# compiling, and the compilation cache cannot load programs for devices that are not present.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
}
GIB = 2**30
_SIZES = {
    2: "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16",
    3: "1x1x1, 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 8x8x8",
}


class Topology(NamedTuple):
    """Chips and the links between them.

    Attributes:
        name: Chip and size, e.g. "v5e:8x8".
        grid: Chips along each axis of a slice; for GPUs, their number.
        num_slices: Number of slices of this size, connected by a slower network.
    """

    name: str
    chip: ChipSpec
    grid: tuple[int, ...]
    num_slices: int

    @property
    def num_chips(self) -> int:
        """Number of chips in all slices."""
        return self.num_slices * math.prod(self.grid)

    @property
    def num_devices(self) -> int:
        """Number of devices, as JAX counts them."""
        return self.num_chips * self.chip.devices_per_chip

    @property
    def hbm_bytes(self) -> float:
        """Bytes of memory available to programs, per device."""
        return self.chip.memory_gib * GIB

    @property
    def ici_bandwidth(self) -> float:
        """Bytes/s that a chip can send over all its links (ICI or NVLink) together."""
        if not self.chip.is_tpu:
            return self.chip.link_bandwidth
        links = sum(min(size - 1, 2) for size in self.grid)
        return self.chip.link_bandwidth * links

    def describe(self) -> str:
        """Formats name, slices, chips and devices for people."""
        chips = f"{self.num_chips:,} chip{'s' if self.num_chips > 1 else ''}"
        devices = f", {self.num_devices:,} devices" if self.chip.devices_per_chip > 1 else ""
        slices = f" in {self.num_slices} slices" if self.num_slices > 1 else ""
        return f"{self.name}{slices}: {chips}{devices}"


class DeviceLocation(NamedTuple):
    """Location of one device: its chip, and the index of its slice or GPU machine."""

    chip: Any
    ici_domain: int


def parse_topology(name: str, num_slices: int = 1) -> Topology:
    """Parses a topology such as "v5e:8x8" or "h100:16".

    Args:
        name: Chip of `CHIPS` and size, separated by a colon: the sides of a slice for TPUs, the
            number of chips for GPUs.
        num_slices: Number of slices.

    Raises:
        UserError: The chip is unknown or the size is not possible.
    """
    chip_name, _, size = name.partition(":")
    chip = CHIPS.get(chip_name)
    if chip is None:
        raise UserError(
            f"--topology must name one of the chips {', '.join(CHIPS)}, got {name!r}. "
            "Pass, for example, v5e:8x8 or h100:16."
        )
    if num_slices < 1:
        raise UserError(f"--slices must be at least 1, got {num_slices}.")
    if num_slices > 1 and not chip.is_tpu:
        raise UserError(
            f"--slices must be 1 for GPUs, got {num_slices}. "
            f"Pass the total number of GPUs, for example --topology={chip_name}:16."
        )
    sides = size.split("x")
    grid = tuple(int(side) for side in sides if re.fullmatch("[0-9]{1,9}", side))
    if len(grid) != len(sides) or len(grid) != (chip.torus_dims or 1) or 0 in grid:
        rule = f"{chip.torus_dims} sides" if chip.is_tpu else "the number of GPUs"
        sizes = _SIZES[chip.torus_dims] if chip.is_tpu else "8, 16 or 64"
        raise UserError(
            f"--topology must give {rule} for {chip_name}, got {name!r}. "
            f"Pass, for example, {chip_name}:{sizes}."
        )
    if chip.nvlink_domain and grid[0] > chip.nvlink_domain and grid[0] % chip.nvlink_domain:
        raise UserError(
            f"--topology must have up to {chip.nvlink_domain} {chip_name}, one machine, or a "
            f"multiple of {chip.nvlink_domain}, got {name!r}."
        )
    return Topology(name, chip, grid, num_slices)


def larger_topologies(topology: Topology) -> list[Topology]:
    """Returns topologies with more of the same chips, the smallest first."""
    chip = topology.chip
    if chip.is_tpu:
        sizes = _SIZES[chip.torus_dims].split(", ")
    else:
        numbers = [topology.num_chips * 2**power for power in range(1, 8)]
        sizes = [str(n) for n in numbers if n <= chip.nvlink_domain or n % chip.nvlink_domain == 0]
    topologies = [parse_topology(f"{chip.name}:{size}", topology.num_slices) for size in sizes]
    return [other for other in topologies if other.num_chips > topology.num_chips]


def tpu_devices(topology: Topology) -> list[Any]:
    """Returns TPU devices to compile for, without a TPU.

    Raises:
        UserError: The compiler, libtpu, is not installed, or does not support the size.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise missing_library_error(
            "planning for TPUs", "libtpu, the TPU compiler", '"jax[tpu]" (Linux on x86-64)'
        )
    import jax
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    if topology.chip.name in {"v4", "v5p"}:
        options["chip_config_name"] = "megacore"  # One device per chip.
    if math.prod(topology.grid) == 1:
        options["chips_per_host_bounds"] = topology.grid + (1,) * (3 - len(topology.grid))
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology must have a size that the compiler supports, got {topology.name} "
            f"({summarize_error(error)}). Try one of {_SIZES[topology.chip.torus_dims]}."
        ) from error
    return list(description.devices)


def device_locations(topology: Topology, devices: list[Any] | None) -> list[DeviceLocation]:
    """Returns the location of each device of a mesh.

    Without devices, they are numbered chip by chip and slice by slice, or machine by machine.
    """
    chip = topology.chip
    if devices is None:
        domain_size = chip.nvlink_domain or topology.num_devices // topology.num_slices
        return [
            DeviceLocation(n // chip.devices_per_chip, n // domain_size)
            for n in range(topology.num_devices)
        ]
    slices = [getattr(device, "slice_index", 0) for device in devices]
    return [
        DeviceLocation((slice_index, tuple(device.coords)), slice_index)
        for device, slice_index in zip(devices, slices, strict=True)
    ]
