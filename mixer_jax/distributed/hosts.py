"""Hosts of one run: joining them, what they tell each other, and the signals that stop one."""

import ctypes
import importlib.util
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils

from mixer_jax.distributed import failures
from mixer_jax.distributed.tpu_env import has_tpu
from mixer_jax.errors import UserError

# Set by what starts one of several processes: a JAX coordinator, TPU multislice.
_CLUSTER_ADDRESSES = ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS")
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_CLUSTER_SIZES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
# A host from which nothing is heard for so long is gone, though its machine says nothing: within a
# minute, and longer than a machine stands still while it is moved.
_SILENCE_SECONDS = 40
# JAX's own time-out aborts the process, so ours comes first.
_JAX_IS_LATER_SECONDS = 60
# Of this process, which joins once: what it does by C++ when SIGTERM comes.
_jaxs_handlers: list[Callable[[int], None]] = []


def initialize_distributed(mode: str, timeout_seconds: int = 300) -> None:
    """Joins the other hosts of a run, before any device is used; once is enough for a process.

    If some of them do not come in time, or one of them is gone later, this process ends with exit
    code 1 and a line that says so.

    Args:
        mode: "yes"; "no"; or "auto", which joins where a TPU VM, SLURM, Open MPI or
            JAX_COORDINATOR_ADDRESS says that there may be others. JAX finds them by itself, or by
            that address with JAX_NUM_PROCESSES and JAX_PROCESS_ID.
        timeout_seconds: to wait for the others.

    Raises:
        UserError: nothing says where the other hosts are.
    """
    if jax.distributed.is_initialized():
        return
    if mode == "no" or (mode == "auto" and not _in_cluster()):
        return
    try:
        # Without an address JAX asks the cluster: TPU VMs, SLURM, Open MPI, Kubernetes.
        with failures.join_timeout(timeout_seconds):
            jax.distributed.initialize(
                os.environ.get("JAX_COORDINATOR_ADDRESS"),
                _whole_number("JAX_NUM_PROCESSES"),
                _whole_number("JAX_PROCESS_ID"),
                initialization_timeout=timeout_seconds + _JAX_IS_LATER_SECONDS,
                heartbeat_timeout_seconds=_SILENCE_SECONDS,
            )
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"config.distributed={mode!r} cannot join a run of several hosts: {reason} Set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID on every host, or "
            "--config.distributed=no to run alone"
        ) from error
    _jaxs_handlers.extend(filter(None, [_find_jaxs_handler()]))


def _find_jaxs_handler() -> Callable[[int], None] | None:
    """Returns what JAX does at SIGTERM; Python cannot tell, for it is written in C++."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    handler = libc.signal(signal.SIGTERM, None)
    libc.signal(signal.SIGTERM, handler)
    return ctypes.CFUNCTYPE(None, ctypes.c_int)(handler) if handler else None


def request_global_stop() -> None:
    """Tells the other hosts that all should stop soon; see `CheckpointManager.should_stop`."""
    for handler in _jaxs_handlers:
        handler(signal.SIGTERM)


def _in_cluster() -> bool:
    if any(os.environ.get(name) for name in _CLUSTER_ADDRESSES):
        return True
    if any((_whole_number(name) or 1) > 1 for name in _CLUSTER_SIZES):
        return True
    # A TPU VM says of itself that it is one, not how many it works with; joining alone is harmless.
    return has_tpu() and importlib.util.find_spec("libtpu") is not None


def _whole_number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else None


def is_primary_process() -> bool:
    """Returns whether this is the host that writes and prints what all hosts share."""
    return jax.process_index() == 0


def any_host(flag: bool) -> bool:
    """Returns whether the flag is set on any host; every host must ask at the same step."""
    return bool(all_gather(np.array(flag)).any())


def sum_across_hosts(count: int) -> int:
    """Returns the sum of a count over all hosts; every host must ask at the same time."""
    return int(all_gather(np.array(count)).sum())


def all_gather(numbers: np.ndarray) -> np.ndarray:
    """Returns the arrays of all hosts, (hosts, ...); every host must ask at the same time.

    Args:
        numbers: that fit into 32 bits, of the same shape on every host.
    """
    if jax.process_count() == 1:
        return numbers[None]
    return np.asarray(multihost_utils.process_allgather(numbers))


class GracefulShutdown:
    """Turns SIGTERM and the first Ctrl-C into a request to stop after the current step.

    The second Ctrl-C interrupts at once. A context manager; signals get their old meaning back on
    leaving. Outside the main thread, which alone can handle signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "GracefulShutdown":
        self._old = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
        self.listen()
        return self

    def listen(self) -> None:
        """Installs the handlers; again after `initialize_distributed`, which replaces SIGTERM's."""
        if threading.current_thread() is threading.main_thread():
            for number in _STOP_SIGNALS:
                signal.signal(number, self._receive)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._old.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
