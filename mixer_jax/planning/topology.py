"""Accelerators that need not be here: what `--topology` names, and TPU devices to compile for."""

import importlib.util
import math
from typing import Any, NamedTuple

from mixer_jax.distributed.hardware import CHIPS, ChipSpec
from mixer_jax.errors import UserError, summarize_error

# Before JAX is imported: devices of this machine have no say, another process may be planning, and
# programs for devices that are not here cannot be read back from a cache.
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
    """Chips and how they are linked.

    Attributes:
        text: as it was named.
        chip: which kind.
        grid: chips along each axis of a slice; of GPUs their number.
        slices: of that size, which a slower network joins.
    """

    text: str
    chip: ChipSpec
    grid: tuple[int, ...]
    slices: int

    @property
    def num_chips(self) -> int:
        """Number of chips of all slices."""
        return self.slices * math.prod(self.grid)

    @property
    def num_devices(self) -> int:
        """Number of devices, as JAX counts them."""
        return self.num_chips * self.chip.devices_per_chip

    @property
    def allowed(self) -> float:
        """Bytes of memory that programs may use on a device."""
        return self.chip.memory_gib * GIB

    @property
    def egress(self) -> float:
        """Bytes/s that a chip can send to its neighbours over all its links together."""
        if not self.chip.is_tpu:
            return self.chip.link_bandwidth
        links = sum(min(side - 1, 2) for side in self.grid)
        return self.chip.link_bandwidth * links

    def describe(self) -> str:
        """Returns what it is, for people."""
        chips = f"{self.num_chips:,} chip{'s' if self.num_chips > 1 else ''}"
        devices = f", {self.num_devices:,} devices" if self.chip.devices_per_chip > 1 else ""
        slices = f" in {self.slices} slices" if self.slices > 1 else ""
        return f"{self.text}{slices}: {chips}{devices}"


class DeviceLocation(NamedTuple):
    """Where a device is: its chip, and the neighbourhood of chips that links join."""

    chip: Any
    neighbourhood: int


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Returns the topology that a text such as "v5e:8x8" or "h100:16" names.

    Args:
        text: a chip of `CHIPS`, a colon, and how many: sides for TPUs, a number for GPUs.
        slices: how many of these.

    Raises:
        UserError: the chip is unknown, or there cannot be so many.
    """
    name, _, size = text.partition(":")
    chip = CHIPS.get(name)
    if chip is None:
        raise UserError(
            f"--topology={text}: there is no chip {name!r}; choose of {', '.join(CHIPS)}, "
            "e.g. v5e:8x8 or h100:16"
        )
    if slices < 1 or (slices > 1 and not chip.is_tpu):
        rule = "pass 1 or more" if slices < 1 else "GPUs have none; give their number in all"
        raise UserError(f"--slices={slices} is out of range; {rule}")
    sides = size.split("x")
    wanted = chip.torus_dims or 1
    grid = tuple(int(side) for side in sides if side.isascii() and side.isdecimal())
    if len(grid) != len(sides) or len(grid) != wanted or 0 in grid:
        example = _SIZES[chip.torus_dims] if chip.is_tpu else "8, 16 or 64"
        what = f"{chip.torus_dims} sides, e.g." if chip.is_tpu else "how many, e.g."
        raise UserError(f"--topology={text}: {name} takes {what} {name}:{example}")
    if chip.nvlink_domain and grid[0] > chip.nvlink_domain and grid[0] % chip.nvlink_domain:
        raise UserError(
            f"--topology={text}: {name} come in machines of {chip.nvlink_domain}; pass up to "
            f"{chip.nvlink_domain}, or a multiple"
        )
    return Topology(text, chip, grid, slices)


def larger_topologies(topology: Topology) -> list[Topology]:
    """Returns topologies of the same chip with more of them, the smallest first."""
    chip, slices = topology.chip, topology.slices
    if chip.is_tpu:
        sizes = _SIZES[chip.torus_dims].split(", ")
    else:
        numbers = [topology.num_chips * 2**power for power in range(1, 8)]
        whole = [n for n in numbers if n <= chip.nvlink_domain or n % chip.nvlink_domain == 0]
        sizes = list(map(str, whole))
    made = [parse_topology(f"{chip.name}:{size}", slices) for size in sizes]
    return [other for other in made if other.num_chips > topology.num_chips]


def tpu_devices(topology: Topology) -> list[Any]:
    """Returns TPU devices to compile for, none of which is here.

    Raises:
        UserError: libtpu, the compiler, is not installed, or it does not know the size.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning for TPUs needs their compiler, which is not installed: "
            'pip install "jax[tpu]" (Linux on x86-64)'
        )
    import jax
    from jax.experimental import topologies

    settings: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chip.name in {"v4", "v5p"}:
        settings["chip_config_name"] = "megacore"  # One device a chip.
    if math.prod(topology.grid) == 1:
        settings["chips_per_host_bounds"] = topology.grid + (1,) * (3 - len(topology.grid))
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.text, **settings
        )
    except jax.errors.JaxRuntimeError as error:
        sizes = _SIZES[topology.chip.torus_dims]
        raise UserError(
            f"--topology={topology.text}: the compiler does not take this size "
            f"({summarize_error(error)}); try one of {sizes}"
        ) from error
    return list(described.devices)


def device_locations(topology: Topology, devices: list[Any] | None) -> list[DeviceLocation]:
    """Returns where each device is, in the order of the mesh.

    Args:
        topology: of all.
        devices: in that order; None for GPUs, which lie machine by machine.
    """
    if devices is None:
        size = topology.chip.nvlink_domain
        return [DeviceLocation(n, n // size) for n in range(topology.num_devices)]
    slices = [getattr(device, "slice_index", 0) for device in devices]
    return [
        DeviceLocation((number, tuple(device.coords)), number)
        for device, number in zip(devices, slices, strict=True)
    ]
