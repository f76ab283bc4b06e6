"""Small image files of every format that the decoder reads, made by code."""

import functools
import importlib.util
import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
from PIL import Image

from tests.helpers.images import encode, png_chunk, smooth

_HEIGHT, _WIDTH = 18, 22
# Adam7 interlacing: first row, row step, first column and column step of the seven passes. Repeated
# from the PNG specification on purpose: the decoder's own table would hide a mistake in it.
_ADAM7 = [
    (0, 8, 0, 8),
    (0, 8, 4, 8),
    (4, 8, 0, 4),
    (0, 4, 2, 4),
    (2, 4, 0, 2),
    (0, 2, 1, 2),
    (1, 2, 0, 1),
]


def encode_png(
    samples: np.ndarray, bits: int, color_type: int, *chunks: bytes, interlaced: bool = False
) -> bytes:
    """Encodes a PNG from samples (height, width, channels), with extra chunks before the data."""
    height, width = samples.shape[:2]
    passes = _ADAM7 if interlaced else [(0, 1, 0, 1)]
    rows = b""
    for first_row, row_step, first_column, column_step in passes:
        part = samples[first_row::row_step, first_column::column_step]
        if not part.shape[1]:
            continue
        for row in part:
            if bits == 16:
                packed = row.astype(">u2").tobytes()
            else:
                # The `bits` lowest bits of each sample, most significant first.
                bit_array = np.unpackbits(row.reshape(-1, 1).astype(np.uint8), axis=1)
                packed = np.packbits(bit_array[:, 8 - bits :].ravel()).tobytes()
            rows += b"\0" + packed
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, int(interlaced))
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            *chunks,
            png_chunk(b"IDAT", zlib.compress(rows)),
            png_chunk(b"IEND", b""),
        ]
    )


def png_chunks(encoded: bytes) -> list[tuple[bytes, bytes]]:
    """Splits a well-formed PNG into (type, data)."""
    chunks, offset = [], 8
    while offset < len(encoded):
        length = int.from_bytes(encoded[offset : offset + 4])
        chunks.append((encoded[offset + 4 : offset + 8], encoded[offset + 8 : offset + 8 + length]))
        offset += 12 + length
    return chunks


def join_png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Joins chunks to a PNG, with correct checksums."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, data) for kind, data in chunks)


def encode_heic(image: np.ndarray, **options: Any) -> bytes:
    """Encodes a HEIC image; requires pillow-heif."""
    import pillow_heif

    file = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(image)).save(file, **options)
    return file.getvalue()


