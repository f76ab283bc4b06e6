"""Tests of joining and leaving a run; two real hosts are in end_to_end/."""

import jax
import numpy as np
import pytest

from mixer_jax.errors import UserError
from mixer_jax.parallel import hosts


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Records whether JAX was asked to join a cluster, in an environment without signs of one."""
    calls: list[bool] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *where: calls.append(True))
    monkeypatch.setattr(hosts.glob, "glob", lambda pattern: [])
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
    hosts.join(mode)
    assert joined == expected


def test_one_host_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hosts.multihost_utils, "process_allgather")
    assert hosts.any_host(True) is True
    assert hosts.any_host(False) is False
    assert hosts.total(7) == 7
    np.testing.assert_array_equal(hosts.gather(np.arange(3)), [[0, 1, 2]])


def test_hosts_ask_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    others = iter([np.array(False), np.array(True), np.array(False), np.array(5), np.arange(2, 4)])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        hosts.multihost_utils, "process_allgather", lambda own: np.stack([own, next(others)])
    )
    assert hosts.any_host(True) is True
    assert hosts.any_host(False) is True
    assert hosts.any_host(False) is False
    assert hosts.total(7) == 12
    np.testing.assert_array_equal(hosts.gather(np.arange(2)), [[0, 1], [2, 3]])


def test_hosts_that_cannot_be_found_are_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    with pytest.raises(UserError, match="cannot join a run of several hosts"):
        hosts.join("yes")
