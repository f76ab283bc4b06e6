"""Faults in system calls, injected by the preload library `faults.c`.

Programs that run with the library share its state: one of them, the campaign, chooses a fault with
`Faults.arm`, and the next process that it starts meets the fault.
"""

import ctypes
import enum
import mmap
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mixer_jax.errors import UserError

# Equal to `enum call` in faults.c.
CALLS = ("write", "sync", "create", "rename", "mkdir", "remove", "truncate")


class Action(enum.IntEnum):
    """What happens at the chosen call; equal to `enum action` in faults.c."""

    NONE = 0
    KILL = 1
    # Half of the bytes are written, or the call has succeeded, but the process does not learn it.
    KILL_INSIDE = 2
    FAIL_ONCE = 3
    FAIL_FROM_THEN_ON = 4
    MOVE_CLOCK = 5


class _State(ctypes.Structure):
    """Equal to `struct state` in faults.c."""

    _fields_ = (
        ("num_calls", ctypes.c_int64),
        ("at_call", ctypes.c_int64),
        ("clock_seconds", ctypes.c_int64),
        ("action", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("mask", ctypes.c_int32),
        ("is_logging", ctypes.c_int32),
        ("root", ctypes.c_char * 4096),
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
        UserError: gcc is missing or fails.
    """
    library, source = folder / "faults.so", Path(__file__).parent / "faults.c"
    command = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("gcc must be installed: it compiles tests/campaign/faults.c.") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"gcc must compile {source}, got:\n{error.stderr}") from None
    (folder / "state").write_bytes(bytes(ctypes.sizeof(_State)))
    (folder / "calls.log").touch()
    (folder / "removed").mkdir()
    return {"FAULT_FOLDER": str(folder), "LD_PRELOAD": str(library)}


class Faults:
    """State of the library in this process and its child processes."""

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
        error: int = 0,
        clock_seconds: int = 0,
        is_logging: bool = False,
    ) -> None:
        """Chooses the next fault, and counts from zero.

        Args:
            root: Folder; calls that change files below it are counted.
            action: What happens.
            at_call: Number of the call at which it happens; the first is 1.
            calls: Names of the calls that are counted and that may fail.
            error: Error number of calls that fail.
            clock_seconds: What is added to the clock, in seconds.
            is_logging: Whether to log calls, for `read_log` and `discard_unsynced`.
        """
        self.disarm()
        shutil.rmtree(self._folder / "removed")
        (self._folder / "removed").mkdir()
        os.truncate(self._folder / "calls.log", 0)
        state = self._state
        state.num_calls, state.at_call, state.action = 0, at_call, action
        state.error, state.clock_seconds, state.is_logging = error, clock_seconds, is_logging
        state.mask = sum(1 << CALLS.index(name) for name in calls)
        state.root = os.fsencode(root)

    def disarm(self) -> None:
        """Ends counting and all faults."""
        self._state.root = b""
        self._state.action = Action.NONE

    @property
    def was_reached(self) -> bool:
        """Whether the chosen call has happened."""
        return 0 < self._state.at_call <= self._state.num_calls

    def read_log(self) -> list[Call]:
        """Reads the calls that have succeeded since `arm`."""
        calls = []
        for line in (self._folder / "calls.log").read_text().splitlines():
            name, inode, folder, size, path, new_path, replaced = line.split("\t")
            calls.append(
                Call(name, int(inode), int(folder), int(size), path, new_path, int(replaced))
            )
        return calls

    def discard_unsynced(
        self, root: Path, sizes_before: dict[int, int], rng: random.Random
    ) -> Counter[str]:
        """Discards what a loss of power may discard: contents and names that were not synced.

        A random number of the last changes of names is undone, in reverse order, as by a file
        system that journals its metadata. Each file with unsynced contents is cut, to the size that
        was synced or to a random larger one.

        Args:
            root: Folder of `arm`, whose processes have ended.
            sizes_before: Size by inode of the files at the time of `arm`, all of them synced.
            rng: Source of randomness.

        Returns:
            Number of discarded changes by the name of the call.
        """
        self.disarm()
        calls = self.read_log()
        discarded: Counter[str] = Counter()
        synced_sizes = dict(sizes_before)
        unsynced_names: list[Call] = []
        for call in calls:
            if call.name == "sync":
                synced_sizes[call.inode] = call.size
                unsynced_names = [c for c in unsynced_names if c.folder != call.inode]
            elif call.name in ("create", "rename", "mkdir", "remove"):
                unsynced_names.append(call)
            if call.name in ("create", "truncate"):
                synced_sizes[call.inode] = 0
        changed = {call.inode for call in calls if call.name in ("write", "truncate", "create")}
        for path in sorted(root.rglob("*")):
            status = path.lstat()
            synced = synced_sizes.get(status.st_ino, 0)
            if path.is_file() and status.st_ino in changed and status.st_size > synced:
                is_partly_kept = rng.random() < 0.5
                kept = rng.randrange(synced, status.st_size) if is_partly_kept else synced
                os.truncate(path, kept)
                discarded["write"] += 1
        num_undone = rng.randint(0, len(unsynced_names))
        for call in unsynced_names[::-1][:num_undone]:
            self._undo(call)
            discarded[call.name] += 1
        return discarded

    def _undo(self, call: Call) -> None:
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
