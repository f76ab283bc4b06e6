"""Roofline bound on the step time: peak arithmetic, memory bandwidth and network bandwidth."""

from collections.abc import Sequence
from typing import NamedTuple

from mixer_jax.planning.hlo.collectives import Collective
from mixer_jax.planning.topology import DeviceLocation, Topology

_SECONDS_PER_DAY = 86_400


class RooflineBound(NamedTuple):
    """Lower bounds on the step time in seconds, each at the peak rate of the hardware.

    Attributes:
        arithmetic: Executed FLOPs over peak FLOP/s.
        memory: Bytes over the bandwidth of main memory.
        network: Bytes that collectives send over the bandwidth of the links that they use.
    """

    arithmetic: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """Bound with perfect overlap: the maximum."""
        return max(self)

    @property
    def serial_seconds(self) -> float:
        """Bound without overlap: the sum."""
        return sum(self)

    @property
    def limit(self) -> str:
        """Name of the largest bound."""
        return max(self._asdict().items(), key=lambda item: item[1])[0]


class RunCost(NamedTuple):
    """Throughput and cost of a run whose steps take as long as their bound.

    Attributes:
        images_per_second: Throughput of all chips.
        images_per_second_per_chip: Throughput per chip.
        days: Duration of the run.
        core_days: Days times JAX devices; for TPU v3 these are cores, as in the paper.
        model_flops_utilization: FLOP/s of the model, without recomputation, over peak FLOP/s.
    """

    images_per_second: float
    images_per_second_per_chip: float
    days: float
    core_days: float
    model_flops_utilization: float


def roofline_bound(
    topology: Topology,
    locations: Sequence[DeviceLocation],
    executed_flops: float,
    hbm_bytes: float,
    collectives: Sequence[Collective],
) -> RooflineBound:
    """Computes the bound of one step.

    Args:
        topology: Topology that the step runs on.
        locations: Locations of the devices, in mesh order.
        executed_flops: FLOPs per step and device.
        hbm_bytes: Bytes of memory traffic per step and device.
        collectives: Communication between devices.
    """
    chip = topology.chip
    return RooflineBound(
        executed_flops / (chip.flops / chip.devices_per_chip),
        hbm_bytes / (chip.memory_bandwidth / chip.devices_per_chip),
        sum(network_seconds(topology, locations, collective) for collective in collectives),
    )


def run_cost(
    topology: Topology, batch_size: int, num_steps: int, model_flops: float, step_seconds: float
) -> RunCost:
    """Computes throughput and cost of a run.

    Args:
        topology: Topology that the run uses.
        batch_size: Images per step.
        num_steps: Length of the run.
        model_flops: FLOPs of the model per step, over all devices.
        step_seconds: Seconds per step.
    """
    days = num_steps * step_seconds / _SECONDS_PER_DAY
    return RunCost(
        batch_size / step_seconds,
        batch_size / step_seconds / topology.num_chips,
        days,
        days * topology.num_devices,
        model_flops / step_seconds / (topology.chip.flops * topology.num_chips),
    )


def network_seconds(
    topology: Topology, locations: Sequence[DeviceLocation], collective: Collective
) -> float:
    """Returns a lower bound on the seconds of a collective: rings over links, then the network.

    An all-reduce over n chips sends 2(n−1)/n of the payload from each chip, a gather or a scatter
    (n−1)/n (Patarasuk and Yuan, 2009). Chips are assumed to use all their links at once. Between
    ICI domains, each chip sends only its own shard. Communication within a chip is free.
    """
    chip = topology.chip
    if collective.op == "collective-permute":
        pairs = [(locations[a], locations[b]) for a, b, *_ in collective.replica_groups]
        if any(a.ici_domain != b.ici_domain for a, b in pairs):
            bandwidth = chip.network_bandwidth
        elif any(a.chip != b.chip for a, b in pairs):
            bandwidth = topology.ici_bandwidth
        else:
            bandwidth = None
        return collective.num_bytes / bandwidth if bandwidth else 0.0
    group = [locations[device] for device in collective.replica_groups[0]]
    num_chips = len({location.chip for location in group})
    num_domains = len({location.ici_domain for location in group})
    chips_per_domain = num_chips // num_domains
    # Devices of the same chip in other groups send over the same links.
    concurrent_groups = chip.devices_per_chip * num_chips / len(group)
    payload = collective.num_bytes * concurrent_groups
    inside = between = 0.0
    if chips_per_domain > 1:
        sent = _sent_fraction(collective.op, chips_per_domain) * payload
        inside = sent / topology.ici_bandwidth
    if num_domains > 1 and chip.network_bandwidth:
        sent = _sent_fraction(collective.op, num_domains) * payload / chips_per_domain
        between = sent / chip.network_bandwidth
    return max(inside, between)


def _sent_fraction(op: str, num_members: int) -> float:
    """Returns the fraction of the payload that each member of a group sends."""
    return (2 if op == "all-reduce" else 1) * (num_members - 1) / num_members
