"""Image decoding: any common format to uint8 RGB; damaged and oversized files are rejected."""

import contextlib
import ctypes
import dataclasses
import functools
import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageFile

# (top, left, height, width), in pixels.
Box = tuple[int, int, int, int]

# The size from which Pillow warns of decompression bombs: 256 MiB of RGB.
MAX_PIXELS = 89_478_485

_UPRIGHT = 1
_ORIENTATION_TAG, _BITS_TAG, _SAMPLE_FORMAT_TAG = 274, 258, 339
_EXIF = b"Exif\0\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')

_JPEG_SIGNATURE = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_START_OF_SCAN = 0xDA
_APP1 = 0xE1
# Start-of-frame markers: C0 to CF except DHT, JPG and DAC (C4, C8, CC).
_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = {0xC0, 0xC1}
# Markers without a length: TEM, restart markers, start of image.
_STANDALONE = {0x01, *range(0xD0, 0xD9)}
# Marker and length of a segment; bits, height, width and channels of a frame.
_JPEG_SEGMENT, _JPEG_FRAME = struct.Struct(">BBH"), struct.Struct(">BHHB")
# Horizontal and vertical sampling factors of 1 to 4, four bits each.
_SAMPLINGS = {16 * horizontal + vertical for horizontal in range(1, 5) for vertical in range(1, 5)}

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_ROWS = "PNG with missing or damaged rows"
_PALETTE = 3
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Pillow's modes of an image and of its samples by color type and bits; 16 bits are reduced to 8.
_PNG_MODES = {
    (0, 1): ("1", "1"),
    (0, 2): ("L", "L;2"),
    (0, 4): ("L", "L;4"),
    (0, 8): ("L", "L"),
    (0, 16): ("L", "L;16B"),
    (2, 8): ("RGB", "RGB"),
    (2, 16): ("RGB", "RGB;16B"),
    (3, 1): ("P", "P;1"),
    (3, 2): ("P", "P;2"),
    (3, 4): ("P", "P;4"),
    (3, 8): ("P", "P"),
    (4, 8): ("LA", "LA"),
    (4, 16): ("RGBA", "LA;16B"),
    (6, 8): ("RGBA", "RGBA"),
    (6, 16): ("RGBA", "RGBA;16B"),
}
# Adam7 interlacing: first row, row step, first column and column step of the seven passes.
_ADAM7 = (
    (0, 8, 0, 8),
    (0, 8, 4, 8),
    (4, 8, 0, 4),
    (0, 4, 2, 4),
    (2, 4, 0, 2),
    (0, 2, 1, 2),
    (1, 2, 0, 1),
)

# What Pillow decodes. Its other formats are rarely used and rarely tested, or call other programs.
_PILLOW_FORMATS = (
    "AVIF",
    "BMP",
    "GIF",
    "ICO",
    "JPEG",
    "JPEG2000",
    "PCX",
    "PPM",
    "SUN",
    "TGA",
    "TIFF",
    "WEBP",
)
# Pillow warns of malformed metadata without naming the file.
_PILLOW = "PIL"
_WARNING_FILTER = ("ignore", None, Warning, re.compile(_PILLOW), 0)
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
# Files that are often found under an image's name, and what to do about them.
_FOREIGN_FILES = (
    (rb"version https://git-lfs", "Git LFS pointer", "run `git lfs pull`"),
    (rb"(?i)\s*<(!doctype html|html|head|body)", "web page", "download the image again"),
    (rb"(?i)\s*<(\?xml|svg)", "SVG or XML", "render it as PNG"),
    (rb"%PDF", "PDF", "render it as PNG"),
    (rb"PK\x03\x04", "ZIP archive", "unpack it"),
    (rb"8BPS", "Photoshop document", "export it as PNG"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "JPEG XL image", "convert it to JPEG or PNG"),
    (rb"#\?RADIANCE|#\?RGBE|v/1\x01|P[Ff]\s", "floating-point image", "convert it to PNG"),
    (rb"(?s)....ftyp|RIFF....AVI ", "video", "extract its frames"),
)


class BadImageError(ValueError):
    """Bytes that cannot be used as an image.

    Attributes:
        reason: The problem, worded identically for all images that have it.
        description: The reason with the detail of this image.
        name: Path or name of the image, or "" if unknown.
    """

    def __init__(self, reason: str, detail: str = "", name: str = ""):
        self.reason, self.name = reason, name
        self.description = f"{reason} ({detail})" if detail else reason
        super().__init__(f"{name}: {self.description}" if name else self.description)


