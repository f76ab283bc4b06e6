"""Files of images: which they are, and their bytes."""

import functools
import glob
import itertools
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mixer_jax.data.decode import MAX_PIXELS, BadImageError
from mixer_jax.errors import UserError

STANDARD_INPUT = "-"
# The name of an image, and how to read its bytes.
NamedImage = tuple[str, Callable[[], bytes]]

_SUFFIXES = re.compile(
    r"\.(apng|avif|bmp|dib|exr|gif|hdr|ico|j2[ck]|jfif|jp[2ex]|jpe?g|p[bgnp]m|pcx|png|ras|tga"
    r"|tiff?|webp)",
    re.IGNORECASE,
)
# No image that may be decoded needs more: 16 bits of red, green, blue and transparency.
_MAX_BYTES = 8 * MAX_PIXELS


def is_image_name(name: str) -> bool:
    """Says whether a file's name ends like an image's."""
    return _SUFFIXES.fullmatch(Path(name).suffix) is not None


def display_path(path: str | Path) -> str:
    """Returns a path that can be shown and saved whatever its bytes are."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_image(path: Path) -> bytes:
    """Returns the bytes of a file.

    Raises:
        BadImageError: it cannot be read, or is too large to be an image that can be used.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_BYTES:
                raise BadImageError("too large a file", f"{size:,} bytes", display_path(path))
            return file.readall()
    except OSError as error:
        raise BadImageError("cannot be read", error.strerror or "", display_path(path)) from None


def walk_images(folder: Path, on_error: Callable[[OSError], object]) -> Iterator[Path]:
    """Yields the images in and below a folder: files whose names end like an image's.

    What begins with a dot is passed over. Links are followed, but no folder is entered twice. A
    link to nowhere is yielded, so that reading it tells what is wrong with it.

    Args:
        folder: where to begin.
        on_error: called for every folder that cannot be read; the error's `filename` names it.
    """
    seen = set()
    waiting = [folder]
    while waiting:
        folder = waiting.pop()
        try:
            at = os.stat(folder)
            # In order, so that of two ways to a folder it is always the same one that is taken.
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            on_error(error)
            continue
        if (at.st_dev, at.st_ino) in seen:
            continue
        seen.add((at.st_dev, at.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                mode = entry.stat().st_mode
            except OSError:
                mode = stat.S_IFREG
            if stat.S_ISDIR(mode):
                waiting.append(Path(entry.path))
            elif stat.S_ISREG(mode) and is_image_name(entry.name):
                yield Path(entry.path)


def expand_image_paths(names: Iterable[str]) -> list[NamedImage]:
    """Returns the images that names mean, in the order of the names.

    A name that means no image is returned as one that cannot be used, so that the rest is done.

    Args:
        names: files; folders, whose images and those of the folders in them are meant, in the order
            of their paths; patterns such as "holiday/*.jpg"; or "-", one image on standard input.

    Raises:
        UserError: a name is empty, or none of them means an image.
    """
    found: list[NamedImage] = []
    wrong: list[str] = []
    for name in names:
        if not name:
            raise UserError("a name of an image is empty; name a file, a folder or a pattern")
        if name == STANDARD_INPUT:
            found.append(("standard input", _read_standard_input))
            continue
        try:
            found += [
                (display_path(path), functools.partial(read_image, path)) for path in _find(name)
            ]
        except BadImageError as error:
            found.append((display_path(name), functools.partial(_refuse, error)))
            wrong.append(f"{name!r} {error.reason}")
    if wrong and len(wrong) == len(found):
        others = f", nor is any of the other {len(wrong) - 1:,} an image" if wrong[1:] else ""
        raise UserError(f"{wrong[0]}{others}; name images, folders, or patterns")
    return found


def _find(name: str) -> list[Path]:
    """Returns the paths of the images that a name means.

    Raises:
        BadImageError: it means none.
    """
    # Unlike pathlib's, it leaves the home of an unknown user as it is.
    path = Path(os.path.expanduser(name))
    # Unlike pathlib's, these two say no of what cannot be looked up.
    if os.path.isdir(path):
        found = _list_images(path)
    elif os.path.lexists(path):
        found = [path]
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
        # A folder and what is in it may both match.
        images = (_list_images(match) if os.path.isdir(match) else [match] for match in matches)
        found = list(dict.fromkeys(itertools.chain.from_iterable(images)))
    if not found:
        raise BadImageError("has no image in it")
    return found


def _list_images(folder: Path) -> list[Path]:
    """Returns the images in and below a folder, and the folders that cannot be read, in order."""
    unread: list[OSError] = []
    images = list(walk_images(folder, unread.append))
    return sorted([*images, *(Path(error.filename) for error in unread)])


def _refuse(error: BadImageError) -> bytes:
    raise error


def _read_standard_input() -> bytes:
    try:
        encoded = sys.stdin.buffer.read(_MAX_BYTES + 1)
    except OSError as error:
        raise BadImageError("cannot be read", error.strerror or "") from None
    if len(encoded) > _MAX_BYTES:
        raise BadImageError("too large a file", f"over {_MAX_BYTES:,} bytes")
    return encoded
