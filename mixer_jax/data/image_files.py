"""Image files: finding them by path, folder or pattern, and reading their bytes."""

import functools
import glob
import hashlib
import itertools
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mixer_jax.data.decode import MAX_PIXELS, BadImageError
from mixer_jax.data.source import DIGEST, Example, Examples, Source
from mixer_jax.errors import UserError, escape_control_characters

STDIN = "-"
# Display name of an image, and a function that reads its bytes.
NamedImage = tuple[str, Callable[[], bytes]]

# Formats that the decoder rejects are included, so that it names them.
_SUFFIXES = re.compile(
    r"\.(apng|avifs?|bmp|dib|exr|gif|hdr|hei[cf]|hif|ico|j2[ck]|jfif|jp[2ex]|jpe?g|jxl|mpo"
    r"|p[bfgnp]m|pcx|png|ras|tga|tiff?|webp)",
    re.IGNORECASE,
)
# Directories that systems and archivers create: resource forks, trash, snapshots and thumbnails.
_SYSTEM_DIRECTORIES = {
    "$recycle.bin",
    "#recycle",
    "#snapshot",
    "@eadir",
    "@recycle",
    "@tmp",
    "__macosx",
    "__pycache__",
    "lost+found",
    "network trash folder",
    "system volume information",
    "temporary items",
}
_SYSTEM_FILES = {"desktop.ini", "ehthumbs.db", "icon\r", "thumbs.db"}
# An uncompressed image of MAX_PIXELS with 16 bits for each of red, green, blue and alpha.
MAX_BYTES = 8 * MAX_PIXELS


def has_image_suffix(name: str) -> bool:
    """Checks whether a file name has the suffix of some image format."""
    return _SUFFIXES.fullmatch(Path(name).suffix) is not None


def is_ignored(name: str) -> bool:
    """Checks whether a file or directory is hidden, or is created by a system or an archiver."""
    return name.startswith(".") or name.casefold() in _SYSTEM_DIRECTORIES | _SYSTEM_FILES


def display_path(path: str | Path) -> str:
    """Formats a path as one line of valid Unicode, with escapes for other bytes."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:  # Text from JSON can be invalid in other ways than names of files.
        encoded = os.fspath(path).encode(errors="backslashreplace")
    return escape_control_characters(encoded.decode("utf-8", "backslashreplace"))


def read_image(path: Path, *, allow_pipe: bool = False) -> bytes:
    """Reads the bytes of one image file.

    Args:
        path: File.
        allow_pipe: Whether the file may be a pipe, which is read to its end.

    Raises:
        BadImageError: The file cannot be read, is a device or a pipe that is not allowed, or is
            larger than any image that may be decoded.
    """
    opener = None if allow_pipe else _open_without_waiting
    try:
        with open(path, "rb", opener=opener) as file:
            status = os.fstat(file.fileno())
            if allow_pipe and stat.S_ISFIFO(status.st_mode):
                return _read_stream(file, display_path(path))
            # Pipes may never end, nor do devices such as /dev/zero.
            if not stat.S_ISREG(status.st_mode):
                raise BadImageError("not a regular file", name=display_path(path))
            if status.st_size > MAX_BYTES:
                size = f"{status.st_size:,} bytes"
                raise BadImageError("file too large", size, display_path(path))
            return file.read()
    except OSError as error:
        raise BadImageError("cannot be read", error.strerror or "", display_path(path)) from None


def _open_without_waiting(path: str, flags: int) -> int:
    """Opens a file; if it is a pipe, does not wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def walk_images(
    folder: Path,
    on_error: Callable[[OSError], object],
    on_skip: Callable[[str], object] = lambda name: None,
) -> Iterator[Path]:
    """Yields the image files in a folder and its subfolders, selected by suffix.

    Hidden files and folders, and those of the system, are skipped. Symbolic links are followed, but
    each folder is visited only once. Broken links are yielded, so that reading them reports the
    reason.

    Args:
        folder: Root of the walk.
        on_error: Called for every folder that cannot be read; the error's `filename` names it.
        on_skip: Called with the name of every other file, which lacks the suffix of an image.
    """
    visited = set()
    pending = [folder]
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(folder)
            # Sorted, so that a folder with several paths is always visited by the same one.
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            on_error(error)
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        for entry in entries:
            if is_ignored(entry.name):
                continue
            try:
                mode = entry.stat().st_mode
            except OSError:
                mode = stat.S_IFREG
            if stat.S_ISDIR(mode):
                pending.append(Path(entry.path))
            elif stat.S_ISREG(mode):
                if has_image_suffix(entry.name):
                    yield Path(entry.path)
                else:
                    on_skip(entry.name)