def disable_opencv_threads() -> None:
    """Limits OpenCV to one thread per image, for the whole process.

    Threads that each process their own image are faster than several threads per image.
    """
    cv2.setNumThreads(0)


def decode(
    encoded: bytes,
    crop_fn: Callable[[int, int], Box] | None = None,
    *,
    exif_orientation: bool = False,
    accurate_dct: bool = False,
) -> np.ndarray:
    """Decodes the whole image, or a crop, to uint8 RGB (height, width, 3).

    The result depends on nothing but the arguments. Gray, palette and CMYK images are converted to
    RGB, 16-bit values are reduced to their upper 8 bits, and transparency is dropped, as in Pillow
    and TensorFlow. The first frame of an animation is decoded.

    Args:
        encoded: Bytes of an image file.
        crop_fn: Function from height and width of the image to the box to return; None: all of it.
        exif_orientation: Whether to rotate the image according to its EXIF orientation, which TFDS
            and TensorFlow ignore. TIFF and HEIC are always rotated by their own orientation.
        accurate_dct: Whether JPEGs are decoded by the accurate inverse DCT, as in Pillow, or by
            the fast one, as in TensorFlow, whose pixels are one level darker on average.

    Raises:
        BadImageError: The bytes are not an image, are incomplete, or encode more than `MAX_PIXELS`.
    """
    header = _read_jpeg_header(encoded)
    if header:
        check_image_area(header.height, header.width)
        orientation = header.read_orientation(encoded) if exif_orientation else _UPRIGHT
        if orientation == _UPRIGHT:
            top, left, height, width = _crop_box(crop_fn, header.height, header.width)
            image = _decode_jpeg(encoded, header, top + height, accurate_dct)
        else:
            image = _decode_jpeg(encoded, header, header.height, accurate_dct)
            if image is not None:
                image = _apply_orientation(image, orientation)
                top, left, height, width = _crop_box(crop_fn, *image.shape[:2])
        if image is not None:
            return image[top : top + height, left : left + width]
    image, orientation = _decode_any(encoded)
    if exif_orientation and orientation != _UPRIGHT:
        image = _apply_orientation(image, orientation)
    top, left, height, width = _crop_box(crop_fn, *image.shape[:2])
    return image[top : top + height, left : left + width]


def convert_image(image: Image.Image, *, exif_orientation: bool = False) -> np.ndarray:
    """Converts a Pillow image to uint8 RGB (height, width, 3), as `decode` does.

    Args:
        image: Image in memory, or a file that Pillow has opened and reads now.
        exif_orientation: Whether to rotate the image according to its EXIF orientation.

    Raises:
        BadImageError: The file is damaged, or the image is empty, has more than `MAX_PIXELS` or
            samples of more than 16 bits.
    """
    check_image_area(image.height, image.width)
    if not image.width * image.height:
        raise BadImageError("empty image", f"{image.width} × {image.height}")
    with _reject_failures():
        image.load()
        orientation = image.getexif().get(_ORIENTATION_TAG, _UPRIGHT) if exif_orientation else 0
        # A copy, as the conversion drops the transparent color.
        pixels = _to_rgb(image.copy())
    return _apply_orientation(pixels, orientation) if orientation in range(2, 9) else pixels


def check_image_area(height: int, width: int) -> None:
    """Raises BadImageError for more than `MAX_PIXELS`."""
    if height * width > MAX_PIXELS:
        raise BadImageError("too many pixels", f"{width} × {height}")


@contextlib.contextmanager
def _reject_failures(reason: str = "incomplete or damaged") -> Iterator[None]:
    """Converts exceptions of a decoder, which differ by format, to BadImageError.

    A lack of memory is not the image's fault.
    """
    try:
        yield
    except (BadImageError, MemoryError):
        raise
    except Exception:
        raise BadImageError(reason) from None


def _crop_box(crop_fn: Callable[[int, int], Box] | None, height: int, width: int) -> Box:
    return crop_fn(height, width) if crop_fn else (0, 0, height, width)


def _read_tags(tiff: bytes) -> dict[int, int]:
    """Reads the first value of each integer tag of a TIFF's first image, or of EXIF data."""
    orders: dict[bytes, Literal["little", "big"]] = {b"II": "little", b"MM": "big"}
    order = orders.get(tiff[:2])
    tags: dict[int, int] = {}
    if order is None:
        return tags

    def read(offset: int, size: int) -> int:
        return int.from_bytes(tiff[offset : offset + size], order)

    entries = read(4, 4) + 2
    for offset in range(entries, min(entries + 12 * read(entries - 2, 2), len(tiff)), 12):
        size = {1: 1, 3: 2, 4: 4}.get(read(offset + 2, 2))
        if size:
            in_place = size * read(offset + 4, 4) <= 4
            tags[read(offset, 2)] = read(offset + 8 if in_place else read(offset + 8, 4), size)
    return tags


