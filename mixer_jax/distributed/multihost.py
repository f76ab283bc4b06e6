"""Multi-host runs: joining one, agreeing across hosts, and stopping together.

JAX detects lost hosts by itself. Every process sends heartbeats to the coordinator, which is part
of process 0. When any process is lost, the collectives of the others fail, or JAX aborts them with
a message and SIGABRT. Processes whose peers do not join in time end in the same way.
"""

import contextlib
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mixer_jax.distributed.hardware import (
    device_error,
    is_started_by_launcher,
    joins_hosts,
    read_int,
)
from mixer_jax.errors import RunError, UserError, describe_error, exit_code, summarize_error

T = TypeVar("T")

# Detects a lost host within a minute, but tolerates the pause of a live migration.
_HEARTBEAT_TIMEOUT_SECONDS = 40
# Hosts that raise the same error at about the same time exit together, each with its own message.
_EXIT_TIMEOUT_SECONDS = 10.0
# Part of JAX's message if devices are used before hosts are joined.
_JOINED_TOO_LATE = "must be called before any JAX calls"
# SIGHUP: the terminal was closed, or the connection was lost.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def initialize_distributed(mode: str, timeout_seconds: int = 300) -> None:
    """Joins the other hosts of a run; does nothing in processes that have already joined.

    Must be called before any device is used, except on a single TPU VM, as notebooks use devices
    before they train. JAX aborts the process if not all hosts join in time.

    Args:
        mode: "yes", "no", or "auto": joins on a TPU VM, under SLURM or Open MPI, and if
            JAX_COORDINATOR_ADDRESS is set. JAX detects the other hosts, or reads that address;
            JAX_NUM_PROCESSES and JAX_PROCESS_ID complete it.
        timeout_seconds: Time for all hosts to join.

    Raises:
        UserError: The other hosts cannot be detected, or this host has used its devices before.
        RunError: The coordinator cannot be started or detected; a later attempt may succeed.
    """
    if jax.distributed.is_initialized() or not joins_hosts(mode):
        return
    # The service would replace Python's handler of SIGTERM by its own. See `GracefulShutdown`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            os.environ.get("JAX_COORDINATOR_ADDRESS"),
            read_int("JAX_NUM_PROCESSES"),
            read_int("JAX_PROCESS_ID"),
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS,
        )
    except ValueError as error:
        raise UserError(
            f"config.distributed={mode} needs the other hosts, which JAX cannot detect "
            f"({summarize_error(error)}). Set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID on every host, or --config.distributed=no to run on one host."
        ) from error
    except RuntimeError as error:
        if _JOINED_TOO_LATE in str(error):
            if mode == "auto" and not is_started_by_launcher() and jax.process_count() == 1:
                return
            raise UserError(
                f"config.distributed={mode} must join the other hosts before JAX uses its devices, "
                "got a process that has used them. Call mixer_jax.train before other JAX code, or "
                "set config.distributed='no' to run on one host."
            ) from error
        raise RunError(f"cannot join the other hosts: {summarize_error(error)}.") from error


def check_devices() -> None:
    """Initializes the devices. All hosts must have joined.

    Raises:
        UserError: JAX_PLATFORMS names devices that this machine or this installation lacks.
        RunError: Devices cannot be used, e.g. because another process uses them.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise device_error(str(error)) from error


def is_alone(mode: str) -> bool:
    """Returns whether this process forms a run alone, without using devices or waiting for others.

    Args:
        mode: Argument of `initialize_distributed`.
    """
    return not jax.distributed.is_initialized() and not joins_hosts(mode)


@contextlib.contextmanager
def propagate_failure() -> Iterator[None]:
    """Ends all hosts when this one raises, for programs, around all of their work.

    At exit, JAX waits until all processes exit, but the others may still expect this one to join a
    collective. After a few seconds the process therefore exits anyway, even if the error is caught,
    and JAX ends the others. With one process, it does nothing.
    """
    try:
        yield
    except BaseException as error:
        if jax.distributed.is_initialized():
            timer = threading.Timer(_EXIT_TIMEOUT_SECONDS, os._exit, [exit_code(error)])
            timer.daemon = True
            timer.start()
            # With the timer started, because JAX waits for the others if devices are not used yet.
            with contextlib.suppress(RuntimeError, AssertionError):
                if jax.process_count() == 1:
                    timer.cancel()
        raise


def is_primary_process() -> bool:
    """Returns whether this process writes and prints on behalf of all hosts."""
    return jax.process_index() == 0


def any_host(flag: bool) -> bool:
    """Returns whether any host sets the flag; all hosts must call it together."""
    return bool(all_gather(np.array(flag)).any())


@contextlib.contextmanager
def enter_on_primary(context: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Enters a context in the primary process; all hosts must call it together.

    Raises:
        UserError, RunError: The context cannot be entered; raised on all hosts.
    """
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(context)

        compute_once(enter)
        yield


