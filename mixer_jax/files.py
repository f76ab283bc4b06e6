"""Files that several programs read and write: atomic writes, and locks between programs."""

import contextlib
import errno
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP}


def atomic_write(path: Any, content: str | bytes) -> None:
    """Writes a file so that readers find either all of it or the old one, even after a crash.

    Args:
        path: `pathlib.Path`, or `epath.Path` for URLs.
        content: Bytes, or text to encode as UTF-8.

    Raises:
        OSError: The file cannot be written; the old one is unchanged.
    """
    # Several programs may write the same file at once: each has its own temporary file.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds a lock between programs, which the system releases when its holder ends.

    Args:
        path: Lock file on a local file system. Its folder is created if necessary; the file exists
            while the lock is held.
        wait: Whether to wait for another program that holds the lock.

    Yields:
        Whether the lock is held: False on file systems without locks.

    Raises:
        BlockingIOError: Another program holds the lock, and `wait` is false.
        OSError: The folder cannot be written.
    """
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, timeout=-1 if wait else 0, mode=0o666, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BlockingIOError(errno.EAGAIN, "locked by another program", str(path)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            path.unlink(missing_ok=True)
            lock.release()
