"""Network between the hosts of a run that can be cut: two namespaces of Linux with a link."""

import contextlib
import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator

_CLONE_NEWUTS, _CLONE_NEWNET = 0x04000000, 0x40000000
# Addresses and devices of the two sides.
ADDRESSES = ("10.0.0.1", "10.0.0.2")
_DEVICES = ("link0", "link1")


class Network:
    """Two sides, each a network namespace, with a link between them.

    They exist until the last process in them has ended. A context manager.
    """

    def __enter__(self) -> "Network":
        """Creates the namespaces; raises OSError if this process may not."""
        with contextlib.ExitStack() as stack:
            self._own = _open_namespace(stack)
            self._sides = []
            for _ in ADDRESSES:
                _call("unshare", _CLONE_NEWNET)
                self._sides.append(_open_namespace(stack))
                _call("setns", self._own, _CLONE_NEWNET)
            self._run(0, f"link add {_DEVICES[0]} type veth peer name {_DEVICES[1]}")
            self._run(0, f"link set {_DEVICES[1]} netns /proc/{os.getpid()}/fd/{self._sides[1]}")
            for side, (address, device) in enumerate(zip(ADDRESSES, _DEVICES, strict=True)):
                self._run(side, f"address add {address}/24 dev {device}")
                self._run(side, f"link set {device} up")
                self._run(side, "link set lo up")
            self._files = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def move_process(self, side: int) -> None:
        """Moves this process, which must not have threads, to a side for the rest of its life."""
        _call("setns", self._sides[side], _CLONE_NEWNET)
        # Gloo, by which JAX's CPU devices communicate, listens at the address of the host name.
        _call("unshare", _CLONE_NEWUTS)
        socket.sethostname(ADDRESSES[side])

    def cut(self) -> None:
        """Cuts the link: the first side's packets are lost, the second one cannot send any."""
        self._run(1, f"link set {_DEVICES[1]} down")

    @contextlib.contextmanager
    def enter(self, side: int) -> Iterator[None]:
        """Moves this thread to a side for a block; sockets that it opens there stay there."""
        _call("setns", self._sides[side], _CLONE_NEWNET)
        try:
            yield
        finally:
            _call("setns", self._own, _CLONE_NEWNET)

    def _run(self, side: int, command: str) -> None:
        with self.enter(side):
            result = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
        if result.returncode:
            raise OSError(f"ip {command}: {result.stderr.strip()}")


def _open_namespace(stack: contextlib.ExitStack) -> int:
    file = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    stack.callback(os.close, file)
    return file


def _call(name: str, *arguments: int) -> None:
    """Calls a function of the C library that the `os` module of Python 3.11 lacks."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
