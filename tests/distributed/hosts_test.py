"""Tests of joining and leaving a run; two real hosts are in end_to_end/."""

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from mixer_jax.distributed import hosts
from mixer_jax.errors import UserError
from tests.helpers.messages import mentions, raises


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Records whether JAX was asked to join a cluster, in an environment without signs of one."""
    calls: list[bool] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *where, **times: calls.append(True))
    # This process goes on, so it keeps its standard error.
    monkeypatch.setattr(hosts.failures, "watch_standard_error", lambda: lambda: None)
    monkeypatch.setattr(hosts, "has_tpu", lambda: False)
    for name in (*hosts._CLUSTER_ADDRESSES, *hosts._CLUSTER_SIZES):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("no", {"SLURM_NTASKS": "4"}, []),
        ("yes", {}, [True]),
        ("auto", {}, []),
        ("auto", {"SLURM_NTASKS": "1"}, []),
        ("auto", {"SLURM_NTASKS": "4"}, [True]),
        ("auto", {"SLURM_NTASKS": "many"}, []),
        ("auto", {"OMPI_COMM_WORLD_SIZE": "2"}, [True]),
        ("auto", {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, [True]),
    ],
)
def test_a_cluster_is_joined_where_there_is_one(
    joined: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    environment: dict[str, str],
    expected: list[bool],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hosts.initialize_distributed(mode)
    assert joined == expected


def test_one_host_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hosts.multihost_utils, "process_allgather")
    assert hosts.any_host(True) is True
    assert hosts.any_host(False) is False
    assert hosts.sum_across_hosts(7) == 7
    np.testing.assert_array_equal(hosts.all_gather(np.arange(3)), [[0, 1, 2]])


def test_hosts_ask_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    others = iter([np.array(False), np.array(True), np.array(False), np.array(5), np.arange(2, 4)])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        hosts.multihost_utils, "process_allgather", lambda own: np.stack([own, next(others)])
    )
    assert hosts.any_host(True) is True
    assert hosts.any_host(False) is True
    assert hosts.any_host(False) is False
    assert hosts.sum_across_hosts(7) == 12
    np.testing.assert_array_equal(hosts.all_gather(np.arange(2)), [[0, 1], [2, 3]])


def test_hosts_that_cannot_be_found_are_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    variables = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES")
    with raises(UserError, "config.distributed", "yes", *variables):
        hosts.initialize_distributed("yes")


def test_a_host_that_could_not_join_is_as_before(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    before = sys.stderr
    with pytest.raises(UserError):
        hosts.initialize_distributed("yes")
    os.write(2, b"by C++\n")
    print("by Python", file=sys.stderr, flush=True)
    assert capfd.readouterr().err == "by C++\nby Python\n"
    assert sys.stderr is before


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code that watches standard error, for it cannot be undone when it ends a process."""
    watch = "import ctypes, os, sys, time; from mixer_jax.distributed import failures\n"
    command = [sys.executable, "-W", "error", "-c", watch + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_what_cpp_says_is_passed_on_but_for_the_loss_of_a_host() -> None:
    done = in_a_process(
        """
failures.watch_standard_error()
print("mine", file=sys.stderr)
os.write(2, b"of another library\\n")
time.sleep(0.5)
os.write(2, b"E1123 07:42:43.7 9 coordination_service_agent.cc:289] Polled an error\\n")
time.sleep(0.1)
os.write(2, b"F1123 07:42:43.8 9 client.h:80] Terminating process because the JAX distributed "
    b"service detected fatal errors. This\\n*** Check failure stack trace: ***\\n")
with failures.resume_hint(lambda: "do this"):
    ctypes.CDLL(None).abort()
"""
    )
    assert done.returncode == 1
    *passed_on, lost = done.stderr.splitlines()
    assert passed_on == ["mine", "of another library"]
    # Which process it is, of how many, and the advice.
    assert mentions(lost, "0", "1", "do this")


def test_another_abort_stays_one() -> None:
    done = in_a_process(
        """
failures.watch_standard_error()
os.write(2, b"E1123 07:42:43.7 9 coordination_service_agent.cc:289] harmless\\n")
os.write(2, b"corrupted memory\\n")
ctypes.CDLL(None).abort()
"""
    )
    assert done.returncode == -signal.SIGABRT
    assert done.stderr.endswith("harmless\ncorrupted memory\n")
