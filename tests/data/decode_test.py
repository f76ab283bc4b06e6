"""Tests of decoding: any format to RGB, crops equal to crops of the whole image, bad files."""

import io
import tracemalloc
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from mixer_jax.data.decode import BadImageError, Box, decode
from tests.helpers.bad_images import reason_of
from tests.helpers.images import (
    encode,
    encode_with_orientation,
    noise,
    photograph,
    png_with_header_size,
    smooth,
)
from tests.helpers.messages import raises


def pillow_decode(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def constant_crop(box: Box) -> Callable[[int, int], Box]:
    return lambda height, width: box


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "LA", "RGBA"])
def test_decode_png_matches_pillow(mode: str) -> None:
    image = np.dstack([noise(7, 9), np.arange(63, dtype=np.uint8).reshape(7, 9)])
    encoded = io.BytesIO()
    # Palettes with transparency are tested below.
    source = Image.fromarray(image[..., :3] if mode == "P" else image)
    source.convert(mode).save(encoded, "PNG")
    np.testing.assert_array_equal(decode(encoded.getvalue()), pillow_decode(encoded.getvalue()))


def test_decode_palette_with_transparency_matches_pillow() -> None:
    encoded = io.BytesIO()
    Image.fromarray(smooth(9, 9)).quantize(4).save(encoded, "PNG", transparency=2)
    np.testing.assert_array_equal(decode(encoded.getvalue()), pillow_decode(encoded.getvalue()))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_decode_reduces_16_bits_to_the_upper_8(suffix: str, channels: int) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 2**16, (8, 9, channels), np.uint16)
    decoded = decode(cv2.imencode(suffix, image)[1].tobytes())
    # OpenCV rounds color TIFFs instead of truncating.
    tolerance = 1 if (suffix, channels) == (".tiff", 3) else 0
    difference = decoded.astype(int) - np.broadcast_to(image[..., ::-1] >> 8, (8, 9, 3))
    assert np.abs(difference).max() <= tolerance


JPEGS = {
    f"{mode} {subsampling} {'progressive' if progressive else 'sequential'}": encode(
        photograph()[:120, :150],
        "JPEG",
        mode,
        progressive=progressive,
        quality=90,
        **({"subsampling": subsampling} if subsampling else {}),
    )
    for progressive in (False, True)
    for mode, subsampling in [
        ("RGB", "4:4:4"),
        ("RGB", "4:2:2"),
        ("RGB", "4:2:0"),
        ("RGB", "4:1:1"),
        ("L", ""),
        ("CMYK", ""),
    ]
}


@pytest.mark.parametrize("name", JPEGS)
def test_decode_jpeg_matches_pillow(name: str) -> None:
    decoded = decode(JPEGS[name], accurate_dct=True)
    assert decoded.dtype == np.uint8
    difference = np.abs(decoded.astype(int) - pillow_decode(JPEGS[name]))
    # Both use libjpeg-turbo; conversions of CMYK to RGB differ.
    assert difference.max() == 0 if "CMYK" not in name else difference.mean() < 2


@pytest.mark.parametrize("accurate_dct", [False, True])
@pytest.mark.parametrize("name", JPEGS)
def test_decoded_crop_equals_crop_of_decoded_image(name: str, accurate_dct: bool) -> None:
    image, rng = decode(JPEGS[name], accurate_dct=accurate_dct), np.random.default_rng(0)
    # All bottom rows, so that every offset within a block occurs.
    for bottom in range(1, 121):
        top, left = int(rng.integers(bottom)), int(rng.integers(149))
        width = int(rng.integers(1, 151 - left))
        crop_fn = constant_crop((top, left, bottom - top, width))
        crop = decode(JPEGS[name], crop_fn, accurate_dct=accurate_dct)
        np.testing.assert_array_equal(crop, image[top:bottom, left : left + width])


def test_crop_fn_is_called_with_the_image_size() -> None:
    seen = []

    def crop_fn(height: int, width: int) -> Box:
        seen.append((height, width))
        return 1, 2, 3, 4

    for encoded in (encode(noise(20, 30), "PNG"), encode(noise(20, 30), "JPEG")):
        assert decode(encoded, crop_fn).shape == (3, 4, 3)
    assert seen == [(20, 30)] * 2


@pytest.mark.parametrize("file_format", ["GIF", "BMP", "WEBP", "TIFF", "PPM", "ICO", "PCX"])
def test_decode_other_formats_matches_pillow(file_format: str) -> None:
    options: dict[str, Any] = {"lossless": True} if file_format == "WEBP" else {}
    encoded = encode(noise(16, 16), file_format, **options)
    np.testing.assert_array_equal(decode(encoded), pillow_decode(encoded))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_applies_exif_orientation_only_if_requested(orientation: int) -> None:
    upright = decode(encode_with_orientation(smooth(16, 32), 1))
    encoded = encode_with_orientation(smooth(16, 32), orientation)
    np.testing.assert_array_equal(decode(encoded), upright)
    # Definitions of EXIF 2.3, tag 274.
    expected = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[:, ::-1],
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[::-1],
    }[orientation]
    np.testing.assert_array_equal(decode(encoded, exif_orientation=True), expected)
    height, width = expected.shape[:2]
    box = (1, 2, height - 3, width - 4)
    crop = decode(encoded, constant_crop(box), exif_orientation=True)
    np.testing.assert_array_equal(crop, expected[1 : height - 2, 2 : width - 2])


