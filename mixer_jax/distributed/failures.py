"""How the processes of one run end when one of them is missing: soon, in one line, by an exit code.

JAX watches the hosts of a run. When one is gone, it prints a page of C++ and aborts the others, who
could otherwise wait for ever in a computation that all take part in. Here that page becomes a line.
"""

import contextlib
import ctypes
import io
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax

from mixer_jax.errors import UserError, summarize_error

# What JAX says before it aborts, and how the lines begin that may lead to it.
_FATAL = b"JAX distributed service detected fatal errors"
_HERALD = re.compile(rb"^[IWEF]\d{4} .*(coordination_s|preemption_sync|client\.h)", re.M)
_HERALDED_SECONDS = 3.0
_MUCH = 1 << 16
# What computations fail with, by gloo on CPUs, by NCCL on GPUs.
_LOST = ("gloo", "nccl", "connection", "socket", "heartbeat", "unavailable", "barrier", "preempted")
# Hosts that meet the same error end together: so long they wait for each other.
_ENDING_SECONDS = 10.0

# One process ends once, whichever of its threads learns of it first.
_ending = threading.Lock()
# The exit code of a process that is ending by an error of its own, which it has told.
_failed_with: list[int] = []
_advice: list[Callable[[], str]] = []


def exit_now(code: int, line: str = "") -> NoReturn:
    """Ends this process at once, after a line on standard error: no barrier, nothing that waits."""
    _ending.acquire()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    if line:
        with contextlib.suppress(Exception):
            print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(code)


def exit_on_lost_host(reason: str = "") -> NoReturn:
    """Ends this process because another host is gone; quietly if it has told another reason.

    Args:
        reason: by what it was noticed; gloo takes a host for gone that it waits for too long.
    """
    if _failed_with:
        exit_now(_failed_with[0])
    # Where the run's folder hangs, one goes without its advice. Python that ends starts no threads.
    with contextlib.suppress(RuntimeError):
        _countdown(10.0, 1)
    advice = "the same command on all hosts goes on"
    with contextlib.suppress(Exception):
        advice = _advice[-1]() if _advice else advice
    process, count = _whereabouts()[:2]
    noticed = f": {reason}" if reason else ""
    exit_now(1, f"another host is gone (this is process {process} of {count}{noticed}); {advice}")


@contextlib.contextmanager
def resume_hint(advice: Callable[[], str]) -> Iterator[None]:
    """While inside, tells the loss of a host with this advice.

    Args:
        advice: returns how the work goes on.
    """
    _advice.append(advice)
    try:
        yield
    finally:
        _advice.pop()


@contextlib.contextmanager
def noticing_loss() -> Iterator[None]:
    """Ends this process where a computation inside fails because another host is gone.

    At once: what is closed on leaving, such as a checkpoint half written, would wait for that host.
    """
    try:
        yield
    except Exception as error:
        if jax.distributed.is_initialized() and _tells_loss(error):
            exit_on_lost_host(summarize_error(error))
        raise


def _tells_loss(error: BaseException | None) -> bool:
    """Says whether an error, or one that it came of, is that a computation lost a host."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, jax.errors.JaxRuntimeError) and any(word in text for word in _LOST):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def propagate_failure() -> Iterator[None]:
    """Lets an error inside end all hosts, not only this one; for doors, around all their work.

    Hosts that fail alike leave together. One that fails alone leaves the others after some seconds,
    which they notice.
    """
    try:
        with noticing_loss():
            yield
    except BaseException as error:
        if jax.distributed.is_initialized() and _whereabouts()[1] > 1:
            code = 1
            if isinstance(error, UserError):
                code = 2
            elif isinstance(error, KeyboardInterrupt):
                code = 128 + signal.SIGINT
            _failed_with.append(code)
            _countdown(_ENDING_SECONDS, code)
        raise


@contextlib.contextmanager
def join_timeout(seconds: float) -> Iterator[None]:
    """Ends this process, with exit code 1, if the hosts have not met inside in so many seconds."""
    stop_watching = watch_standard_error()
    met = threading.Event()

    def give_up() -> None:
        if met.wait(seconds):
            return
        process, count, address = _whereabouts()
        # Not the code of a mistake: a host may have been late, and the next attempt succeed.
        exit_now(
            1,
            f"not all {count} hosts of this run met within {seconds:,.0f} seconds "
            f"(config.distributed_timeout): this is process {process}, the first one listens at "
            f"{address}; start the same command on all hosts, let them reach that address, or "
            "allow more time",
        )

    threading.Thread(target=give_up, daemon=True).start()
    try:
        yield
    except BaseException:
        stop_watching()
        raise
    finally:
        met.set()


def watch_standard_error() -> Callable[[], None]:
    """Reads what C++ prints, passes it on, and ends the process in our words where JAX aborts it.

    What Python prints goes its own way, so that nothing of it is lost when the process ends.

    Returns:
        what leaves all as it was before.
    """
    python_error, true_error = sys.stderr, os.dup(2)
    reader, writer = os.pipe()
    with contextlib.suppress(Exception):
        sys.stderr.flush()
    sys.stderr = _Stream(true_error)
    os.dup2(writer, 2)
    os.close(writer)
    # Whoever aborts first sleeps, for as many seconds as the signal's number says (6), which leaves
    # the time to read why. `sleep` of C needs nothing of Python, which may be busy.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    threading.Thread(target=_pass_on, args=[reader, true_error], daemon=True).start()

    def stop() -> None:
        libc.signal(signal.SIGABRT, None)
        # Nobody can write to the pipe any more, so its reader ends.
        os.dup2(true_error, 2)
        sys.stderr = python_error

    return stop


def _pass_on(reader: int, true_error: int) -> None:
    while said := os.read(reader, _MUCH):
        if herald := _HERALD.search(said):
            # What it leads to is known soon; until then it waits.
            _write(true_error, said[: herald.start()])
            said = said[herald.start() :]
            until = time.monotonic() + _HERALDED_SECONDS
            while _FATAL not in said and (left := until - time.monotonic()) > 0:
                if select.select([reader], [], [], left)[0]:
                    said += os.read(reader, _MUCH)
            if _FATAL in said:
                exit_on_lost_host()
        _write(true_error, said)


def _write(descriptor: int, said: bytes) -> None:
    with contextlib.suppress(OSError):
        while said:
            said = said[os.write(descriptor, said) :]


class _Stream(io.TextIOWrapper):
    """Standard error of Python; that nobody reads it any more ends no run."""

    def __init__(self, descriptor: int):
        file = io.FileIO(descriptor, "w", closefd=False)
        super().__init__(file, "utf-8", "backslashreplace", write_through=True)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)


def _countdown(seconds: float, code: int) -> None:
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()


def _whereabouts() -> tuple[int, int, str]:
    """Returns the number of this process, that of all, and the address of the first."""
    # Before the hosts have met, only JAX knows what a cluster told it.
    from jax._src.distributed import global_state

    return (
        global_state.process_id,
        global_state.num_processes,
        f"{global_state.coordinator_address}",
    )
