"""Files that several programs read and write: atomic writes, growing files, and locks."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mixer_jax.errors import (
    OutputWriteError,
    RunError,
    UserError,
    disk_failure,
    iter_causes,
    summarize_error,
)

# Every 0.1 seconds: removals at most, and checks after which a folder stays away.
_REMOVE_ATTEMPTS, _GONE_CHECKS = 50, 10
_OPEN_FILES = 4096
# Names of the temporary files of `atomic_write`.
_TEMPORARY = re.compile(r".+\.[0-9a-f]{32}\.tmp")
# Files of this library nest fewer than ten.
_MAX_JSON_DEPTH = 100
# Content of lock files. No system has process ids of more digits.
_OWNER = re.compile(r"process (?P<pid>[0-9]{1,9}) on (?P<host>.+)")
_MAX_OWNER = 300
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP}
_NO_SYNC = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}


def raise_open_file_limit() -> None:
    """Raises the process's limit on open files, as far as the system allows.

    Reading a TFDS dataset keeps each of its files open, more than 1,000 for ImageNet-21k, and
    preparing it sorts its data in as many. The usual limit is 1,024.
    """
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        limit = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def atomic_write(path: Any, content: str | bytes) -> None:
    """Writes a file so that readers find either all of it or the old one, even after a power loss.

    Args:
        path: `pathlib.Path`, or `epath.Path` for URLs.
        content: Bytes, or text to encode as UTF-8.

    Raises:
        OSError: The file cannot be written; the old one is unchanged.
    """
    # Several programs may write the same file at once: each has its own temporary file.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with name_file(path):
        try:
            if isinstance(content, str):
                # Names of files can contain bytes that are not UTF-8, which Python represents by
                # surrogates.
                content = content.encode(errors="backslashreplace")
            temporary.write_bytes(content)
            # Without it, file systems may store the new name before the contents.
            sync(temporary)
            temporary.replace(path)
        except BaseException:
            _unlink(temporary)
            raise
        sync(path.parent)


def remove_temporary_files(folder: Path, names: Iterable[str]) -> None:
    """Removes temporary files that killed or failed calls of `atomic_write` left, if possible.

    Args:
        folder: Local folder.
        names: Patterns of the names of files that no other program is writing.
    """
    for name in names:
        for path in folder.glob(f"{name}.*.tmp"):
            if _TEMPORARY.fullmatch(path.name):
                _unlink(path)


@contextlib.contextmanager
def name_file(path: Any) -> Iterator[None]:
    """Adds the name of a file to errors of the operating system that name none.

    Python names a file in errors of opening it, but not of writing, syncing or closing it. Errors
    of removing a folder with its files name them without the folder.

    Args:
        path: File, or folder of several, that the block writes.
    """
    try:
        yield
    except Exception as error:
        for cause in iter_causes(error):
            if isinstance(cause, OSError) and cause.errno:
                name = cause.filename
                if name is None or (isinstance(name, str) and not os.path.isabs(name)):
                    cause.filename = os.fspath(path)
        raise


def sync(path: Any) -> None:
    """Waits until the contents of a file, or the names in a folder, survive a loss of power.

    Does nothing at URLs: object stores answer only when the contents are safe.

    Args:
        path: `pathlib.Path` or `epath.Path`.

    Raises:
        OSError: The disk is full or failing.
    """
    if "://" in os.fspath(path):
        return
    try:
        with name_file(path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        # Some file systems cannot sync, or not folders; Windows cannot open folders.
        if error.errno not in _NO_SYNC:
            raise


def sync_tree(folder: Path) -> None:
    """Calls `sync` for a local folder and for everything in it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def parse_json(text: str | bytes) -> Any:
    """Parses JSON that may be damaged or hostile.

    Raises:
        ValueError: The text is not JSON in UTF-8, or is nested so deeply that recursive functions
            would fail.
    """
    try:
        document = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error
    brackets = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, brackets)) <= _MAX_JSON_DEPTH:  # type: ignore[arg-type]
        return document
    nodes, depth = [document], 0
    while nodes := [child for node in nodes for child in _children(node)]:
        depth += 1
        if depth > _MAX_JSON_DEPTH:
            raise ValueError("JSON is nested too deeply")
    return document


def _children(node: Any) -> Iterable[Any]:
    """Returns the lists and dicts in a node of a JSON document."""
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return (value for value in values if isinstance(value, list | dict))


def is_integer(value: Any) -> bool:
    """Returns whether a value from JSON is an integer of 64 bits; Python's have any length."""
    return type(value) is int and -(2**63) <= value < 2**63


def is_number(value: Any) -> bool:
    """Returns whether a value from JSON is a number that can be converted to float."""
    return isinstance(value, float) or is_integer(value)


def read_json_lines(path: Any) -> list[dict[str, Any]]:
    """Reads a text file of one JSON object per line, except a last line that is incomplete.

    Args:
        path: `epath.Path`; a file that does not exist has no lines.

    Raises:
        UserError: A line is not a JSON object.
    """
    try:
        text = path.read_text() if path.exists() else ""
        # Complete lines end in a newline: what follows the last newline is empty or cut off.
        lines = [parse_json(line) for line in text.split("\n")[:-1]]
        if all(isinstance(line, dict) for line in lines):
            return lines
    except ValueError:
        pass
    raise UserError(f"{str(path)!r} has lines that are not JSON objects. Move the file away.")


