"""From the bytes of an image file to pixels, whatever the file is; what is no image is refused."""

import dataclasses
import io
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

# (top, left, height, width), pixels.
Box = tuple[int, int, int, int]

# Where Pillow begins to warn of decompression bombs: 256 MiB of RGB.
MAX_PIXELS = 89_478_485

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_END_OF_JPEG = b"\xff\xd9"
_UPRIGHT = 1
_START_OF_SCAN = 0xDA
# Frame headers: C0 to CF but for tables and extensions (C4, C8, CC).
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = {0xC0, 0xC1}
# Markers that no length follows: temporary, restarts, start of image.
_BARE = {0x01, *range(0xD0, 0xD9)}


class BadImageError(ValueError):
    """Bytes that are no usable image.

    Attributes:
        reason: what is wrong, in words that are the same for all such images.
        name: what a person finds the image by, if it is known here.
    """

    def __init__(self, reason: str, detail: str = "", name: str = ""):
        text = f"{reason} ({detail})" if detail else reason
        super().__init__(f"{name}: {text}" if name else text)
        self.reason, self.name = reason, name


def disable_opencv_threads() -> None:
    """Keeps OpenCV, in the whole process, from using several threads for one image.

    For programs that prepare images side by side, where more threads only get in each other's way.
    """
    cv2.setNumThreads(0)


def decode(
    encoded: bytes,
    crop_fn: Callable[[int, int], Box] | None = None,
    *,
    exif_orientation: bool = False,
    accurate: bool = False,
) -> np.ndarray:
    """Returns an image, or a part of it, as uint8 RGB (height, width, 3).

    Grey, palette and CMYK images become RGB, 16 bits become the higher 8, transparency is left
    out: as Pillow and TensorFlow do.

    Args:
        encoded: the bytes of an image file.
        crop_fn: from height and width of the image to the part wanted; None: all of it.
        exif_orientation: whether the image is turned as its camera says. TFDS and TensorFlow
            never do.
        accurate: whether a JPEG is decoded by the slow and accurate transform, as Pillow does, or
            by the fast one, as TensorFlow does, whose pixels are a level darker on average.

    Raises:
        BadImageError: no image, an incomplete one, or one of more than `MAX_PIXELS`.
    """
    frame = _jpeg_frame(encoded)
    check_image_area(*((frame.height, frame.width) if frame else _size(encoded)))
    if frame and frame.channels != 4:
        orientation = _orientation(encoded) if exif_orientation else _UPRIGHT
        if orientation == _UPRIGHT:
            top, left, height, width = _box(crop_fn, frame.height, frame.width)
            image = _decode_jpeg(encoded, frame, top + height, accurate)
        else:
            image = _decode_jpeg(encoded, frame, frame.height, accurate)
            if image is not None:
                image = _turn(image, orientation)
                top, left, height, width = _box(crop_fn, *image.shape[:2])
        if image is not None:
            return image[top : top + height, left : left + width]
    image = _decode_any(encoded, exif_orientation)
    top, left, height, width = _box(crop_fn, *image.shape[:2])
    return image[top : top + height, left : left + width]


def _orientation(encoded: bytes) -> int:
    """Returns how the camera of a JPEG was held (EXIF 2.3, tag 274): 1 upright, to 8."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT)
    except Exception:  # Of what Pillow cannot read; a decoder tells what is wrong with it.
        return _UPRIGHT
    return orientation if orientation in range(1, 9) else _UPRIGHT


def _turn(image: np.ndarray, orientation: int) -> np.ndarray:
    """Returns an image upright that was stored in one of the eight orientations."""
    if orientation > 4:
        image = image.swapaxes(0, 1)
    rows, columns = {
        1: (1, 1),
        2: (1, -1),
        3: (-1, -1),
        4: (-1, 1),
        5: (1, 1),
        6: (1, -1),
        7: (-1, -1),
        8: (-1, 1),
    }[orientation]
    return np.ascontiguousarray(image[::rows, ::columns])


def _box(crop_fn: Callable[[int, int], Box] | None, height: int, width: int) -> Box:
    return crop_fn(height, width) if crop_fn else (0, 0, height, width)


def check_image_area(height: int, width: int) -> None:
    """Raises BadImageError for an image of more than `MAX_PIXELS`."""
    if height * width > MAX_PIXELS:
        raise BadImageError("too many pixels", f"{width} × {height}")


def _size(encoded: bytes) -> tuple[int, int]:
    """Returns height and width as the file's header tells them, without decoding."""
    if encoded.startswith(_PNG):
        return int.from_bytes(encoded[20:24]), int.from_bytes(encoded[16:20])
    if not encoded:
        raise BadImageError("empty file")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.height, image.width
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImageError("too many pixels") from None
    except Exception:  # Each of Pillow's formats raises its own.
        raise BadImageError("no image, or its header is damaged") from None


