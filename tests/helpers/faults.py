"""Faults in system calls, injected by the preload library `faults.c`.

Programs that run with the library share its state. One program chooses a fault with `Faults.arm`,
and the next one that it starts meets the fault. The library also reaches calls that are not
Python's, such as those that write the arrays of checkpoints.
"""

import ctypes
import enum
import mmap
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mixer_jax.errors import UserError

# Equal to `enum call` in faults.c. "create" is an open that creates a file, "truncate" also one
# that empties it, and "remove" also removes folders.
CALLS = ("write", "sync", "create", "rename", "mkdir", "remove", "truncate")
IS_SUPPORTED = sys.platform == "linux" and shutil.which("cc") is not None

_SOURCE = Path(__file__).with_suffix(".c")
_PATH_MAX = 4096


class Action(enum.IntEnum):
    """Effect on the chosen call; equal to `enum action` in faults.c."""

    NONE = 0
    KILL = 1
    # Half of the bytes are written, or the call succeeds, but does not return.
    KILL_INSIDE = 2
    FAIL_ONCE = 3
    FAIL_FROM_THEN_ON = 4
    MOVE_CLOCK = 5


class _State(ctypes.Structure):
    """Equal to `struct state` in faults.c."""

    _fields_ = (
        ("counts", ctypes.c_int64 * len(CALLS)),
        ("num_matches", ctypes.c_int64),
        ("at_match", ctypes.c_int64),
        ("clock_seconds", ctypes.c_int64),
        ("action", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("is_logging", ctypes.c_int32),
        ("root", ctypes.c_char * _PATH_MAX),
        ("pattern", ctypes.c_char * (2 * _PATH_MAX)),
    )


class Call(NamedTuple):
    """Logged system call that succeeded.

    Attributes:
        name: One of `CALLS`.
        inode: Inode of the file.
        folder: Inode of its folder; 0 if the call does not change a name.
        size: Size of the file after the call, in bytes.
        path: Path before the call.
        new_path: Path after a rename.
        replaced: Inode of a file that the call removed or replaced; 0: none.
    """

    name: str
    inode: int
    folder: int
    size: int
    path: str
    new_path: str
    replaced: int


def build_library(folder: Path) -> dict[str, str]:
    """Compiles the library; returns the environment variables of programs that it watches.

    Args:
        folder: Empty folder for the library and its state, on the file system that is watched.

    Raises:
        UserError: The C compiler is missing or fails.
    """
    library = folder / "faults.so"
    command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"a C compiler (cc) must be installed to compile {_SOURCE}.") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"cc must compile {_SOURCE}, got:\n{error.stderr}") from None
    (folder / "state").write_bytes(bytes(ctypes.sizeof(_State)))
    (folder / "calls.log").touch()
    (folder / "removed").mkdir()
    return {"FAULT_FOLDER": str(folder), "LD_PRELOAD": str(library)}


