"""Tests of what is known of a machine before JAX is imported."""

import fnmatch
import os

import pytest

from mixer_jax.parallel import machine


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([], False),
        # The control node of VFIO is on many hosts without a TPU.
        (["/dev/vfio/vfio"], False),
        (["/dev/accel0"], True),
        (["/dev/vfio/vfio", "/dev/vfio/0"], True),
    ],
)
def test_only_numbered_devices_are_tpus(
    monkeypatch: pytest.MonkeyPatch, devices: list[str], expected: bool
) -> None:
    def found(pattern: str) -> list[str]:
        return fnmatch.filter(devices, pattern)

    monkeypatch.setattr(machine.glob, "glob", found)
    for name in machine._TOLD_TO_LIBTPU:
        monkeypatch.delenv(name, raising=False)
    assert machine.has_tpu() == expected
    machine.quieten_libtpu()
    assert ("TPU_WORKER_HOSTNAMES" in os.environ) == (not expected)
