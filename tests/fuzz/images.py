"""Targets that decode images: every format, PNG chunks with correct checksums, and EXIF."""

import functools
import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mixer_jax.data.decode import MAX_PIXELS, convert_image, decode
from tests.data import fuzz_decode
from tests.fuzz.mutation import mutate, pick
from tests.fuzz.target import Target
from tests.helpers.image_formats import files_of_all_formats, join_png
from tests.helpers.images import encode, png_with_header_size, smooth

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "TGA", "PCX", "ICO")


@functools.cache
def _seeds() -> Sequence[bytes]:
    # The large one is within the limits: it needs memory in proportion.
    return [*files_of_all_formats().values(), png_with_header_size(9_000, 9_000)]


def _mutate(data: bytes, rng: np.random.Generator) -> bytes:
    if rng.random() < 0.5:
        return mutate(data, rng)
    files = files_of_all_formats()
    return fuzz_decode.mutate(files, int(rng.integers(2**31)), int(rng.integers(2**31)))[1]


def _decode(data: bytes, folder: Path) -> None:
    options = zlib.crc32(data)
    pixels = decode(
        data,
        _center if options & 1 else None,
        exif_orientation=bool(options & 2),
        accurate_dct=True,
    )
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS


def _center(height: int, width: int) -> tuple[int, int, int, int]:
    return height // 3, width // 3, max(1, height // 3), max(1, width // 3)


def _convert(data: bytes, folder: Path) -> None:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Exception:  # Callers open files themselves.
        return
    with image:
        convert_image(image, exif_orientation=True)


@functools.cache
def _exif_seeds() -> Sequence[bytes]:
    """Makes EXIF data in both byte orders."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    little = exif.tobytes().removeprefix(b"Exif\0\0")
    big = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    return [little, big]


def _decode_exif(data: bytes, folder: Path) -> None:
    image = smooth(6, 8)
    data = data[:60_000]
    jpeg = encode(image, "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(data) + 8) + b"Exif\0\0" + data
    xmp = b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data
    for file in (jpeg[:2] + segment + jpeg[2:], jpeg[:2] + xmp + jpeg[2:]):
        assert decode(file, exif_orientation=True).shape in ((6, 8, 3), (8, 6, 3))
    png = encode(image, "PNG")
    chunks = [(b"IHDR", png[16:29]), (b"eXIf", data), (b"IDAT", png[41:-16]), (b"IEND", b"")]
    assert decode(join_png(chunks), exif_orientation=True).shape in ((6, 8, 3), (8, 6, 3))


def _mutate_size(data: bytes, rng: np.random.Generator) -> bytes:
    sides = (0, 1, 2, 255, 256, 8_999, 9_459, 9_460, 32_767, 65_535, 2**31 - 1, 2**31, 2**32 - 1)
    return (
        png_with_header_size(pick(rng, sides), pick(rng, sides))
        if rng.random() < 0.5
        else (mutate(data, rng))
    )


TARGETS = [
    Target("images", _seeds, _decode, _mutate),
    Target("images: Pillow", _seeds, _convert, _mutate),
    Target("images: EXIF", _exif_seeds, _decode_exif),
    Target(
        "images: claimed sizes", lambda: [encode(smooth(6, 8), "PNG")], _decode, _mutate_size, 40
    ),
]
