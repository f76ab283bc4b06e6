"""Tests of joining a multi-host run and agreeing in it; whole runs are in end_to_end/."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest

from mixer_jax.distributed import hardware, multihost
from mixer_jax.errors import UserError
from tests.helpers.messages import mentions, raises
from tests.helpers.processes import host_env

# Precedes the code of two processes that form one run.
PREAMBLE = """
import contextlib, json, os, sys
import numpy as np
from mixer_jax.distributed import multihost
from mixer_jax.errors import DiskFullError, RunError, UserError
multihost.initialize_distributed("auto", 60)
host = int(os.environ["JAX_PROCESS_ID"])
"""


def start_python(code: str, *argv: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
    )


def start_two_processes(code: str) -> list[subprocess.Popen[str]]:
    return [start_python(PREAMBLE + code, **env) for env in host_env(2, num_devices=2)]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Records calls of JAX's `initialize` in an environment without any sign of a cluster."""
    calls: list[bool] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append(True))
    monkeypatch.setattr(hardware, "has_tpu", lambda: False)
    for name in (
        "JAX_COORDINATOR_ADDRESS",
        "MEGASCALE_COORDINATOR_ADDRESS",
        "SLURM_NTASKS",
        "OMPI_COMM_WORLD_SIZE",
    ):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ("mode", "env", "expected"),
    [
        ("no", {"SLURM_NTASKS": "4"}, False),
        ("yes", {}, True),
        ("auto", {}, False),
        ("auto", {"SLURM_NTASKS": "1"}, False),
        ("auto", {"SLURM_NTASKS": "4"}, True),
        ("auto", {"SLURM_NTASKS": "many"}, False),
        ("auto", {"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ("auto", {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, True),
        ("auto", {"MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1"}, True),
    ],
)
def test_initialize_distributed_joins_where_a_launcher_announces_several_processes(
    joined: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    env: dict[str, str],
    expected: bool,
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    multihost.initialize_distributed(mode)
    assert bool(joined) == expected


@pytest.mark.parametrize(
    ("num_processes", "error_type", "parts"),
    [
        ("", "UserError", ("config.distributed", "yes", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")),
        # Its port is in use, perhaps by a previous attempt that is about to end.
        ("2", "RunError", ()),
    ],
)
def test_initialize_distributed_retries_only_what_may_succeed_later(
    num_processes: str, error_type: str, parts: tuple[str, ...]
) -> None:
    code = """
from mixer_jax.distributed.multihost import initialize_distributed
try:
    initialize_distributed("yes")
except Exception as error:
    print(type(error).__name__, error)
"""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        env = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{server.getsockname()[1]}",
            "JAX_NUM_PROCESSES": num_processes,
            "JAX_PROCESS_ID": "0",
        }
        process = start_python(code, **env)
        out, err = process.communicate(timeout=60)
    if process.returncode == -signal.SIGSEGV and error_type == "RunError":
        # jaxlib 0.10.2 crashes in one of four attempts. That exit code means "retry", too.
        return
    assert mentions(out, error_type, *parts), (out, err)


def test_collectives_of_one_host_communicate_with_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(multihost.multihost_utils, "process_allgather")
    assert multihost.any_host(True) is True
    assert multihost.any_host(False) is False
    assert multihost.sum_across_hosts(7, 0) == (7, 0)
    np.testing.assert_array_equal(multihost.all_gather(np.arange(3)), [[0, 1, 2]])
    assert multihost.SharedFlags().exchange(True, False) == (True, False)
    assert multihost.gather_text("é") == ["é"]
    assert multihost.gather_text("") == [""]
    assert multihost.compute_once(lambda: [1]) == [1]


@pytest.mark.slow
def test_two_hosts_agree() -> None:
    """Every value differs between the hosts; both must compute the same results."""
    both = start_two_processes(
        """
flags = multihost.SharedFlags()
exchanged = [flags.exchange(step == 2 and host == 1, step == 3) for step in range(6)]
flags.exchange(True, True)
flags.clear()
exchanged.append(flags.exchange(False, False))
messages = []
@contextlib.contextmanager
def fail(error):
    raise error(f"failed on host {host}")
    yield
def use(error):
    with fail(error):
        pass
def enter(error):
    with multihost.enter_on_primary(fail(error)):
        pass
for error in (UserError, RunError, DiskFullError, OSError):
    for call in (lambda: multihost.compute_once(lambda: use(error)), lambda: enter(error)):
        try:
            call()
        except (UserError, RunError, OSError) as raised:
            messages.append((type(raised).__name__, str(raised)))
with multihost.enter_on_primary(contextlib.nullcontext(lambda: "not picklable")):
    pass
print(json.dumps({
    "texts": multihost.gather_text("é" * host),
    "no_texts": multihost.gather_text(""),
    "once": multihost.compute_once(lambda: {"host": host, "text": "a" * 1001}),
    "messages": messages,
    "any": [multihost.any_host(host == 1), multihost.any_host(False)],
    "sum": multihost.sum_across_hosts(5 + host, host),
    "gathered": multihost.all_gather(np.arange(2) + 2 * host).tolist(),
    "is_primary": multihost.is_primary_process(),
    "exchanged": exchanged,
}))
"""
    )
    outs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    for host, (out, _) in enumerate(outs):
        # Gloo prints to standard output too.
        (line,) = [line for line in out.splitlines() if line.startswith("{")]
        values = json.loads(line)
        exchanged = values.pop("exchanged")
        # Errors of other types are converted on all but the primary process.
        disk_full, os_error = ("DiskFullError", "OSError") if host == 0 else ("RunError",) * 2
        assert values == {
            "texts": ["", "é"],
            "no_texts": ["", ""],
            "once": {"host": 0, "text": "a" * 1001},
            "messages": [
                message
                for message in (
                    ["UserError", "failed on host 0"],
                    ["RunError", "failed on host 0"],
                    [disk_full, "failed on host 0"],
                    [os_error, "failed on host 0" if host == 0 else "OSError: failed on host 0."],
                )
                for _ in range(2)
            ],
            "any": [True, False],
            "sum": [11, 1],
            "gathered": [[0, 1], [2, 3]],
            "is_primary": host == 0,
        }
        # One call after they were sent, also on the host that did not send them.
        assert [step for step, (first, _) in enumerate(exchanged) if first] == [3]
        assert [step for step, (_, second) in enumerate(exchanged) if second] == [4]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_propagate_failure_ends_the_other_host(failing: int) -> None:
    """The other host waits in a collective that the failed one never joins."""
    both = start_two_processes(
        f"""
multihost.any_host(True)
try:
    with multihost.propagate_failure():
        if host == {failing}:
            raise UserError("wrong on one host")
        multihost.any_host(True)
except UserError:
    sys.exit(2)
"""
    )
    start = time.monotonic()
    outs = [process.communicate(timeout=120) for process in both]
    codes = [process.returncode for process in both]
    assert codes[failing] == 2, outs
    assert codes[1 - failing] in (1, -signal.SIGABRT), outs
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_propagate_failure_waits_for_hosts_with_the_same_error() -> None:
    """They exit together, long before the timeout."""
    both = start_two_processes(
        """
multihost._EXIT_TIMEOUT_SECONDS = 600.0
multihost.any_host(True)
try:
    with multihost.propagate_failure():
        raise UserError("wrong on all hosts")
except UserError:
    sys.exit(2)
"""
    )
    outs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [2, 2], outs


def test_caught_errors_do_not_end_a_process_without_others() -> None:
    """Simulates a single TPU VM, where JAX's distributed runtime has one process."""
    code = """
import sys, time
import jax
import mixer_jax
from mixer_jax.distributed import multihost
from mixer_jax.errors import UserError
jax.distributed.initialize(sys.argv[1], 1, 0)
multihost._EXIT_TIMEOUT_SECONDS = 0.1
config = mixer_jax.load_config("digits")
config.dataset.name = "folder:/nonexistent"
def run():
    with multihost.propagate_failure():
        raise UserError
for call in (run, lambda: mixer_jax.train(config, sys.argv[2])):
    try:
        call()
    except UserError:
        time.sleep(1)
        print("alive")
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        process = start_python(code, address, f"{folder}/run")
        out, err = process.communicate(timeout=120)
    assert (out, process.returncode) == ("alive\nalive\n", 0), err


@pytest.fixture
def on_tpu_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks like a TPU VM after a notebook has used its devices, without a launcher."""
    for name in (*hardware._ADDRESS_VARIABLES, *hardware._SIZE_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hardware, "has_tpu", lambda: True)
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: object())
    assert jax.device_count()


@pytest.mark.usefixtures("on_tpu_vm")
def test_initialize_distributed_accepts_used_devices_on_a_single_tpu_vm() -> None:
    assert hardware.joins_hosts("auto")
    multihost.initialize_distributed("auto")
    assert not jax.distributed.is_initialized()


@pytest.mark.usefixtures("on_tpu_vm")
@pytest.mark.parametrize("case", ["several hosts", "launcher", "yes"])
def test_initialize_distributed_rejects_used_devices_with_other_hosts(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    if case == "several hosts":
        monkeypatch.setattr(jax, "process_count", lambda: 2)
    if case == "launcher":
        monkeypatch.setenv("SLURM_NTASKS", "2")
    mode = "yes" if case == "yes" else "auto"
    with raises(UserError, f"config.distributed={mode}", "mixer_jax.train", "'no'"):
        multihost.initialize_distributed(mode)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_graceful_shutdown_restores_the_previous_handlers(number: signal.Signals) -> None:
    def handler(*_: object) -> None:
        pass

    # A handler of its own, since SIGHUP may be ignored where the tests run.
    previous = signal.signal(number, handler)
    try:
        with multihost.GracefulShutdown() as stop:
            assert stop.received is None
            signal.raise_signal(number)
            assert stop.received == number
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, previous)


def test_graceful_shutdown_leaves_sighup_ignored_under_nohup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with multihost.GracefulShutdown() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_graceful_shutdown_raises_at_the_second_interrupt() -> None:
    with multihost.GracefulShutdown() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
