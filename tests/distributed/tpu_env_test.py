"""Tests of TPU detection before JAX is imported."""

import fnmatch
import os

import pytest

from mixer_jax.distributed import tpu_env


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([], False),
        # Many hosts without a TPU have the control node of VFIO.
        (["/dev/vfio/vfio"], False),
        (["/dev/accel0"], True),
        (["/dev/vfio/vfio", "/dev/vfio/0"], True),
    ],
)
def test_has_tpu_counts_numbered_devices_only(
    monkeypatch: pytest.MonkeyPatch, devices: list[str], expected: bool
) -> None:
    monkeypatch.setattr(tpu_env.glob, "glob", lambda pattern: fnmatch.filter(devices, pattern))
    assert tpu_env.has_tpu() == expected


@pytest.mark.parametrize("has_tpu", [False, True])
def test_silence_libtpu_keeps_the_settings_of_the_user_and_of_real_tpus(
    monkeypatch: pytest.MonkeyPatch, has_tpu: bool
) -> None:
    monkeypatch.setattr(tpu_env, "has_tpu", lambda: has_tpu)
    monkeypatch.setattr(os, "environ", {"TPU_WORKER_HOSTNAMES": "mine"})
    tpu_env.silence_libtpu()
    assert os.environ.pop("TPU_WORKER_HOSTNAMES") == "mine"
    assert ("TPU_SKIP_MDS_QUERY" in os.environ) == (not has_tpu)
    assert bool(os.environ) == (not has_tpu)
