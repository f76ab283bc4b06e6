"""Topologies: names, sizes, and meshes over the devices of real slices."""

import numpy as np
import pytest

from mixer_jax.distributed.sharding import make_mesh
from mixer_jax.planning.topology import (
    device_locations,
    larger_topologies,
    parse_topology,
    tpu_devices,
)
from tests.helpers.tpu_compiler import tpu_compiler


def test_parse_topology() -> None:
    slices = parse_topology("v5e:16x16", 2)
    assert (slices.num_chips, slices.num_devices) == (512, 512)
    assert parse_topology("v3:4x4").num_devices == 32
    assert parse_topology("v4:2x2x1").ici_bandwidth == 2 * 50e9


@pytest.mark.parametrize(
    ("name", "num_slices", "sizes"),
    [
        ("h100:2", 1, [4, 8, 16, 32, 64, 128, 256]),
        ("h100:3", 1, [6, 24, 48, 96, 192, 384]),
        ("h100:24", 1, [48, 96, 192, 384, 768, 1536, 3072]),
        ("v5e:8x8", 2, [256, 512]),
        ("v3:8x16", 1, [256]),
    ],
)
def test_larger_topologies_are_valid(name: str, num_slices: int, sizes: list[int]) -> None:
    found = larger_topologies(parse_topology(name, num_slices))
    assert [topology.num_chips for topology in found] == sizes
    assert {topology.num_slices for topology in found} == {num_slices}


@pytest.mark.parametrize(
    ("name", "num_slices"),
    [("v4:4x4x4", 1), ("v3:4x4", 1), ("v5e:4x8", 1), ("v5p:2x2x2", 1), ("v5e:4x4", 2)],
)
def test_tpu_devices_form_meshes_with_any_fsdp(name: str, num_slices: int) -> None:
    with tpu_compiler():
        devices = tpu_devices(parse_topology(name, num_slices))
    slice_devices = len(devices) // num_slices
    for fsdp in (2**power for power in range(slice_devices.bit_length())):
        mesh = make_mesh(0, fsdp, devices)
        assert mesh.devices.shape == (len(devices) // fsdp, fsdp)
        assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
        for row in mesh.devices:
            # Only the data axis crosses the network between slices.
            assert len({getattr(device, "slice_index", 0) for device in row}) == 1
            # The devices of the fsdp axis are a block of neighbors.
            sides = np.ptp([device.coords for device in row], axis=0) + 1
            assert np.prod(sides) <= fsdp


@pytest.mark.parametrize(("name", "num_slices"), [("v3:4x4", 1), ("v5e:4x4", 2)])
def test_device_locations_without_devices_match_real_ones(name: str, num_slices: int) -> None:
    topology = parse_topology(name, num_slices)
    with tpu_compiler():
        devices = tpu_devices(topology)
    for locations in (device_locations(topology, devices), device_locations(topology, None)):
        assert len({location.chip for location in locations}) == topology.num_chips
        assert len({location.ici_domain for location in locations}) == num_slices
        assert len(locations) == topology.num_devices