def _read_orientation(exif: bytes, xmp: bytes = b"") -> int:
    """Reads the orientation (EXIF 2.3, tag 274), 1 (upright) to 8."""
    orientation = _read_tags(exif.removeprefix(_EXIF)).get(_ORIENTATION_TAG, 0)
    if not orientation and (match := _XMP_ORIENTATION.search(xmp)):
        orientation = int(match[1])
    return orientation if orientation in range(1, 9) else _UPRIGHT


def _apply_orientation(image: np.ndarray, orientation: int) -> np.ndarray:
    """Transposes and flips pixels so that they are upright."""
    if orientation > 4:
        image = image.swapaxes(0, 1)
    row_step, column_step = {
        1: (1, 1),
        2: (1, -1),
        3: (-1, -1),
        4: (-1, 1),
        5: (1, 1),
        6: (1, -1),
        7: (-1, -1),
        8: (-1, 1),
    }[orientation]
    return np.ascontiguousarray(image[::row_step, ::column_step])


def _decode_any(encoded: bytes) -> tuple[np.ndarray, int]:
    """Decodes any format to pixels as stored and their orientation."""
    if not encoded:
        raise BadImageError("empty file")
    if encoded.startswith(_PNG_SIGNATURE):
        return _decode_png(encoded)
    if encoded[4:8] == b"ftyp":
        # File type box of ISO/IEC 14496-12: length, type, brand, version, compatible brands.
        brands = encoded[8 : int.from_bytes(encoded[:4])]
        names = {brands[k : k + 4] for k in range(0, len(brands), 4)}
        if names & _HEIC_BRANDS:
            return _decode_heic(encoded), _UPRIGHT
    _check_tiff_samples(encoded)
    if _WARNING_FILTER not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW)
    _silence_tiff_messages()
    try:
        image = Image.open(io.BytesIO(encoded), formats=_PILLOW_FORMATS)
    except Image.DecompressionBombError:
        raise BadImageError("too many pixels") from None
    except MemoryError:
        raise
    except Exception:
        for pattern, name, fix in _FOREIGN_FILES:
            if re.match(pattern, encoded):
                raise BadImageError(f"{name}, not a supported image; {fix}") from None
        raise BadImageError("not an image, or its header is damaged") from None
    with image:
        check_image_area(image.height, image.width)
        with _reject_failures():
            _check_parts(encoded, image)
            pixels = _to_rgb(image)
        orientation = _UPRIGHT
        if image.format != "TIFF":  # Pillow rotates TIFFs.
            orientation = _read_orientation(image.info.get("exif", b""), image.info.get("xmp", b""))
        return pixels, orientation


@functools.cache
def _silence_tiff_messages() -> None:
    """Keeps Pillow and its libtiff from writing to stderr messages that do not name the file."""
    logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)
    library = ctypes.CDLL(Image.core.__file__)
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        # The function is missing where libtiff is linked into Pillow, as on Windows.
        if hasattr(library, name):
            getattr(library, name)(None)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Converts a Pillow image to uint8 RGB (height, width, 3)."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise BadImageError(f"{image.format} with samples of 32 bits; convert it to 8 bits")
    image.info.pop("transparency", None)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _check_parts(encoded: bytes, image: ImageFile.ImageFile) -> None:
    """Raises BadImageError for files that Pillow decodes although a part is missing."""
    if image.format == "JPEG2000":
        # After the start of data (FF 93) the end marker (FF D9) cannot be part of data.
        is_complete = encoded.find(b"\xff\xd9", encoded.find(b"\xff\x93")) >= 0
    elif image.format == "PCX" and image.mode in ("L", "P"):
        # Without its palette of 256 colors the image would be gray.
        is_complete = encoded[-769:-768] == b"\x0c"
    elif image.format == "TIFF":
        # Strips or tiles, of each plane.
        planes = {tile.args[0] for tile in image.tile if isinstance(tile.args, tuple)}
        boxes = [tile.extents or (0, 0, 0, 0) for tile in image.tile]
        area = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
        is_complete = area >= len(planes) * image.width * image.height
    else:
        return
    if not is_complete:
        raise BadImageError(f"{image.format} with missing parts")


