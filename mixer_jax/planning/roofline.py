"""Lower bounds on the memory traffic and, by the roofline model, the time of steps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mixer_jax.models.family import ModelFamily, Traffic
from mixer_jax.planning.hlo_collectives import Collective
from mixer_jax.planning.hlo_costs import OPTIMIZER, OTHER
from mixer_jax.planning.topology import DeviceLocation, Topology

_SECONDS_PER_DAY = 86_400
_FLOAT32 = 4
# Adam reads parameters, two moments and gradients, these twice because of clipping by their norm,
# and writes parameters and moments.
_ADAM_ACCESSES = 8


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
        core_days: Days times JAX devices; for TPU v3 these are cores, as in the paper.
        model_flops_utilization: FLOP/s of the model, without recomputation, over peak FLOP/s.
    """

    images_per_second: float
    images_per_second_per_chip: float
    days: float
    core_days: float
    model_flops_utilization: float


def estimate_traffic(
    family: ModelFamily,
    architecture: Any,
    image_size: int,
    num_classes: int,
    *,
    batch_size: int,
    itemsize: int = 2,
    train: bool = True,
) -> dict[str, Traffic]:
    """Estimates the FLOPs and memory traffic per image, by region, in steps on one device.

    The traffic depends on what a kernel fuses, so there are two lower bounds:

    - unfused: Each matmul reads its operands and writes its result once. LayerNorm and GELU are
      fused into reading operands, additions and multiplications into writing results. Hidden units
      are written before GELU, and read again for its derivative. A program can do better if a
      matmul's result is still in on-chip memory when the next one reads it.
    - fused: Hidden units never leave the chip. The backward pass reads the input of an MLP once and
      recomputes the hidden units for all four gradients: seven matmuls instead of six.

    Args:
        family: Model family.
        architecture: Architecture config.
        image_size: Side of the square input, in pixels.
        num_classes: Outputs of the head.
        batch_size: Images, which share the traffic of parameters and optimizer.
        itemsize: Bytes per element of the computation's dtype.
        train: Whether the step trains, with Adam and clipping, or only infers.
    """
    model = (architecture, image_size, num_classes)
    traffic = family.cost_model.estimate_traffic(
        *model, batch_size=batch_size, itemsize=itemsize, train=train
    )
    num_bytes = _ADAM_ACCESSES * _FLOAT32 * family.num_params(*model) / batch_size if train else 0.0
    optimizer = Traffic(0.0, unfused_bytes=num_bytes, fused_flops=0.0, fused_bytes=num_bytes)
    return {**traffic, OPTIMIZER: optimizer, OTHER: Traffic(0.0, 0.0, 0.0, 0.0)}


def roofline_bound(
    topology: Topology,
    locations: Sequence[DeviceLocation],
    executed_flops: float,
    hbm_bytes: float,
    collectives: Sequence[Collective],
) -> RooflineBound:
    """Computes the bound from FLOPs, memory traffic and collectives per step and device."""
    chip = topology.chip
    return RooflineBound(
        executed_flops / (chip.flops / chip.devices_per_chip),
        hbm_bytes / (chip.memory_bandwidth / chip.devices_per_chip),
        sum(network_seconds(topology, locations, collective) for collective in collectives),
    )


def run_cost(
    topology: Topology, batch_size: int, num_steps: int, model_flops: float, step_seconds: float
) -> RunCost:
    """Computes throughput and cost of a run; `model_flops` are per step, over all devices."""
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
        pairs = [(locations[group[0]], locations[group[1]]) for group in collective.replica_groups]
        bandwidth = None
        if any(a.ici_domain != b.ici_domain for a, b in pairs):
            bandwidth = chip.network_bandwidth
        elif any(a.chip != b.chip for a, b in pairs):
            bandwidth = topology.ici_bandwidth
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
