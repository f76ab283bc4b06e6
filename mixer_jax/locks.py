"""Locks between programs: files that the system lets go when their holder ends, however it does."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP}


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds a lock, whose file is there only meanwhile; its folder is made if need be.

    Args:
        path: of the lock's file, on this machine's file system.
        wait: whether to wait for another program that holds it.

    Yields:
        Whether it is held; False where the file system knows no locks.

    Raises:
        BlockingIOError: another program holds it, and `wait` is false.
        OSError: the folder cannot be written.
    """
    import fcntl  # There is none on Windows.

    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            if error.errno not in _NO_LOCKS:
                raise
            yield False
            return
        # Whoever held the lock before has removed its file; then a new one is needed.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                break
        os.close(file)
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(file)
