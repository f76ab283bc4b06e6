"""Image files for tests."""

import functools
import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
from PIL import Image


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (height, width, 3), np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    return cv2.resize(noise(5, 6), (width, height), interpolation=cv2.INTER_LINEAR)


@functools.cache
def photograph() -> np.ndarray:
    """Loads a real photograph, uint8 (427, 640, 3)."""
    from sklearn.datasets import load_sample_image

    return load_sample_image("china.jpg")


def encode(image: np.ndarray, file_format: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, file_format, **options)
    return file.getvalue()


def encode_with_orientation(image: np.ndarray, orientation: int) -> bytes:
    """Encodes a JPEG with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, "JPEG", exif=exif, quality=95)


def png_chunk(chunk_type: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(chunk_type + data)
    return struct.pack(">I", len(data)) + chunk_type + data + struct.pack(">I", checksum)


def png_with_header_size(width: int, height: int) -> bytes:
    """Makes a small file whose header declares an image of this size."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + header + data + png_chunk(b"IEND", b"")
