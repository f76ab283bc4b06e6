"""The least time that a step can take: by its arithmetic, its memory traffic, and the network."""

from collections.abc import Sequence
from typing import NamedTuple

from mixer_jax.planning.hlo.collectives import Collective
from mixer_jax.planning.topology import DeviceLocation, Topology

_DAY = 86_400


class RooflineBound(NamedTuple):
    """Seconds that a step takes at the least, if each part ran at the peak of the hardware.

    Attributes:
        arithmetic: executed FLOPs over the peak.
        memory: bytes over the bandwidth of the main memory.
        network: what collectives move over the links that they use.
    """

    arithmetic: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """Where all three overlap perfectly: the longest."""
        return max(self)

    @property
    def serial_seconds(self) -> float:
        """Where nothing overlaps: the sum."""
        return sum(self)

    @property
    def limit(self) -> str:
        """Which part is the longest."""
        return max(self._asdict().items(), key=lambda item: item[1])[0]


class RunCost(NamedTuple):
    """A run at the bound of its step.

    Attributes:
        images_per_second: of all chips.
        images_per_second_per_chip: of each.
        days: of the whole run.
        core_days: days times devices as JAX counts them: of TPU v3 its cores, as in the paper.
        model_flops_utilization: the model's FLOP/s, without what is recomputed, over the peak.
    """

    images_per_second: float
    images_per_second_per_chip: float
    days: float
    core_days: float
    model_flops_utilization: float


def roofline_bound(
    topology: Topology,
    places: Sequence[DeviceLocation],
    executed_flops: float,
    memory_bytes: float,
    transfers: Sequence[Collective],
) -> RooflineBound:
    """Returns the bound of a step.

    Args:
        topology: it runs on.
        places: of the devices, in the order of the mesh.
        executed_flops: of a step on one device.
        memory_bytes: that one device moves in a step.
        transfers: between devices.
    """
    chip = topology.chip
    return RooflineBound(
        executed_flops / (chip.flops / chip.devices_per_chip),
        memory_bytes / (chip.memory_bandwidth / chip.devices_per_chip),
        sum(network_seconds(topology, places, transfer) for transfer in transfers),
    )


def run_cost(
    topology: Topology, batch_size: int, num_steps: int, model_flops: float, seconds: float
) -> RunCost:
    """Returns what a run costs whose steps take this long.

    Args:
        topology: it runs on.
        batch_size: images a step.
        num_steps: of the run.
        model_flops: of a step, over all devices.
        seconds: of a step.
    """
    days = num_steps * seconds / _DAY
    return RunCost(
        batch_size / seconds,
        batch_size / seconds / topology.num_chips,
        days,
        days * topology.num_devices,
        model_flops / seconds / (topology.chip.flops * topology.num_chips),
    )


def network_seconds(
    topology: Topology, places: Sequence[DeviceLocation], transfer: Collective
) -> float:
    """Returns the least time of collectives: rings over links, and between neighbourhoods.

    An all-reduce over n chips sends 2(n−1)/n of the payload from each, a gather or a scatter
    (n−1)/n (Patarasuk and Yuan, 2009). Chips are taken to use all links they have at once. Between
    neighbourhoods each chip sends only its share. Exchange within a chip is taken to be free.
    """
    chip = topology.chip
    if transfer.kind == "collective-permute":
        pairs = [(places[a], places[b]) for a, b, *_ in transfer.groups]
        crosses = any(a.neighbourhood != b.neighbourhood for a, b in pairs)
        leaves = any(a.chip != b.chip for a, b in pairs)
        speed = chip.network_bandwidth if crosses else topology.egress if leaves else None
        return transfer.num_bytes / speed if speed else 0.0
    group = [places[device] for device in transfer.groups[0]]
    chips = len({place.chip for place in group})
    hoods = len({place.neighbourhood for place in group})
    nearby = chips // hoods
    # The devices of a chip that are in other groups send over the same links.
    at_once = chip.devices_per_chip * chips / len(group)
    payload = transfer.num_bytes * at_once
    inside = _sent(transfer.kind, nearby) * payload / topology.egress if nearby > 1 else 0.0
    between = _sent(transfer.kind, hoods) * payload / nearby if hoods > 1 else 0.0
    if between and chip.network_bandwidth:
        return max(inside, between / chip.network_bandwidth)
    return inside


def _sent(kind: str, count: int) -> float:
    """Returns the share of the payload that each of `count` members sends."""
    return (2 if kind == "all-reduce" else 1) * (count - 1) / count