class LineFile:
    """Text file to which lines are appended, on disks and object stores.

    Object stores cannot append. There, a thread rewrites the whole file now and then, so that a log
    of n lines does not cost the training loop n uploads of up to n lines.
    """

    def __init__(self, path: Any, lines: Iterable[str], interval: float = 30.0):
        """Replaces the contents of the file, which is created only if there are lines.

        Args:
            path: `epath.Path`, local or of an object store.
            lines: First lines, without newlines.
            interval: Time between two writes to an object store, in seconds.
        """
        self._path, self._interval = path, interval
        self._lines = list(lines)
        # Whether the name of the file survives a loss of power.
        self._is_name_synced = bool(self._lines or path.exists())
        if self._is_name_synced:
            atomic_write(path, _join_lines(self._lines))
        self._num_written = len(self._lines)
        self._is_local = "://" not in str(path)
        self._background = None if self._is_local else ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None
        self._written_at = -math.inf
        if self._is_local:
            self._lines.clear()

    def append(self, *lines: str) -> None:
        """Appends lines, without newlines; on object stores, they are written later.

        Raises:
            OSError: A local file cannot be written.
        """
        if self._background is None:
            with name_file(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(_join_lines(lines))
            return
        self._lines += lines
        is_idle = self._pending is None or self._pending.done()
        if is_idle and time.monotonic() - self._written_at >= self._interval:
            # If it fails, the next one writes the same lines.
            self._written_at = time.monotonic()
            self._pending = self._background.submit(self._write)

    def flush(self) -> None:
        """Waits until all lines are written, and survive a loss of power.

        Raises:
            Exception: They cannot be written. Object stores raise various exceptions.
        """
        if self._background is None:
            if self._path.exists():
                sync(self._path)
                if not self._is_name_synced:
                    sync(self._path.parent)
                    self._is_name_synced = True
            return
        if self._pending is not None:
            futures.wait([self._pending])
        if self._num_written < len(self._lines):
            self._background.submit(self._write).result()

    def close(self) -> None:
        """Waits until all lines are written; prints an error instead of raising it."""
        if self._background is None:
            return
        try:
            self.flush()
        except Exception as error:
            lost = len(self._lines) - self._num_written
            print(
                f"{self._path} lacks its last {lost:,} lines: {summarize_error(error)}",
                file=sys.stderr,
            )
        self._background.shutdown(wait=True)

    def _write(self) -> None:
        count = len(self._lines)
        atomic_write(self._path, _join_lines(self._lines[:count]))
        self._num_written = count


def _join_lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


@contextlib.contextmanager
def output_errors(target: str) -> Iterator[None]:
    """Raises OutputWriteError or WriteFailureError if the block fails to write into `target`.

    Usage errors and failures of the run remain as they are.
    """
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        # Every file system has its own exceptions.
        if failure := disk_failure(f"{target} cannot be written", error):
            raise failure from error
        reason = getattr(error, "strerror", None) or summarize_error(error)
        raise OutputWriteError(
            f"{target} must be writable ({reason}). Fix that and rerun the same command to resume."
        ) from error


@contextlib.contextmanager
def atomic_target(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write a local file to, which replaces `path` on success.

    Raises:
        OSError: The file cannot be written; the old one is unchanged.
    """
    temporary = Path(f"{path}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # Libraries may replace the file by one that only its owner can read.
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        _unlink(temporary)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill, which becomes the local folder `path` on success.

    Args:
        path: Path at which there is nothing, or an empty folder.

    Raises:
        OSError: The folder cannot be written, or `path` has files by now.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_abandoned(path: Path) -> None:
    """Removes a local folder, as far as possible, to which threads may still be writing.

    Writes that a library abandoned after the first one failed create the folder again.
    """
    gone = 0
    for _ in range(_REMOVE_ATTEMPTS):
        gone = 0 if path.exists() else gone + 1
        if gone == _GONE_CHECKS:
            return
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.1)


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds a lock between programs, which the system releases when its holder ends.

    Args:
        path: Lock file on a local file system. Its folder is created if necessary, and removed
            afterwards if it is still empty; the file exists while the lock is held.
        wait: Whether to wait for another program that holds the lock.

    Yields:
        Whether the lock is held: False on file systems without locks.

    Raises:
        BlockingIOError: Another program holds the lock, which `strerror` names, and `wait` is
            false.
        OSError: The folder cannot be written.
    """
    import filelock

    with contextlib.ExitStack() as stack:
        created = [folder for folder in path.parents if not folder.exists()]
        for folder in reversed(created):
            stack.callback(_remove_empty, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in created:
            # Otherwise, a loss of power could remove the folder with everything in it.
            sync(folder.parent)
        timeout = -1 if wait else 0
        lock = filelock.FileLock(path, timeout=timeout, mode=0o666, fallback_to_soft=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise BlockingIOError(
                errno.EAGAIN, f"locked by {_read_owner(path)}", str(path)
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        try:
            if lock.is_locked:
                # The name of the owner is not worth failing for, e.g. on a full disk.
                with contextlib.suppress(OSError):
                    path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield lock.is_locked
        finally:
            if lock.is_locked:
                _unlink(path)
                lock.release()


def is_locked(path: Path) -> bool | None:
    """Returns whether a program of this machine holds a lock, without touching its file.

    None if that is unknown here: a program of another machine wrote the file and holds the lock, or
    was killed.
    """
    if not path.exists():
        return False
    match = _OWNER.fullmatch(_read_owner(path))
    if match is None or match["host"] != socket.gethostname() or sys.platform == "win32":
        return None
    try:
        # Signal 0 only checks that the process exists.
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _unlink(path: Any) -> None:
    """Removes a file, which is left if that fails: it does no harm, and is not worth an error."""
    # Errors of object stores are of many types.
    with contextlib.suppress(Exception):
        path.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _read_owner(lock_file: Path) -> str:
    try:
        owner = " ".join(lock_file.read_text(errors="replace").split())[:_MAX_OWNER]
        return owner or "another process"
    except OSError:
        return "another process"
