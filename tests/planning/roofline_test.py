"""Roofline bound and run cost: worked examples."""

import pytest

from mixer_jax.planning.hlo.collectives import GRADIENTS, Collective
from mixer_jax.planning.roofline import network_seconds, roofline_bound, run_cost
from mixer_jax.planning.topology import device_locations, parse_topology

GIGABYTE = 1e9


def all_reduce_seconds(topology_name: str, num_devices: int) -> float:
    """Returns the bound on an all-reduce of a gigabyte over all devices."""
    topology = parse_topology(topology_name)
    groups = (tuple(range(num_devices)),)
    collective = Collective("all-reduce", "f32", "data", GRADIENTS, 1, GIGABYTE, groups)
    return network_seconds(topology, device_locations(topology, None), collective)


def test_network_seconds_of_ring() -> None:
    # Four links per chip, 50 GB/s each.
    assert all_reduce_seconds("v5e:4x4", 16) == pytest.approx(2 * 15 / 16 / 200)


def test_network_seconds_of_chips_with_two_cores() -> None:
    # Four chips, each with one link along each of two axes, 82 GB/s each.
    assert all_reduce_seconds("v3:2x2", 8) == pytest.approx(2 * 3 / 4 / 164)


def test_network_seconds_between_gpu_machines() -> None:
    inside, between = 2 * 7 / 8 / 450, 2 * 1 / 2 / 8 / 50
    assert all_reduce_seconds("h100:16", 16) == pytest.approx(max(inside, between))


def test_roofline_bound_and_run_cost() -> None:
    topology = parse_topology("v3:2x2")
    bound = roofline_bound(topology, device_locations(topology, None), 61.5e12, 225e9, [])
    assert bound == (1.0, 0.5, 0.0)
    assert (bound.seconds, bound.serial_seconds, bound.limit) == (1.0, 1.5, "arithmetic")
    cost = run_cost(topology, batch_size=80, num_steps=86_400, model_flops=246e12, step_seconds=1.0)
    assert cost == (80, 20, 1.0, 8.0, 0.5)
