"""Tests of meshes over the devices of real topologies."""

import importlib.util
import os

import numpy as np
import pytest

from mixer_jax.distributed.sharding import make_mesh
from mixer_jax.distributed.tpu_env import silence_libtpu
from mixer_jax.planning.topology import ENVIRONMENT, parse_topology, tpu_devices


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed (requirements-tpu.txt)",
)
@pytest.mark.parametrize(
    ("name", "slices"),
    [("v4:4x4x4", 1), ("v3:4x4", 1), ("v5e:4x8", 1), ("v5p:2x2x2", 1), ("v5e:4x4", 2)],
)
def test_every_width_of_fsdp_has_a_mesh(name: str, slices: int) -> None:
    silence_libtpu()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", ENVIRONMENT["ALLOW_MULTIPLE_LIBTPU_LOAD"])
    devices = tpu_devices(parse_topology(name, slices))
    in_slice = len(devices) // slices
    for fsdp in (2**power for power in range(in_slice.bit_length())):
        mesh = make_mesh(0, fsdp, devices)
        assert mesh.devices.shape == (len(devices) // fsdp, fsdp)
        assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
        # Only data cross the network between slices.
        for row in mesh.devices:
            assert len({getattr(device, "slice_index", 0) for device in row}) == 1
            # What a parameter is split over is a block of neighbours.
            sides = np.ptp([device.coords for device in row], axis=0) + 1
            assert np.prod(sides) <= fsdp
