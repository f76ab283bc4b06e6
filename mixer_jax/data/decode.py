"""Image decoding: any common format to uint8 RGB; damaged and oversized files are rejected."""

import dataclasses
import io
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

# (top, left, height, width), in pixels.
Box = tuple[int, int, int, int]

# The size from which Pillow warns of decompression bombs: 256 MiB of RGB.
MAX_PIXELS = 89_478_485

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_UPRIGHT = 1
_START_OF_SCAN = 0xDA
# Start-of-frame markers: C0 to CF except DHT, JPG and DAC (C4, C8, CC).
_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = {0xC0, 0xC1}
# Markers without a length: TEM, restart markers, start of image.
_STANDALONE = {0x01, *range(0xD0, 0xD9)}


class BadImageError(ValueError):
    """Bytes that cannot be used as an image.

    Attributes:
        reason: The problem, worded identically for all images that have it.
        name: Path or name of the image, or "" if unknown.
    """

    def __init__(self, reason: str, detail: str = "", name: str = ""):
        text = f"{reason} ({detail})" if detail else reason
        super().__init__(f"{name}: {text}" if name else text)
        self.reason, self.name = reason, name


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

    Gray, palette and CMYK images are converted to RGB, 16-bit values are reduced to their upper 8
    bits, and transparency is dropped, as in Pillow and TensorFlow.

    Args:
        encoded: Bytes of an image file.
        crop_fn: Function from height and width of the image to the box to return; None: all of it.
        exif_orientation: Whether to rotate the image according to its EXIF orientation, which TFDS
            and TensorFlow ignore.
        accurate_dct: Whether JPEGs are decoded by the accurate inverse DCT, as in Pillow, or by
            the fast one, as in TensorFlow, whose pixels are one level darker on average.

    Raises:
        BadImageError: The bytes are not an image, are incomplete, or encode more than `MAX_PIXELS`.
    """
    header = _read_jpeg_header(encoded)
    check_image_area(*((header.height, header.width) if header else _read_size(encoded)))
    if header and header.channels != 4:
        orientation = _read_orientation(encoded) if exif_orientation else _UPRIGHT
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
    image = _decode_any(encoded, exif_orientation)
    top, left, height, width = _crop_box(crop_fn, *image.shape[:2])
    return image[top : top + height, left : left + width]


def check_image_area(height: int, width: int) -> None:
    """Raises BadImageError for more than `MAX_PIXELS`."""
    if height * width > MAX_PIXELS:
        raise BadImageError("too many pixels", f"{width} × {height}")


def _crop_box(crop_fn: Callable[[int, int], Box] | None, height: int, width: int) -> Box:
    return crop_fn(height, width) if crop_fn else (0, 0, height, width)


def _read_orientation(encoded: bytes) -> int:
    """Reads the EXIF orientation (EXIF 2.3, tag 274), 1 (upright) to 8, from a JPEG."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT)
    except Exception:  # The decoder reports what is wrong with a file that Pillow cannot read.
        return _UPRIGHT
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


def _read_size(encoded: bytes) -> tuple[int, int]:
    """Reads height and width from the header, without decoding."""
    if encoded.startswith(_PNG_SIGNATURE):
        return int.from_bytes(encoded[20:24]), int.from_bytes(encoded[16:20])
    if not encoded:
        raise BadImageError("empty file")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.height, image.width
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImageError("too many pixels") from None
    except Exception:  # Pillow raises other exceptions for each format.
        raise BadImageError("not an image, or its header is damaged") from None


def _decode_any(encoded: bytes, exif_orientation: bool) -> np.ndarray:
    """Decodes any format with OpenCV, or with Pillow if OpenCV fails."""
    flags = cv2.IMREAD_COLOR_RGB
    if not exif_orientation:
        flags |= cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:
        image = None
    if image is not None:
        return image
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            upright = ImageOps.exif_transpose(opened) if exif_orientation else opened
            return np.asarray(upright.convert("RGB"))
    except Exception:  # Pillow raises other exceptions for each format.
        raise BadImageError("incomplete or damaged") from None


@dataclasses.dataclass(frozen=True)
class _JpegHeader:
    """Contents of a JPEG's frame header.

    Attributes:
        height: Height in pixels.
        width: Width in pixels.
        channels: Number of channels: 1 gray, 3 color, 4 CMYK.
        block_rows: Height of one row of minimum coded units, in pixels.
        sequential: Whether the image is stored from top to bottom.
        height_offset: Position in the file of the height, which is two bytes long.
    """

    height: int
    width: int
    channels: int
    block_rows: int
    sequential: bool
    height_offset: int


def _read_jpeg_header(encoded: bytes) -> _JpegHeader | None:
    """Reads the frame header of a JPEG; None for other formats and unusual JPEGs.

    Raises:
        BadImageError: The JPEG is truncated. Decoders would fill the missing part with gray.
    """
    if not encoded.startswith(_JPEG_SIGNATURE):
        return None
    header = None
    offset = 2
    while offset + 4 <= len(encoded):
        marker = encoded[offset + 1]
        length = int.from_bytes(encoded[offset + 2 : offset + 4])
        if encoded[offset] != 0xFF:
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
                header = _parse_frame(encoded, offset)
            offset += 2 + length
    raise BadImageError("incomplete", "the JPEG ends in its header")


def _parse_frame(encoded: bytes, offset: int) -> _JpegHeader | None:
    """Parses the frame header whose marker is at `offset`; None if it is truncated or empty."""
    channels = encoded[offset + 9] if offset + 9 < len(encoded) else 0
    samplings = encoded[offset + 11 : offset + 11 + 3 * channels : 3]
    height, width = (int.from_bytes(encoded[offset + k : offset + k + 2]) for k in (5, 7))
    if not (height and width and channels and len(samplings) == channels):
        return None
    return _JpegHeader(
        height,
        width,
        channels,
        block_rows=8 * max(sampling & 15 for sampling in samplings),
        sequential=encoded[offset + 1] in _SEQUENTIAL,
        height_offset=offset + 5,
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
    try:
        # Strict decoding would reject stray bytes, which all other decoders accept.
        return simplejpeg.decode_jpeg(encoded, fastdct=not accurate_dct, strict=False)
    except ValueError:
        return None
