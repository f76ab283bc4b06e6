"""Files of images: which they are, and their bytes."""

import glob
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mixer_jax.data.decoding import MAX_PIXELS, BadImageError
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


def printable(path: str | Path) -> str:
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
                raise BadImageError("too large a file", f"{size:,} bytes", printable(path))
            return file.readall()
    except OSError as error:
        raise BadImageError("cannot be read", error.strerror or "", printable(path)) from None


def find_images(names: Iterable[str]) -> Iterator[NamedImage]:
    """Yields the images that names mean, in the order of the names.

    Args:
        names: files; folders, whose images and those of the folders in them are meant, in the order
            of their paths; patterns such as "holiday/*.jpg"; or "-", one image on standard input.

    Raises:
        UserError: nothing has such a name, or a folder has no image.
    """
    for name in names:
        path = Path(name).expanduser()
        if name == STANDARD_INPUT:
            yield "standard input", _read_standard_input
        elif path.is_dir():
            found = [str(inner) for inner in sorted(path.rglob("*")) if is_image_name(inner.name)]
            if not found:
                raise UserError(f"folder {name!r} has no image in it; name another")
            yield from map(_named, found)
        elif path.exists() or path.is_symlink():
            yield _named(str(path))
        else:
            found = sorted(glob.glob(str(path), recursive=True))
            if not found:
                raise UserError(f"{name!r} does not exist; name images, folders, or patterns")
            yield from find_images(found)


def _named(path: str) -> NamedImage:
    return printable(path), lambda: read_image(Path(path))


def _read_standard_input() -> bytes:
    encoded = sys.stdin.buffer.read(_MAX_BYTES + 1)
    if len(encoded) > _MAX_BYTES:
        raise BadImageError("too large a file", f"over {_MAX_BYTES:,} bytes")
    return encoded