def _check_tiff_samples(encoded: bytes) -> None:
    """Raises BadImageError for a TIFF whose samples have no defined range or more than 16 bits."""
    if not encoded.startswith((b"II*\0", b"MM\0*")):
        return
    tags = _read_tags(encoded)
    bits = tags.get(_BITS_TAG, 1)
    kind = {2: "signed integers", 3: "floating-point numbers"}.get(
        tags.get(_SAMPLE_FORMAT_TAG, 1), "unsigned integers"
    )
    if kind != "unsigned integers" or bits not in (1, 2, 4, 8, 16):
        raise BadImageError(
            f"TIFF of {bits}-bit {kind}; scale them to unsigned integers of 8 or 16 bits"
        )


def _decode_heic(encoded: bytes) -> np.ndarray:
    """Decodes a HEIC image; libheif applies the orientation."""
    try:
        import pillow_heif
    except ImportError:
        raise BadImageError("HEIC image; to read it, pip install pillow-heif") from None
    with _reject_failures():
        image = pillow_heif.open_heif(encoded)
        check_image_area(image.size[1], image.size[0])
        return _to_rgb(image.to_pillow())


def _decode_png(encoded: bytes) -> tuple[np.ndarray, int]:
    """Decodes a PNG, of an animation the default image, to pixels as stored and orientation.

    Other decoders than this leave rows that are missing black, or as they were in memory.
    """
    chunks = _read_png_chunks(encoded)
    header = chunks[b"IHDR"]
    width, height = int.from_bytes(header[:4]), int.from_bytes(header[4:8])
    check_image_area(height, width)
    if not height * width:
        raise BadImageError("empty image", f"{width} × {height}")
    bits, color_type, _, _, interlaced = header[8:13]
    mode, samples = _PNG_MODES[color_type, bits]
    with _reject_failures(_PNG_ROWS):
        image = Image.frombytes(mode, (width, height), chunks[b"IDAT"], "zip", samples, interlaced)
        pixels = np.asarray(image)
        # Rows that the data do not reach are zero.
        if interlaced or not pixels[-1].any():
            size = _png_data_size(width, height, bits * _PNG_CHANNELS[color_type], interlaced)
            if len(zlib.decompressobj().decompress(chunks[b"IDAT"], size)) < size:
                raise BadImageError(_PNG_ROWS)
        if color_type == _PALETTE:
            image.putpalette(chunks[b"PLTE"])
        if mode != "RGB":
            pixels = _to_rgb(image)
    return pixels, _read_orientation(chunks.get(b"eXIf", b""))