PHOTO = encode(photograph(), "JPEG", quality=90)
WITH_THUMBNAIL = PHOTO[:2] + b"\xff\xe1\x00\x0cExif\xff\xd8ab\xff\xd9" + PHOTO[2:]
BMP = encode(noise(2, 2), "BMP")
# One file for each reason.
CAUSES = {
    "empty": b"",
    "unknown": b"not an image",
    "damaged": png_with_header_size(9, 9),
    "too large": png_with_header_size(60_000, 60_000),
    "incomplete": WITH_THUMBNAIL[:-2],
}
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "zeros": (b"\0" * 100, "unknown"),
    "text": (b"not an image", "unknown"),
    "GIF in name only": (b"GIF89a", "unknown"),
    "half a PNG": (encode(noise(40, 50), "PNG")[:600], "damaged"),
    "half a GIF": (encode(noise(40, 50), "GIF")[:600], "unknown"),
    "half a BMP": (encode(noise(40, 50), "BMP")[:600], "damaged"),
    "half a WebP": (encode(noise(40, 50), "WEBP")[:600], "unknown"),
    "broken PNG": (png_with_header_size(9, 9), "damaged"),
    "large PNG": (png_with_header_size(10**4, 10**4), "too large"),
    "huge PNG": (png_with_header_size(60_000, 60_000), "too large"),
    "large BMP": (BMP[:18] + (10**4).to_bytes(4, "little") * 2 + BMP[26:], "too large"),
    "start of a JPEG": (b"\xff\xd8\xff\xe0", "incomplete"),
    "JPEG without end": (WITH_THUMBNAIL[:-2], "incomplete"),
    **{f"JPEG of {n} tenths": (PHOTO[: len(PHOTO) * n // 10], "incomplete") for n in range(1, 10)},
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("exif_orientation", [False, True])
def test_decode_rejects_bad_files_with_a_reason(name: str, exif_orientation: bool) -> None:
    encoded, cause = BAD[name]
    with pytest.raises(BadImageError) as caught:
        decode(encoded, exif_orientation=exif_orientation)
    assert caught.value.reason == reason_of(CAUSES[cause])
    assert caught.value.reason in str(caught.value)
    # Reasons are counted, so they must not contain details of one image.
    assert not any(character.isdigit() for character in caught.value.reason)


def test_reasons_differ_between_causes() -> None:
    assert len({reason_of(encoded) for encoded in CAUSES.values()}) == len(CAUSES)


def test_decode_ignores_embedded_thumbnails() -> None:
    np.testing.assert_array_equal(decode(WITH_THUMBNAIL), decode(PHOTO))


@pytest.mark.parametrize("tail", [b"\0" * 99, b"camera data", PHOTO[:500]])
def test_decode_ignores_bytes_after_the_end_of_a_jpeg(tail: bytes) -> None:
    np.testing.assert_array_equal(decode(PHOTO + tail), decode(PHOTO))


def test_decode_accepts_stray_bytes_between_markers() -> None:
    start_of_scan = PHOTO.index(b"\xff\xda")
    stray = PHOTO[:start_of_scan] + b"\xff\xff" + PHOTO[start_of_scan:]
    np.testing.assert_array_equal(decode(stray), decode(PHOTO))


def test_decode_rejects_jpegs_of_height_zero() -> None:
    offset = PHOTO.index(b"\xff\xc0") + 5
    with pytest.raises(BadImageError):
        decode(PHOTO[:offset] + b"\0\0" + PHOTO[offset + 2 :])


def test_decode_survives_any_damaged_byte() -> None:
    rng = np.random.default_rng(0)
    num_rejected = 0
    encoded = encode(smooth(24, 32), "JPEG")
    for offset in range(len(encoded)):
        damaged = bytearray(encoded)
        damaged[offset] ^= int(rng.integers(1, 256))
        try:
            assert decode(bytes(damaged)).ndim == 3
        except BadImageError:
            num_rejected += 1
    assert 0 < num_rejected < len(encoded)


def test_decode_rejects_decompression_bombs_without_decoding_them() -> None:
    tracemalloc.start()
    with raises(BadImageError, "20000") as caught:
        decode(png_with_header_size(20_000, 20_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The decoded image would take 1.2 GB.
    assert peak < 10**6
    assert caught.value.reason == reason_of(CAUSES["too large"])


def test_decode_accepts_images_of_exactly_max_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixer_jax.data.decode.MAX_PIXELS", 20 * 30)
    assert decode(encode(noise(20, 30), "JPEG")).shape == (20, 30, 3)
    too_large = [encode(noise(20, 31), file_format) for file_format in ("JPEG", "PNG", "GIF")]
    for encoded in too_large:
        with raises(BadImageError, "31", "20"):
            decode(encoded)
