"""Targets of fuzzing, and what a parser may do with an input."""

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixer_jax.data.decode import BadImageError
from mixer_jax.errors import RunError, UserError
from tests.fuzz.mutation import mutate

# Errors of the project. Commands print them in one line.
_REFUSALS = (UserError, RunError, BadImageError)
# Events of Python that run a program or open a connection.
_EXECUTION = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.spawn",
    "subprocess.Popen",
    "pty.spawn",
    "socket.connect",
)
# Events that change files, and the positions of the changed paths in their arguments.
_WRITES = {
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.rmdir": (0,),
    "os.mkdir": (0,),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.truncate": (0,),
}
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclasses.dataclass(frozen=True)
class Target:
    """A parser and inputs that it accepts.

    Attributes:
        name: Name in the table.
        seeds: Function that makes valid inputs.
        run: Function that parses an input; it may write to the folder.
        mutate: Function that changes a valid input.
        cost: Divisor of the number of inputs; larger for slow parsers.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    run: Callable[[bytes, Path], object]
    mutate: Callable[[bytes, np.random.Generator], bytes] = mutate
    cost: int = 1

    def make_input(self, seed: int, index: int) -> bytes:
        """Makes the input of an index; the first ones are the valid inputs themselves."""
        seeds = self.seeds()
        rng = np.random.default_rng([seed, index, *self.name.encode()])
        if index < len(seeds):
            return seeds[index]
        return self.mutate(seeds[int(rng.integers(len(seeds)))], rng)


class Violation(Exception):  # noqa: N818
    """An input made a parser run a program, or write outside of its folder."""


def run_input(target: Target, data: bytes, folder: Path) -> bool:
    """Parses an input; returns whether it was accepted, False if it was refused.

    Raises:
        Exception: The parser failed in any other way.
    """
    # Makes valid files elsewhere, at the first call.
    target.seeds()
    with watch(folder):
        try:
            target.run(data, folder)
        except _REFUSALS as error:
            message = str(error)
            if "\n" in message or "\r" in message or not message:
                raise AssertionError(f"not one line: {message[:300]!r}") from error
            return False
    return True


class _Watch:
    """Violations that the audit hook has seen since `folder` was set."""

    folder = ""
    is_installed = False
    violations: list[str] = []  # noqa: RUF012


@contextlib.contextmanager
def watch(folder: Path) -> Iterator[None]:
    """Raises Violation if the block runs a program, or writes outside of a folder.

    Seen are the calls of Python, not those of libraries written in C.
    """
    if not _Watch.is_installed:
        # At the first call it writes a file, with a lock that the hook would wait for.
        tempfile.gettempdir()
        sys.addaudithook(_audit)  # It cannot be removed.
        _Watch.is_installed = True
    _Watch.folder = os.path.realpath(folder)
    _Watch.violations = []
    try:
        yield
    finally:
        _Watch.folder = ""
    if _Watch.violations:
        raise Violation("; ".join(_Watch.violations))


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _Watch.folder:
        return
    if event in _EXECUTION:
        _Watch.violations.append(f"{event}{arguments!r}"[:300])
    elif event == "open" and len(arguments) == 3:
        path, _, flags = arguments
        if isinstance(flags, int) and flags & _WRITE_FLAGS:
            _check_path(event, path)
    elif event in _WRITES:
        # The last argument is the descriptor of a folder that relative paths are in, or -1.
        folder = arguments[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
        for position in _WRITES[event]:
            _check_path(event, arguments[position], folder)


def _check_path(event: str, path: Any, folder: Any = -1) -> None:
    # Files that are open already have a number.
    if not isinstance(path, str | bytes | os.PathLike):
        return
    path = os.fsdecode(path)
    if isinstance(folder, int) and folder >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    resolved = os.path.realpath(path)
    is_allowed = resolved in (_Watch.folder, "/dev/null") or resolved.startswith(
        f"{_Watch.folder}/"
    )
    caches = (tempfile.gettempdir(), *map(os.path.expanduser, ("~/.cache", "~/.config")))
    is_cache = "__pycache__" in resolved or any(
        resolved.startswith(f"{cache}/") for cache in caches if not _Watch.folder.startswith(cache)
    )
    if not is_allowed and not is_cache:
        _Watch.violations.append(f"{event} {resolved}"[:300])
