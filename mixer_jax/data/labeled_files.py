"""Image files with labels, the examples of folders and manifests."""

import array
import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mixer_jax.data.decode import BadImageError, decode
from mixer_jax.data.image_files import display_path, read_image
from mixer_jax.data.source import DIGEST, Example, Examples, LabelArrays, Source
from mixer_jax.errors import MissingFileError, RunError, UserError, abbreviate

# Directories of which a fingerprint has separate digests.
_MAX_DIRECTORIES = 1000
# Files whose sizes a thread reads at a time.
_STAT_CHUNK = 1000


class LabeledFiles(Examples):
    """Examples read from files; the paths are stored as one byte string to save memory."""

    def __init__(self, root: Path, paths: Iterable[str], labels: LabelArrays):
        """Stores paths and labels.

        Args:
            root: Absolute folder.
            paths: Path of each image: relative to the root, or absolute.
            labels: Labels of each image.
        """
        self._root = root
        joined, ends = bytearray(), array.array("q")
        for path in paths:
            joined += os.fsencode(path)
            ends.append(len(joined))
        self._paths, self._ends = bytes(joined), np.array(ends, np.int64)
        self.labels = labels
        self._sizes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        path = self._path(index)
        image, labels = read_image(path), self.read_labels(index)
        size = len(image) if self._sizes is None else int(self._sizes[index])
        if size not in (-1, len(image)):
            # Fingerprints contain the sizes: the run could not resume with this file.
            detail = f"{len(image):,} instead of {size:,} bytes"
            raise BadImageError("changed since it was listed", detail, display_path(path))
        return Example(image=image, labels=labels, name=display_path(path))

    def read_labels(self, index: int) -> tuple[int, ...]:
        """Returns the classes of a file, which is not read."""
        return self.labels.read(index)

    def path_name(self, index: int) -> str:
        """Returns the path of a file, for messages."""
        return display_path(self._path(index))

    def fingerprint(self) -> dict[str, str]:
        """Computes digests of names and sizes of the files, for each directory if they are few."""
        directories: set[str] = set()
        for path in self._relative_paths():
            directories.add(unicodedata.normalize("NFC", os.path.dirname(path)))
            if len(directories) > _MAX_DIRECTORIES:
                break
        is_split = len(directories) <= _MAX_DIRECTORIES
        digests: dict[str, list[Any]] = {}
        for path, size in zip(self._relative_paths(), self.file_sizes().tolist(), strict=True):
            normalized = unicodedata.normalize("NFC", path)
            place = f" in {display_path(os.path.dirname(normalized))}" if is_split else ""
            if place not in digests:
                digests[place] = [hashlib.blake2b(digest_size=8) for _ in range(2)]
            names, both = digests[place]
            name = os.fsencode(normalized) + b"\0"
            names.update(name)
            both.update(name + str(size).encode() + b"\0")
        return {
            f"files{place}": f"{DIGEST}{names.hexdigest()}-{both.hexdigest()}"
            for place, (names, both) in sorted(digests.items())
        }

    def record_file_sizes(self) -> None:
        """Reads the sizes of the files, unless they have been read."""
        self.file_sizes()

    def check_files(self) -> None:
        """Checks that the first file exists, also if it is a broken link.

        If the sizes have been read, it is the first one of those that existed then.
        """
        path = self._path(0 if self._sizes is None else int(np.argmax(self._sizes >= 0)))
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            raise MissingFileError(f"{display_path(path)} does not exist.") from None
        except OSError as error:
            raise RunError(f"{display_path(path)} cannot be read: {error.strerror}.") from error

    def file_sizes(self) -> np.ndarray:
        """Returns the size of each file in bytes, int64 (num_files,); -1 if it cannot be read."""
        if self._sizes is None:
            # Threads, because network file systems take a while to answer.
            with ThreadPoolExecutor() as pool:
                chunks = pool.map(self._read_sizes, range(0, len(self), _STAT_CHUNK))
                self._sizes = np.concatenate([np.zeros(0, np.int64), *chunks])
        return self._sizes

    def _read_sizes(self, start: int) -> np.ndarray:
        # Paths are joined as bytes: pathlib takes longer than reading the size from a local disk.
        root = os.path.join(os.fsencode(self._root), b"")
        ends = self._ends[start : start + _STAT_CHUNK].tolist()
        starts = [int(self._ends[start - 1]) if start else 0, *ends[:-1]]
        paths = [self._paths[first:end] for first, end in zip(starts, ends, strict=True)]
        return np.array([_file_size(os.path.join(root, path)) for path in paths], np.int64)

    def find_unreadable_classes(self) -> list[tuple[int, str]]:
        """Returns the labels whose images are all bad, and the error of the first image of each."""
        if not len(self.labels.values):
            return []
        order = np.argsort(self.labels.values, kind="stable")
        labels, starts = np.unique(self.labels.values[order], return_index=True)
        groups = np.split(self.labels.owners[order], starts[1:])

        def find_first_error(indices: np.ndarray) -> str | None:
            """Returns the error of the first image if all are bad."""
            errors = (_find_error(self._path(index)) for index in indices.tolist())
            first = next(errors)
            return first if first is not None and all(errors) else None

        # Threads, because a file of a network file system takes milliseconds to open.
        with ThreadPoolExecutor() as pool:
            errors = list(pool.map(find_first_error, groups))
        return [
            (label, error)
            for label, error in zip(labels.tolist(), errors, strict=True)
            if error is not None
        ]

    def _path(self, index: int) -> Path:
        return self._root / self._relative_path(index)

    def _relative_paths(self) -> Iterator[str]:
        return map(self._relative_path, range(len(self)))

    def _relative_path(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._paths[start : self._ends[index]])


def check_readable(source: Source) -> None:
    """Checks that every class that has image files has one that can be decoded.

    Raises:
        UserError: Every image of some class is bad.
    """
    examples = source.examples
    if not isinstance(examples, LabeledFiles):
        raise TypeError(f"{source.name} has no image files")
    unreadable = [
        f"{source.class_names[label]!r} (for example {error})"
        for label, error in examples.find_unreadable_classes()
    ]
    if unreadable:
        raise UserError(
            f"{source.name} must have a readable image of every class, got none of "
            f"{abbreviate(unreadable)}. Replace the files, or remove the classes."
        )


def _file_size(path: bytes) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _find_error(path: Path) -> str | None:
    """Returns the reason why a file is bad, or None; decodes only the first rows of most JPEGs."""
    try:
        decode(read_image(path), lambda height, width: (0, 0, 1, 1))
    except BadImageError as error:
        return str(error) if error.name else f"{display_path(path)}: {error}"
    return None