def expand_image_paths(patterns: Iterable[str]) -> list[NamedImage]:
    """Expands files, folders and glob patterns to images, in the order of the patterns.

    A pattern without a match becomes one image whose reader raises, so that the others can still
    be processed.

    Args:
        patterns: Files, or pipes such as those of a shell's <(command); folders, searched
            recursively and sorted by path; glob patterns such as "holiday/*.jpg"; or "-" for one
            image on standard input.

    Raises:
        UserError: A pattern is empty, or no pattern matches an image.
    """
    images: list[NamedImage] = []
    failures: list[str] = []
    for pattern in patterns:
        if not pattern:
            raise UserError("image paths must not be empty. Name a file, a folder or a pattern.")
        if pattern == STDIN:
            images.append(("standard input", _read_stdin))
            continue
        try:
            named = Path(os.path.expanduser(pattern))
            images += [
                (display_path(path), functools.partial(read_image, path, allow_pipe=path == named))
                for path in _expand(pattern)
            ]
        except BadImageError as error:
            images.append((display_path(pattern), functools.partial(_raise, error)))
            failures.append(f"{pattern!r} {error.reason}")
    if failures and len(failures) == len(images):
        others = f", nor does any of the other {len(failures) - 1:,} paths match an image"
        raise UserError(
            f"{failures[0]}{others if failures[1:] else ''}. Name images, folders or patterns."
        )
    return images


class _ImageFiles(Examples):
    """Images without labels."""

    def __init__(self, images: Sequence[NamedImage]):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> Any:
        name, read = self._images[index]
        return Example(image=read(), labels=(), name=name)

    def fingerprint(self) -> dict[str, str]:
        """Computes a digest of the names and sizes of the files."""
        names, both = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
        for name, _ in self._images:
            names.update(f"{name}\0".encode())
            size = os.stat(name).st_size if os.path.exists(name) else -1
            both.update(f"{name}\0{size}\0".encode())
        return {"files": f"{DIGEST}{names.hexdigest()}-{both.hexdigest()}"}


def image_source(images: Sequence[NamedImage]) -> Source:
    """Makes a source of images without labels, such as those of `expand_image_paths`."""
    return Source("images", _ImageFiles(images), class_names=())


def _expand(pattern: str) -> list[Path]:
    """Expands one path or pattern.

    Raises:
        BadImageError: Nothing matches.
    """
    # Functions of os.path rather than pathlib: expanduser leaves unknown users unexpanded, and
    # isdir and lexists return False for paths that cannot be looked up.
    path = Path(os.path.expanduser(pattern))
    if os.path.isdir(path):
        paths = _list_images(path)
    elif os.path.lexists(path):
        paths = [path]
    else:
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            reason = "does not exist"
        except OSError as error:
            reason = f"cannot be looked up ({error.strerror})"
        except ValueError:
            raise BadImageError("cannot be looked up (null character)") from None
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not matches:
            raise BadImageError(reason)
        # A pattern may match both a folder and files inside it.
        found = (_list_images(match) if os.path.isdir(match) else [match] for match in matches)
        paths = list(dict.fromkeys(itertools.chain.from_iterable(found)))
    if not paths:
        raise BadImageError("contains no images")
    return paths


def _list_images(folder: Path) -> list[Path]:
    """Lists the images in a folder and its subfolders, and the folders that cannot be read."""
    unreadable: list[OSError] = []
    images = list(walk_images(folder, unreadable.append))
    return sorted([*images, *(Path(error.filename) for error in unreadable)])


def _raise(error: BadImageError) -> bytes:
    raise error


def _read_stdin() -> bytes:
    try:
        return _read_stream(sys.stdin.buffer)
    except OSError as error:
        raise BadImageError("cannot be read", error.strerror or "") from None


def _read_stream(stream: BinaryIO, name: str = "") -> bytes:
    encoded = stream.read(MAX_BYTES + 1)
    if len(encoded) > MAX_BYTES:
        raise BadImageError("file too large", f"over {MAX_BYTES:,} bytes", name)
    return encoded
