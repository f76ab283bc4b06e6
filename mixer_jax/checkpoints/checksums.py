"""Checksums of the files of a checkpoint, by which damage is noticed before anything is restored.

The format of orbax protects its indices, but not the numbers: most single flipped bits would load
as other weights. CRC-32 detects every error of up to 32 adjacent bits, and isal computes it faster
than files can be read.

A checkpoint without checksums is from an older version, or is in an object store. Object stores
keep and verify their own checksums.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from isal import isal_zlib

from mixer_jax.errors import RunError, summarize_error
from mixer_jax.files import parse_json

CHECKSUMS_FILE = "checksums.json"
_ALGORITHM = "crc32"
# Parts of files that are read in parallel, by threads or hosts.
_PART_SIZE = 2**26
_READ_SIZE = 2**20  # Fits in a core's cache, where its checksum is computed.


class DamagedFileError(ValueError):
    """A file of a checkpoint that is missing or has other contents than were written."""


@contextlib.contextmanager
def read_errors(folder: Any, file: str) -> Iterator[None]:
    """Raises DamagedFileError if a file of a checkpoint is missing, RunError if it cannot be read.

    A file server that fails for a moment says nothing about the file. The libraries that read
    object stores raise errors of many types.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedFileError(f"{file} is missing") from error
    except Exception as error:
        raise RunError(
            f"{folder / file} cannot be read ({summarize_error(error)}). Run the same command "
            "again; if that does not help, move the folder of this step elsewhere."
        ) from error


class _Part(NamedTuple):
    """Part of a file; `checksum` is the expected one."""

    file: str
    start: int
    checksum: int


def write_checksums(folder: Path, exclude: Sequence[str] = ()) -> None:
    """Writes the checksums of all files in a local folder to `CHECKSUMS_FILE` in it.

    Args:
        folder: Complete checkpoint.
        exclude: Paths, relative to the folder, of files that will still change.

    Raises:
        OSError: A file cannot be read, or the checksums cannot be written.
    """
    sizes = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    sizes = {file: size for file, size in sizes.items() if file not in exclude}
    parts = [(file, start) for file, size in sizes.items() for start in _part_starts(size)]
    with ThreadPoolExecutor() as pool:
        computed = pool.map(lambda part: _checksum(folder / part[0], part[1]), parts)
        checksums: dict[str, list[int]] = {file: [] for file in sizes}
        for (file, _), checksum in zip(parts, computed, strict=True):
            checksums[file].append(checksum)
    content = {
        "algorithm": _ALGORITHM,
        "part_size": _PART_SIZE,
        "files": {
            file: {"size": size, "checksums": checksums[file]} for file, size in sizes.items()
        },
    }
    (folder / CHECKSUMS_FILE).write_text(json.dumps(content))


def verify_checksums(
    folder: Any, items: Sequence[str] = (), *, worker: int = 0, num_workers: int = 1
) -> None:
    """Compares the files of a checkpoint with their checksums; does nothing if it has none.

    Args:
        folder: `epath.Path` of the checkpoint.
        items: Subfolders to verify; empty: the whole checkpoint.
        worker: Index among the workers that verify a part of the files each.
        num_workers: Number of workers.

    Raises:
        DamagedFileError: A file, which the message starts with, is missing or damaged.
        RunError: A file cannot be read, perhaps only for the moment.
    """
    if not has_checksums(folder):
        return
    with read_errors(folder, CHECKSUMS_FILE):
        data = (folder / CHECKSUMS_FILE).read_bytes()
    try:
        content = parse_json(data)
        if (content["algorithm"], content["part_size"]) != (_ALGORITHM, _PART_SIZE):
            raise ValueError("unknown algorithm")
        files = {
            file: (int(entry["size"]), list(map(int, entry["checksums"])))
            for file, entry in content["files"].items()
            if not items or file.partition("/")[0] in items
        }
        parts = [
            _Part(file, start, checksum)
            for file, (size, checksums) in files.items()
            for start, checksum in zip(_part_starts(size), checksums, strict=True)
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedFileError(f"{CHECKSUMS_FILE} is not valid") from error
    for file, (size, _) in files.items():
        _check_size(folder, file, size)

    def verify(part: _Part) -> None:
        with read_errors(folder, part.file):
            found = _checksum(folder / part.file, part.start)
        if found != part.checksum:
            raise DamagedFileError(f"{part.file} differs from its checksum")

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(verify, parts[worker::num_workers]):
            pass


def has_checksums(folder: Any) -> bool:
    """Returns whether a checkpoint has checksums.

    Raises:
        RunError: The folder cannot be read, perhaps only for the moment.
    """
    with read_errors(folder, CHECKSUMS_FILE):
        return bool((folder / CHECKSUMS_FILE).exists())


def require_checksums(folder: Any) -> None:
    """Raises DamagedFileError if a checkpoint has lost its checksums."""
    if not has_checksums(folder):
        raise DamagedFileError(f"{CHECKSUMS_FILE} is missing")


def _check_size(folder: Any, file: str, size: int) -> None:
    with read_errors(folder, file):
        found = (folder / file).stat().length
    if found != size:
        raise DamagedFileError(f"{file} has {found:,} instead of {size:,} bytes")


def _part_starts(size: int) -> range:
    return range(0, max(size, 1), _PART_SIZE)


def _checksum(path: Any, start: int) -> int:
    checksum, remaining = 0, _PART_SIZE
    with path.open("rb") as file:
        file.seek(start)
        while remaining and (chunk := file.read(min(_READ_SIZE, remaining))):
            checksum = isal_zlib.crc32(chunk, checksum)
            remaining -= len(chunk)
    return checksum
