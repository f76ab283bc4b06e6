"""Tests of what is known of a machine before JAX is imported."""

import fnmatch
import os
import platform
import subprocess
import sys

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


# Says whether memory is kept, and how many pages a step with 256 MiB between had to be given.
_FAULTS_OF_A_STEP = """
import resource, sys
from mixer_jax.parallel import machine
kept = machine.keep_freed_memory() if sys.argv[1] == "keep" else False
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.sum(jnp.sin(x) @ jnp.cos(x[:, :8])))
x = jnp.ones((2**13, 2**13))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    before = faults()
    step(x).block_until_ready()
print(kept, faults() - before)
"""


def faults_of_a_step(do: str, **variables: str) -> tuple[bool, int]:
    allocator = ("GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(allocator)}
    result = subprocess.run(
        [sys.executable, "-c", _FAULTS_OF_A_STEP, do],
        env={**clean, "JAX_PLATFORMS": "cpu", **variables},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    kept, faults = result.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only GNU's C library can be told")
def test_freed_memory_is_kept_from_step_to_step() -> None:
    pages = 2**28 // os.sysconf("SC_PAGE_SIZE")
    kept, faults = faults_of_a_step("keep")
    assert kept
    assert faults < pages / 50
    assert faults_of_a_step("leave") > (False, pages / 2)


def test_an_allocator_of_the_users_is_left_alone() -> None:
    kept, _ = faults_of_a_step("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept


@pytest.mark.parametrize(
    ("devices", "platforms", "expected"),
    [
        (["/dev/nvidia0"], "", False),
        (["/dev/kfd"], "", False),
        (["/dev/accel0"], "", False),
        (["/dev/nvidia0"], "cuda,cpu", False),
        ([], "cuda", False),
        (["/dev/nvidia0"], "cpu", True),
        ([], "", True),
        (["/dev/nvidiactl"], "", True),
    ],
)
def test_only_processes_that_compute_on_cpus_keep_memory(
    monkeypatch: pytest.MonkeyPatch, devices: list[str], platforms: str, expected: bool
) -> None:
    told: list[tuple[int, int]] = []

    class Library:
        def __init__(self, name: None):
            pass

        def mallopt(self, parameter: int, value: int) -> int:
            told.append((parameter, value))
            return 1

    monkeypatch.setattr(machine.glob, "glob", lambda pattern: fnmatch.filter(devices, pattern))
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(machine.ctypes, "CDLL", Library)
    for name in [n for n in os.environ if n.startswith(machine._ALLOCATOR_VARIABLES)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert machine.keep_freed_memory() == expected
    assert bool(told) == expected
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("", ""))
    assert not machine.keep_freed_memory()
