"""Tests of what is known of a machine before JAX is imported."""

import fnmatch
import os

import pytest

from mixer_jax.distributed import tpu_env


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

    monkeypatch.setattr(tpu_env.glob, "glob", found)
    for name in tpu_env._LIBTPU_ENV:
        monkeypatch.delenv(name, raising=False)
    assert tpu_env.has_tpu() == expected
    tpu_env.silence_libtpu()
    assert ("TPU_WORKER_HOSTNAMES" in os.environ) == (not expected)
