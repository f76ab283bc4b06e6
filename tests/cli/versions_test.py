"""Tests of the versions and devices that --version prints."""

import contextlib
import http.server
import os
import sys
import threading
from collections.abc import Iterator
from importlib import metadata

import pytest

from mixer_jax.cli import versions
from tests.helpers.messages import mentions

_VARIABLES = (
    "TPU_PROCESS_ADDRESSES",
    "TPU_WORKER_HOSTNAMES",
    "JAX_COORDINATOR_ADDRESS",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
)


@pytest.fixture
def tpu_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this machine a TPU VM, which may be one of several."""
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
    # Nothing listens there.
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:9")
    monkeypatch.setattr(versions, "joins_hosts", lambda mode: True)


def describe() -> dict[str, str]:
    lines = (line.partition(" ") for line in versions.describe_environment())
    return {name: value for name, _, value in lines}


@contextlib.contextmanager
def metadata_server(hosts: str) -> Iterator[str]:
    """Serves the hosts of a slice like Google Cloud; yields the address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.path.endswith("/instance/attributes/worker-network-endpoints")
            is_allowed = self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if is_known and is_allowed else 403)
            self.end_headers()
            self.wfile.write(hosts.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_includes_wandb() -> None:
    assert describe()["wandb"] == metadata.version("wandb")


def test_jax_that_cannot_be_imported_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    # Importing it raises ImportError.
    monkeypatch.setitem(sys.modules, "jax", None)
    environment = describe()
    assert "python" in environment
    assert mentions(environment["devices"], "JAX", "ModuleNotFoundError")


@pytest.mark.parametrize(("chosen", "expected"), [(None, "false"), ("true", "true")])
def test_memory_of_gpus_is_not_preallocated(
    chosen: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = "XLA_PYTHON_CLIENT_PREALLOCATE"
    # Restored after the test, also if it was not set.
    monkeypatch.setenv(variable, chosen or "")
    if chosen is None:
        monkeypatch.delenv(variable)
    describe()
    assert os.environ[variable] == expected


@pytest.mark.parametrize(("hosts", "is_single"), [("localhost", True), ("host-0,host-1", False)])
@pytest.mark.parametrize("is_gke", [False, True])
def test_devices_are_queried_on_a_single_tpu_vm_only(
    hosts: str, is_single: bool, is_gke: bool, tpu_vm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with metadata_server(hosts) as address:
        if is_gke:
            monkeypatch.setenv("TPU_WORKER_HOSTNAMES", hosts)
        else:
            monkeypatch.setenv("GCE_METADATA_IP", address)
        devices = describe()["devices"]
    assert mentions(devices, "several", "hosts") != is_single
    assert devices[0].isdecimal() == is_single


@pytest.mark.parametrize("launcher", [{}, {"SLURM_NTASKS": "2"}])
def test_devices_are_not_queried_if_there_may_be_other_hosts(
    launcher: dict[str, str], tpu_vm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert mentions(describe()["devices"], "several", "hosts")