def _decode_any(encoded: bytes, exif_orientation: bool) -> np.ndarray:
    """Decodes any format that OpenCV knows, and what is left to Pillow."""
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
            turned = ImageOps.exif_transpose(opened) if exif_orientation else opened
            return np.asarray(turned.convert("RGB"))
    except Exception:  # Each of Pillow's formats raises its own.
        raise BadImageError("incomplete or damaged") from None


@dataclasses.dataclass(frozen=True)
class _Frame:
    """What the header of a JPEG says.

    Attributes:
        height: pixels.
        width: pixels.
        channels: 1 grey, 3 colour, 4 CMYK.
        rows: pixels that one row of its blocks is high.
        sequential: whether the image is stored from top to bottom.
        height_at: where in the file the height is written, as two bytes.
    """

    height: int
    width: int
    channels: int
    rows: int
    sequential: bool
    height_at: int


def _jpeg_frame(encoded: bytes) -> _Frame | None:
    """Reads the header of a JPEG; None for what is none, or one out of the ordinary.

    Raises:
        BadImageError: a JPEG that breaks off. Decoders fill up the missing part with grey.
    """
    if not encoded.startswith(_JPEG):
        return None
    frame = None
    at = 2
    while at + 4 <= len(encoded):
        marker, length = encoded[at + 1], int.from_bytes(encoded[at + 2 : at + 4])
        if encoded[at] != 0xFF:
            return None
        if marker == 0xFF:  # Padding.
            at += 1
        elif marker in _BARE:
            at += 2
        elif marker == _START_OF_SCAN:
            # In the coded image FF is always followed by 00 or a restart, so that this marker can
            # only be the end; that of a thumbnail in the header lies before.
            if encoded.rfind(_END_OF_JPEG, at) < 0:
                raise BadImageError("incomplete", "the end of the JPEG is missing")
            return frame
        else:
            if marker in _FRAMES:
                frame = _read_frame(encoded, at)
            at += 2 + length
    raise BadImageError("incomplete", "the JPEG ends in its header")


def _read_frame(encoded: bytes, at: int) -> _Frame | None:
    """Reads the frame header at a marker's place; None for one that is cut off or empty."""
    channels = encoded[at + 9] if at + 9 < len(encoded) else 0
    samplings = encoded[at + 11 : at + 11 + 3 * channels : 3]
    height, width = (int.from_bytes(encoded[at + k : at + k + 2]) for k in (5, 7))
    if not (height and width and channels and len(samplings) == channels):
        return None
    return _Frame(
        height,
        width,
        channels,
        rows=8 * max(sampling & 15 for sampling in samplings),
        sequential=encoded[at + 1] in _SEQUENTIAL,
        height_at=at + 5,
    )


def _decode_jpeg(encoded: bytes, frame: _Frame, bottom: int, accurate: bool) -> np.ndarray | None:
    """Decodes the rows of a JPEG above `bottom`, and perhaps more; None if it cannot."""
    # A picture that claims to end with the part wanted is decoded no further. Interpolated colour
    # looks one row of colour ahead, so the rows wanted are followed by two of the image at least.
    height = -(-(bottom + 2) // frame.rows) * frame.rows
    if frame.sequential and height < frame.height:
        at = frame.height_at
        encoded = b"".join([encoded[:at], height.to_bytes(2), encoded[at + 2 :]])
    try:
        # Strict would refuse what every other decoder lets pass, such as stray bytes.
        return simplejpeg.decode_jpeg(encoded, fastdct=not accurate, strict=False)
    except ValueError:
        return None