def _png_data_size(width: int, height: int, bits_per_pixel: int, interlaced: int) -> int:
    """Computes the number of bytes of all rows before compression, each with its filter type."""
    size = 0
    for first_row, row_step, first_column, column_step in _ADAM7 if interlaced else ((0, 1, 0, 1),):
        rows = len(range(first_row, height, row_step))
        columns = len(range(first_column, width, column_step))
        size += rows * (1 + -(-columns * bits_per_pixel // 8)) if columns else 0
    return size


def _read_png_chunks(encoded: bytes) -> dict[bytes, bytes]:
    """Reads the chunks that pixels depend on, and verifies that none is damaged or missing."""
    if encoded[12:16] == b"CgBI":
        raise BadImageError(
            "Apple's CgBI variant of PNG; "
            "convert it with `xcrun pngcrush -revert-iphone-optimizations`"
        )
    view = memoryview(encoded)
    chunks: dict[bytes, bytes] = {}
    data: list[memoryview] = []
    offset = len(_PNG_SIGNATURE)
    kind = b""
    while kind != b"IEND":
        length, kind = int.from_bytes(view[offset : offset + 4]), encoded[offset + 4 : offset + 8]
        end = offset + 8 + length
        if end + 4 > len(encoded):
            raise BadImageError("PNG without its end")
        is_valid = zlib.crc32(view[offset + 4 : end]) == int.from_bytes(view[end : end + 4])
        # Chunks with a small first letter are optional.
        if kind[0] & 0x20 == 0 and not is_valid:
            raise BadImageError("PNG with a wrong checksum")
        if kind == b"IDAT":
            data.append(view[offset + 8 : end])
        elif is_valid:
            chunks.setdefault(kind, bytes(view[offset + 8 : end]))
        offset = end + 4
    chunks[b"IDAT"] = b"".join(data)
    header = chunks.get(b"IHDR", b"")
    if len(header) != 13 or tuple(header[9:7:-1]) not in _PNG_MODES or header[12] > 1:
        raise BadImageError("PNG with an invalid header")
    if header[9] == _PALETTE and not chunks.get(b"PLTE"):
        raise BadImageError("PNG without its palette")
    return chunks


@dataclasses.dataclass(frozen=True)
class _JpegHeader:
    """Contents of the header of a gray or color JPEG.

    Attributes:
        block_rows: Height of one row of minimum coded units, in pixels.
        sequential: Whether the image is stored from top to bottom.
        height_offset: Position in the file of the height, which is two bytes long.
        metadata: Positions of EXIF and XMP data in the file.
    """

    height: int
    width: int
    block_rows: int
    sequential: bool
    height_offset: int
    metadata: list[slice]

    def read_orientation(self, encoded: bytes) -> int:
        segments = [encoded[position] for position in self.metadata]
        exif = next((segment for segment in segments if segment.startswith(_EXIF)), b"")
        return _read_orientation(exif, b"".join(segments))


def _read_jpeg_header(encoded: bytes) -> _JpegHeader | None:
    """Reads the header of a JPEG; None for other formats and unusual JPEGs.

    Raises:
        BadImageError: The JPEG is truncated, so that decoders would fill the missing part with
            gray, or its samples do not have 8 bits.
    """
    if not encoded.startswith(_JPEG_SIGNATURE):
        return None
    header = None
    metadata: list[slice] = []
    offset = 2
    while offset + 4 <= len(encoded):
        prefix, marker, length = _JPEG_SEGMENT.unpack_from(encoded, offset)
        if prefix != 0xFF:
            return None
        if marker == 0xFF:  # Padding.
            offset += 1
        elif marker in _STANDALONE:
            offset += 2
        elif marker == _START_OF_SCAN:
            # In scan data FF is always followed by 00 or a restart marker, so that a match can
            # only be the end of this image; that of an embedded thumbnail precedes the scan.
            if encoded.rfind(_JPEG_END, offset) < 0:
                raise BadImageError("incomplete", "the end of the JPEG is missing")
            return header
        else:
            if marker in _START_OF_FRAME:
                header = _parse_frame(encoded, offset, metadata)
            elif marker == _APP1:
                metadata.append(slice(offset + 4, offset + 2 + length))
            offset += 2 + length
    raise BadImageError("incomplete", "the JPEG ends in its header")


def _parse_frame(encoded: bytes, offset: int, metadata: list[slice]) -> _JpegHeader | None:
    """Parses the frame header whose marker is at `offset`; None if it is not usual and valid."""
    if offset + 4 + _JPEG_FRAME.size > len(encoded):
        return None
    bits, height, width, channels = _JPEG_FRAME.unpack_from(encoded, offset + 4)
    samplings = encoded[offset + 11 : offset + 11 + 3 * channels : 3]
    if not (
        channels in (1, 3)
        and len(samplings) == channels
        and _SAMPLINGS.issuperset(samplings)
        and height
        and width
    ):
        return None
    if bits != 8:
        raise BadImageError(
            "JPEG whose samples do not have 8 bits; convert it to 8 bits", f"it has {bits}"
        )
    return _JpegHeader(
        height,
        width,
        block_rows=8 * max(sampling & 15 for sampling in samplings),
        sequential=encoded[offset + 1] in _SEQUENTIAL,
        height_offset=offset + 5,
        metadata=metadata,
    )


def _decode_jpeg(
    encoded: bytes, header: _JpegHeader, bottom: int, accurate_dct: bool
) -> np.ndarray | None:
    """Decodes at least the rows above `bottom`; None if the decoder fails."""
    # A smaller height in the header makes the decoder stop early. Chroma upsampling reads one row
    # of chroma ahead, so that at least two more rows of the image are decoded.
    height = -(-(bottom + 2) // header.block_rows) * header.block_rows
    if header.sequential and height < header.height:
        offset = header.height_offset
        encoded = b"".join([encoded[:offset], height.to_bytes(2), encoded[offset + 2 :]])
    else:
        height = header.height
    pixels = np.empty((height, header.width, 3), np.uint8)
    # Strict decoding would reject stray bytes, which all other decoders accept. Otherwise rows
    # after an error are not written, which shows in the last pixel, unless it has this color.
    for red, blue in ((85, 170), (170, 85)):
        pixels[-1, -1, 0], pixels[-1, -1, 2] = red, blue
        try:
            image = simplejpeg.decode_jpeg(
                encoded, fastdct=not accurate_dct, buffer=pixels, strict=False
            )
        except MemoryError:
            raise
        except Exception:
            return None
        if image.shape != pixels.shape:  # A second frame header contradicts the first.
            return None
        if (pixels.item(-3), pixels.item(-1)) != (red, blue):
            return pixels
    return None
