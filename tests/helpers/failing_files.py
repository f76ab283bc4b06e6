"""File systems that fail: system calls on files that match a pattern return an error.

A small library in C, preloaded into a process, also reaches writes that are not Python's, such as
those of checkpoints.
"""

import errno
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

_SOURCE = Path(__file__).with_suffix(".c")
_EVER = 10**9


class Fault(NamedTuple):
    """System calls that fail.

    Attributes:
        pattern: Pattern of "CALL PATH" with the absolute path, such as "rename */checkpoints/*".
            The calls are open (for writing), write, fsync, ftruncate, rename, unlink, rmdir and
            mkdir.
        code: Error, such as errno.EIO.
        first: Index of the first matching call that fails, from 1.
        is_lasting: Whether all matching calls after that one fail, too.
    """

    pattern: str
    code: int = errno.EIO
    first: int = 1
    is_lasting: bool = False


def compile_library(folder: Path) -> Path:
    """Compiles the library; skips the test where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = folder / "failing_files.so"
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library


def fault_env(fault: Fault, library: Path, log: Path) -> dict[str, str]:
    """Returns environment variables with which the calls of a process fail.

    Args:
        fault: Calls that fail.
        library: Compiled library.
        log: File to which a line per call that failed is appended: "CALL PATH".
    """
    return {
        "LD_PRELOAD": str(library),
        "FAIL_PATTERN": fault.pattern,
        "FAIL_ERRNO": str(fault.code),
        "FAIL_FIRST": str(fault.first),
        "FAIL_COUNT": str(_EVER if fault.is_lasting else 1),
        "FAIL_LOG": str(log),
    }