@functools.cache
def files_of_all_formats() -> dict[str, bytes]:
    """Encodes one image in about 100 ways; names begin with the format.

    HEIC is included where pillow-heif is installed.
    """
    image = smooth(_HEIGHT, _WIDTH)
    gray = image[..., :1]
    alpha = np.dstack([image, gray[..., 0] | 1])
    wide = image.astype(np.uint16) * 257 - np.arange(_WIDTH, dtype=np.uint16)[:, None]
    frames = [Image.fromarray(np.roll(image, shift, axis=1)) for shift in (0, 3, 6)]
    animated: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 50}
    # One digit at the end: whether a number in text lost its last digits cannot be seen.
    text = b" ".join(b"%d" % value for value in [*image.ravel()[:-1], 7])
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = np.random.default_rng(1).integers(0, 256, 48, np.uint8).tobytes()

    def opencv(suffix: str, pixels: np.ndarray) -> bytes:
        encoded: np.ndarray = cv2.imencode(suffix, pixels)[1]
        return encoded.tobytes()

    def bmp_rle() -> bytes:
        # Runs of 20 and 2 pixels and the end of each row, and the end of the image.
        pixels = b"\x14\x03\x02\x05\x00\x00" * _HEIGHT + b"\x00\x01"
        start = 14 + 40 + 1024
        head = struct.pack("<2sIHHI", b"BM", start + len(pixels), 0, 0, start)
        info = struct.pack("<IiiHHIIiiII", 40, _WIDTH, _HEIGHT, 1, 8, 1, len(pixels), 0, 0, 256, 0)
        return head + info + bytes(range(256)) * 4 + pixels

    heic = {}
    if importlib.util.find_spec("pillow_heif"):
        heic = {
            "HEIC": encode_heic(image),
            "HEIC gray": encode_heic(gray[..., 0]),
            "HEIC alpha": encode_heic(alpha),
            "HEIC orientation": encode_heic(image, exif=exif.tobytes()),
        }
    return {
        "JPEG 4:4:4": encode(image, "JPEG", subsampling="4:4:4"),
        "JPEG 4:2:2": encode(image, "JPEG", subsampling="4:2:2"),
        "JPEG 4:2:0": encode(image, "JPEG", subsampling="4:2:0"),
        "JPEG 4:1:1": encode(image, "JPEG", subsampling="4:1:1"),
        "JPEG gray": encode(image, "JPEG", "L"),
        "JPEG progressive": encode(image, "JPEG", progressive=True),
        "JPEG gray progressive": encode(image, "JPEG", "L", progressive=True),
        "JPEG restart intervals": encode(image, "JPEG", restart_marker_blocks=1),
        "JPEG optimized": encode(image, "JPEG", optimize=True, quality=30),
        "JPEG RGB": encode(image, "JPEG", keep_rgb=True),
        "JPEG orientation": encode(image, "JPEG", exif=exif),
        "JPEG CMYK": encode(image, "JPEG", "CMYK"),
        "JPEG CMYK progressive": encode(image, "JPEG", "CMYK", progressive=True),
        "JPEG MPO": encode(image, "MPO", save_all=True, append_images=frames[1:]),
        "PNG 1 bit": encode_png(gray >> 7, 1, 0),
        "PNG 2 bits": encode_png(gray >> 6, 2, 0),
        "PNG 4 bits": encode_png(gray >> 4, 4, 0),
        "PNG gray": encode_png(gray, 8, 0),
        "PNG gray, 16 bits": encode_png(wide[..., :1], 16, 0),
        "PNG palette of 1 bit": encode_png(gray >> 7, 1, 3, png_chunk(b"PLTE", palette[:6])),
        "PNG palette of 2 bits": encode_png(gray >> 6, 2, 3, png_chunk(b"PLTE", palette[:12])),
        "PNG palette of 4 bits": encode_png(gray >> 4, 4, 3, png_chunk(b"PLTE", palette)),
        "PNG palette with transparency": encode(image, "PNG", "P", transparency=b"\x00\x80\xff"),
        "PNG gray with alpha": encode(image, "PNG", "LA"),
        "PNG gray with alpha, 16 bits": encode_png(wide[..., :2], 16, 4),
        "PNG RGB": encode(image, "PNG"),
        "PNG RGB, filtered": encode(np.cumsum(image, axis=0, dtype=np.uint8), "PNG"),
        "PNG RGB, 16 bits": encode_png(wide, 16, 2),
        "PNG RGBA": encode(alpha, "PNG", "RGBA"),
        "PNG RGBA, 16 bits": encode_png(np.dstack([wide, wide[..., :1]]), 16, 6),
        "PNG RGB, interlaced": encode_png(image, 8, 2, interlaced=True),
        "PNG 1 bit, interlaced": encode_png(gray >> 7, 1, 0, interlaced=True),
        "PNG orientation": encode(image, "PNG", exif=exif),
        "PNG animated": encode(image, "PNG", **animated),
        "PNG animated, RGBA": encode(alpha, "PNG", "RGBA", **animated),
        "PNG animated, default image": encode(image, "PNG", default_image=True, **animated),
        "GIF": encode(image, "GIF"),
        "GIF gray, not interlaced": encode(image, "GIF", "L", interlace=False),
        "GIF transparent": encode(image, "GIF", "P", transparency=3),
        "GIF animated": encode(image, "GIF", **animated),
        "WebP": encode(image, "WEBP"),
        "WebP lossless": encode(image, "WEBP", lossless=True),
        "WebP alpha": encode(alpha, "WEBP", "RGBA"),
        "WebP lossless with alpha": encode(alpha, "WEBP", "RGBA", lossless=True),
        "WebP orientation": encode(image, "WEBP", exif=exif),
        "WebP animated": encode(image, "WEBP", **animated),
        "WebP animated, orientation": encode(image, "WEBP", exif=exif, **animated),
        "AVIF": encode(image, "AVIF", speed=10),
        "AVIF 4:4:4": encode(image, "AVIF", subsampling="4:4:4", speed=10),
        "AVIF gray": encode(image, "AVIF", subsampling="4:0:0", speed=10),
        "AVIF alpha": encode(alpha, "AVIF", "RGBA", speed=10),
        "AVIF orientation": encode(image, "AVIF", exif=exif, speed=10),
        "AVIF animated": encode(image, "AVIF", speed=10, **animated),
        "JPEG 2000": encode(image, "JPEG2000"),
        "JPEG 2000 lossy": encode(image, "JPEG2000", irreversible=True, quality_layers=[20]),
        "JPEG 2000 codestream": encode(image, "JPEG2000", no_jp2=True),
        "JPEG 2000 gray": encode(image, "JPEG2000", "L"),
        "JPEG 2000 RGBA": encode(alpha, "JPEG2000", "RGBA"),
        "JPEG 2000 tiles": encode(image, "JPEG2000", tile_size=(8, 8), num_resolutions=2),
        "JPEG 2000 gray, 16 bits": encode(wide[..., 0], "JPEG2000", "I;16"),
        "TIFF": encode(image, "TIFF"),
        "TIFF 1 bit": encode(image, "TIFF", "1"),
        "TIFF gray": encode(image, "TIFF", "L"),
        "TIFF palette": encode(image, "TIFF", "P"),
        "TIFF RGBA": encode(alpha, "TIFF", "RGBA"),
        "TIFF CMYK": encode(image, "TIFF", "CMYK"),
        "TIFF LZW": encode(image, "TIFF", compression="tiff_lzw"),
        "TIFF LZW with predictor": opencv(".tiff", image),
        "TIFF deflate": encode(image, "TIFF", compression="tiff_adobe_deflate"),
        "TIFF PackBits": encode(image, "TIFF", compression="packbits"),
        "TIFF JPEG": encode(image, "TIFF", compression="jpeg"),
        "TIFF JPEG gray": encode(image, "TIFF", "L", compression="jpeg"),
        "TIFF group 3": encode(image, "TIFF", "1", compression="group3"),
        "TIFF group 4": encode(image, "TIFF", "1", compression="group4"),
        "TIFF gray, 16 bits": opencv(".tiff", wide[..., 0]),
        "TIFF RGB, 16 bits": opencv(".tiff", wide),
        "TIFF orientation": encode(image, "TIFF", tiffinfo={274: 6}),
        "BMP": encode(image, "BMP"),
        "BMP 1 bit": encode(image, "BMP", "1"),
        "BMP gray": encode(image, "BMP", "L"),
        "BMP palette": encode(image, "BMP", "P"),
        "BMP RGBA": encode(alpha, "BMP", "RGBA"),
        "BMP run lengths": bmp_rle(),
        "TGA": encode(image, "TGA"),
        "TGA run lengths": encode(image, "TGA", compression="tga_rle"),
        "TGA gray": encode(image, "TGA", "L"),
        "TGA palette": encode(image, "TGA", "P"),
        "TGA RGBA": encode(alpha, "TGA", "RGBA", compression="tga_rle"),
        "PPM": encode(image, "PPM"),
        "PPM bits": encode(image, "PPM", "1"),
        "PPM gray": encode(image, "PPM", "L"),
        "PPM gray, 16 bits": opencv(".pgm", wide[..., 0]),
        "PPM text": b"P3\n# comment\n22 18\n255\n" + text,
        "ICO": encode(image, "ICO", sizes=[(16, 16)]),
        "ICO of BMP": encode(image, "ICO", sizes=[(16, 16)], bitmap_format="bmp"),
        "PCX": encode(image, "PCX"),
        "PCX palette": encode(image, "PCX", "P"),
        "Sun raster": opencv(".ras", image),
        **heic,
    }