def sum_across_hosts(*counts: int) -> tuple[int, ...]:
    """Sums each count over all hosts, which must call it together."""
    if jax.process_count() == 1:
        return counts
    return tuple(all_gather(np.array(counts)).sum(axis=0).tolist())


def all_gather(array: np.ndarray) -> np.ndarray:
    """Gathers arrays of at most 32 bits of all hosts, which must call it together: (hosts, ...)."""
    if jax.process_count() == 1:
        return array[None]
    return np.asarray(multihost_utils.process_allgather(array))


def gather_text(text: str) -> list[str]:
    """Gathers a text of each host, in their order; all hosts must call it together."""
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = all_gather(np.array(len(data)))
    padded = np.zeros(max(1, lengths.max()), np.uint8)
    padded[: len(data)] = data
    rows = all_gather(padded)
    return [row[:n].tobytes().decode() for row, n in zip(rows, lengths, strict=True)]


def compute_once(compute: Callable[[], T]) -> T:
    """Calls a function on the primary process and returns its result on all hosts.

    All hosts must call it together. Hosts that each read a file system could see it at different
    times, and would all ask it for the same files.

    Args:
        compute: Function without collectives, whose result can be pickled.

    Raises:
        UserError: The function raises one; all hosts raise it with the same message.
        RunError: The function raises another error. The primary process raises that error itself.
    """
    if jax.process_count() == 1:
        return compute()
    result: Any = None
    error: Exception | None = None
    data = b""
    if is_primary_process():
        try:
            result = compute()
            data = pickle.dumps((False, "", result))
        except Exception as raised:
            # As text, because it may not be picklable. The other hosts wait for the broadcast.
            error = raised
            is_usage_error = isinstance(error, UserError)
            data = pickle.dumps((is_usage_error, describe_error(error), None))
    # The size first, because all hosts must pass arrays of one shape.
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(data), np.int32)))
    received = multihost_utils.broadcast_one_to_all(
        np.frombuffer(data.ljust(size, b"\0"), np.uint8)
    )
    if error is not None:
        raise error
    if is_primary_process():
        return cast(T, result)
    # The hosts of a run trust each other: all run the same program.
    is_usage_error, message, result = pickle.loads(np.asarray(received).tobytes())  # nosec B301
    if message:
        raise UserError(message) if is_usage_error else RunError(message)
    return cast(T, result)


class SharedFlags:
    """Flags that take effect on all hosts at the same step, whichever host sets them.

    Hosts exchange them on the devices after every step and read them after the next one, so no
    device ever waits for hosts.
    """

    def __init__(self) -> None:
        mesh = Mesh(np.array(jax.devices()), ("devices",), axis_types=(AxisType.Auto,))
        self._sharding = NamedSharding(mesh, PartitionSpec("devices"))
        self._any = jax.jit(
            lambda flags: flags.any(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec())
        )
        self._pending: jax.Array | None = None

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """Sends the flags of this host and returns which of them any host sent one call before.

        All hosts must call it together. A single host gets its own flags back at once.
        """
        if jax.process_count() == 1:
            return flags
        received = self._pending
        local = np.tile(np.array(flags), (jax.local_device_count(), 1))
        shape = (jax.device_count(), len(flags))
        self._pending = self._any(
            jax.make_array_from_process_local_data(self._sharding, local, shape)
        )
        if received is None:
            return (False,) * len(flags)
        return tuple(map(bool, np.asarray(received)))

    def clear(self) -> None:
        """Drops the flags that were sent and not yet returned; all hosts must call it together."""
        self._pending = None


class GracefulShutdown:
    """Turns SIGTERM, SIGHUP and the first Ctrl-C into a request to stop after the current step.

    The second Ctrl-C raises KeyboardInterrupt at once. SIGHUP is left alone where it is ignored, as
    under nohup. A context manager, which restores the previous handlers. Outside the main thread,
    where Python allows no handlers, it does nothing.

    Attributes:
        received: The latest signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "GracefulShutdown":
        self._previous = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
        if self._previous[signal.SIGHUP] == signal.SIG_IGN:
            del self._previous[signal.SIGHUP]
        if threading.current_thread() is threading.main_thread():
            for number in self._previous:
                signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