class Faults:
    """State of the library, shared with the programs that it watches."""

    def __init__(self, folder: Path):
        """Opens the state in the folder of `build_library`."""
        self._folder = folder
        with (self._folder / "state").open("r+b") as file:
            self._state = _State.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(_State)))

    def arm(
        self,
        root: Path,
        action: Action = Action.NONE,
        at_call: int = 0,
        calls: Iterable[str] = CALLS,
        *,
        paths: str = "*",
        error: int = 0,
        clock_seconds: int = 0,
        is_logging: bool = False,
    ) -> None:
        """Chooses the next fault, and counts calls from zero.

        Args:
            root: Folder; only calls that change it or files below it are counted.
            action: What happens.
            at_call: Index of the call at which it happens, from 1, among those with a name in
                `calls` and a path that matches `paths`; only they can fail.
            calls: Some of `CALLS`.
            paths: Pattern of absolute paths, in which "*" also matches "/".
            error: Error number of calls that fail.
            clock_seconds: What is added to the clock, in seconds.
            is_logging: Whether to log calls, for `read_log` and `discard_unsynced`.
        """
        self.disarm()
        shutil.rmtree(self._folder / "removed")
        (self._folder / "removed").mkdir()
        os.truncate(self._folder / "calls.log", 0)
        state = self._state
        state.counts[:] = [0] * len(CALLS)
        state.num_matches, state.at_match, state.action = 0, at_call, action
        state.error, state.clock_seconds, state.is_logging = error, clock_seconds, is_logging
        state.pattern = f"@({'|'.join(calls)}) ".encode() + os.fsencode(paths)
        state.root = os.fsencode(root)

    def disarm(self) -> None:
        """Ends counting and all faults."""
        self._state.root = b""
        self._state.action = Action.NONE

    @property
    def num_calls(self) -> int:
        """Number of calls since `arm` that match its arguments, including those that failed."""
        return self._state.num_matches

    @property
    def was_reached(self) -> bool:
        """True if the chosen call has happened."""
        return 0 < self._state.at_match <= self.num_calls

    def count_calls(self) -> Counter[str]:
        """Counts all calls below the root since `arm` by name, including those that failed."""
        return Counter(dict(zip(CALLS, self._state.counts, strict=True)))

    def read_log(self) -> list[Call]:
        """Reads the calls that have succeeded since `arm`."""
        calls = []
        for line in (self._folder / "calls.log").read_text().splitlines():
            name, inode, folder, size, path, new_path, replaced = line.split("\t")
            calls.append(
                Call(name, int(inode), int(folder), int(size), path, new_path, int(replaced))
            )
        return calls

    def discard_unsynced(self, root: Path, rng: random.Random) -> Counter[str]:
        """Discards what a power loss may discard: contents and names that were not synced.

        A random number of the last changes of names is undone, in reverse order, as by a file
        system that journals its metadata. Each file that was created or emptied since `arm` and has
        unsynced contents is cut, to the size that was synced or to a random larger one.

        Args:
            root: Folder of `arm`, whose processes have ended.
            rng: Source of randomness.

        Returns:
            Number of discarded changes by the name of the call.
        """
        self.disarm()
        discarded: Counter[str] = Counter()
        synced_sizes: dict[int, int] = {}
        unsynced_names: list[Call] = []
        for call in self.read_log():
            if call.name == "sync":
                synced_sizes[call.inode] = call.size
                unsynced_names = [c for c in unsynced_names if c.folder != call.inode]
            elif call.name in ("create", "truncate"):
                synced_size = synced_sizes.get(call.inode, call.size)
                synced_sizes[call.inode] = min(synced_size, call.size)
            if call.name in ("create", "rename", "mkdir", "remove"):
                unsynced_names.append(call)
        for path in sorted(root.rglob("*")):
            status = path.lstat()
            synced_size = synced_sizes.get(status.st_ino, status.st_size)
            if path.is_file() and status.st_size > synced_size:
                is_partly_kept = rng.random() < 0.5
                kept = rng.randrange(synced_size, status.st_size) if is_partly_kept else synced_size
                os.truncate(path, kept)
                discarded["write"] += 1
        num_undone = rng.randint(0, len(unsynced_names))
        for call in unsynced_names[::-1][:num_undone]:
            self._undo(call)
            discarded[call.name] += 1
        return discarded

    def _undo(self, call: Call) -> None:
        """Undoes the change of a name."""
        path, removed = Path(call.path), self._folder / "removed" / str(call.replaced)
        # Absent if a folder above it was removed, and that was synced.
        if call.name == "create":
            path.unlink(missing_ok=True)
        elif call.name == "mkdir":
            shutil.rmtree(path, ignore_errors=True)
        elif call.name == "rename" and os.path.lexists(call.new_path) and path.parent.exists():
            os.rename(call.new_path, path)
            if call.replaced:
                os.link(removed, call.new_path)
        elif call.name == "remove" and path.parent.exists() and not os.path.lexists(path):
            if call.replaced:
                os.link(removed, path)
            else:
                path.mkdir()
