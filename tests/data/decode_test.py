"""Tests of decoding: any format to RGB, crops equal to crops of the whole image, bad files."""

import contextlib
import io
import itertools
import re
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from mixer_jax.data.decode import MAX_PIXELS, BadImageError, Box, decode
from mixer_jax.data.image_files import has_image_suffix
from tests.helpers.bad_images import reason_of
from tests.helpers.image_formats import (
    encode_heic,
    encode_png,
    files_of_all_formats,
    join_png,
    png_chunks,
)
from tests.helpers.images import (
    encode,
    encode_with_orientation,
    noise,
    photograph,
    png_chunk,
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


def turned(upright: np.ndarray, orientation: int) -> np.ndarray:
    """Turns pixels by the definitions of EXIF 2.3, tag 274."""
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[:, ::-1],
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[::-1],
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_applies_exif_orientation_only_if_requested(orientation: int) -> None:
    upright = decode(encode_with_orientation(smooth(16, 32), 1))
    encoded = encode_with_orientation(smooth(16, 32), orientation)
    np.testing.assert_array_equal(decode(encoded), upright)
    expected = turned(upright, orientation)
    np.testing.assert_array_equal(decode(encoded, exif_orientation=True), expected)
    height, width = expected.shape[:2]
    box = (1, 2, height - 3, width - 4)
    crop = decode(encoded, constant_crop(box), exif_orientation=True)
    np.testing.assert_array_equal(crop, expected[1 : height - 2, 2 : width - 2])


ANIMATION: dict[str, Any] = {
    "save_all": True,
    "append_images": [Image.fromarray(noise(16, 32)), Image.fromarray(smooth(16, 32))],
}
WITH_EXIF: dict[str, tuple[str, dict[str, Any]]] = {
    "PNG": ("PNG", {}),
    "animated PNG": ("PNG", ANIMATION),
    "WebP": ("WEBP", {"lossless": True}),
    "animated WebP": ("WEBP", {"lossless": True, **ANIMATION}),
    "AVIF": ("AVIF", {"speed": 10}),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", WITH_EXIF)
def test_decode_applies_exif_orientation_in_all_formats(name: str, orientation: int) -> None:
    file_format, options = WITH_EXIF[name]
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(smooth(16, 32), file_format, exif=exif, **options)
    upright = decode(encoded)
    difference = np.abs(upright.astype(int) - smooth(16, 32))
    assert difference.mean() < (8 if name == "AVIF" else 1e-6)
    expected = turned(upright, orientation)
    np.testing.assert_array_equal(decode(encoded, exif_orientation=True), expected)


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
@pytest.mark.parametrize("text", ['tiff:Orientation="6"', "<tiff:Orientation>6</tiff:Orientation>"])
def test_decode_applies_orientation_in_xmp(file_format: str, text: str) -> None:
    encoded = encode(smooth(16, 32), file_format, xmp=text.encode())
    expected = turned(decode(encoded), 6)
    np.testing.assert_array_equal(decode(encoded, exif_orientation=True), expected)


@pytest.mark.parametrize("exif_orientation", [False, True])
def test_decode_always_turns_tiff(exif_orientation: bool) -> None:
    encoded = files_of_all_formats()["TIFF orientation"]
    expected = turned(decode(files_of_all_formats()["TIFF"]), 6)
    decoded = decode(encoded, exif_orientation=exif_orientation)
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("code", ["H", "I"])
def test_decode_reads_exif_of_both_byte_orders_and_integer_types(endian: str, code: str) -> None:
    value = struct.pack(endian + code, 8).ljust(4, b"\0")
    exif = struct.pack(endian + "2sHIHHHI", b"II" if endian == "<" else b"MM", 42, 8, 1, 274, 3, 1)
    exif = exif if code == "H" else exif[:12] + struct.pack(endian + "H", 4) + exif[14:]
    encoded = encode(smooth(16, 32), "JPEG", exif=b"Exif\0\0" + exif + value + b"\0" * 4)
    expected = turned(decode(encoded), 8)
    np.testing.assert_array_equal(decode(encoded, exif_orientation=True), expected)
    np.testing.assert_array_equal(decode(encoded), decode(encode(smooth(16, 32), "JPEG")))


PHOTO = encode(photograph(), "JPEG", quality=90)
WITH_THUMBNAIL = PHOTO[:2] + b"\xff\xe1\x00\x0cExif\xff\xd8ab\xff\xd9" + PHOTO[2:]
BMP = encode(noise(2, 2), "BMP")
# One file for each reason.
CAUSES = {
    "empty": b"",
    "unknown": b"not an image",
    "damaged": encode(noise(40, 50), "BMP")[:600],
    "PNG without end": encode(noise(40, 50), "PNG")[:600],
    "PNG without rows": png_with_header_size(9, 9),
    "too large": png_with_header_size(60_000, 60_000),
    "incomplete": WITH_THUMBNAIL[:-2],
}
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "zeros": (b"\0" * 100, "unknown"),
    "text": (b"not an image", "unknown"),
    "GIF in name only": (b"GIF89a", "unknown"),
    "half a PNG": (encode(noise(40, 50), "PNG")[:600], "PNG without end"),
    "half a GIF": (encode(noise(40, 50), "GIF")[:600], "unknown"),
    "half a BMP": (encode(noise(40, 50), "BMP")[:600], "damaged"),
    "half a WebP": (encode(noise(40, 50), "WEBP")[:600], "unknown"),
    "broken PNG": (png_with_header_size(9, 9), "PNG without rows"),
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


@pytest.mark.parametrize("name", files_of_all_formats())
def test_decode_rejects_truncated_files_or_decodes_every_pixel(name: str) -> None:
    encoded = files_of_all_formats()[name]
    whole = decode(encoded)
    num_rejected = 0
    for length in np.linspace(0, len(encoded) - 1, 60).astype(int):
        try:
            np.testing.assert_array_equal(decode(encoded[:length]), whole)
        except BadImageError:
            num_rejected += 1
    assert num_rejected > 10


@pytest.mark.parametrize(
    ("failing", "suffix"),
    [
        ("simplejpeg.decode_jpeg", "JPEG"),
        ("PIL.Image.open", "BMP"),
        ("PIL.Image.Image.convert", "GIF"),
        ("PIL.Image.frombytes", "PNG"),
    ],
)
def test_lack_of_memory_does_not_make_an_image_bad(
    failing: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    encoded = encode(noise(8, 8), suffix)
    decode(encoded)
    monkeypatch.setattr(failing, fail)
    with pytest.raises(MemoryError):
        decode(encoded)


def test_threads_decode_the_same_pixels() -> None:
    files = list(files_of_all_formats().values()) * 3
    with ThreadPoolExecutor(8) as pool:
        for encoded, pixels in zip(files, pool.map(decode, files), strict=True):
            np.testing.assert_array_equal(pixels, decode(encoded))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("accurate_dct", [False, True])
def test_decode_survives_all_values_of_all_bytes_of_a_jpeg_header(
    mode: str, accurate_dct: bool
) -> None:
    encoded = encode(smooth(9, 10), "JPEG", mode)
    damaged = bytearray(encoded)
    for offset in range(encoded.index(b"\xff\xda") + 14):
        for value in range(256):
            damaged[offset] = value
            try:
                pixels = decode(bytes(damaged), lambda height, width: (0, 0, height, 1))
                assert pixels.shape[1:] == (1, 3)
            except BadImageError:
                pass
        damaged[offset] = encoded[offset]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_decode_survives_all_sampling_factors(mode: str) -> None:
    encoded = encode(smooth(9, 10), "JPEG", mode)
    offset = encoded.index(b"\xff\xc0") + 11
    for value in range(256):
        damaged = encoded[:offset] + bytes([value]) + encoded[offset + 1 :]
        factors = value >> 4, value & 15
        try:
            assert decode(damaged).shape == (9, 10, 3)
            assert set(factors) <= {1, 2, 3, 4}
        except BadImageError:
            assert factors != (1, 1)


def test_decode_rejects_jpegs_whose_tables_are_damaged() -> None:
    """Otherwise the pixels would be those of the image decoded before."""
    encoded = encode(smooth(90, 80), "JPEG", progressive=True)
    scans = [match.start() for match in re.finditer(b"\xff\xda", encoded)]
    assert len(scans) > 5
    for offset in scans:
        # An invalid Huffman table before the scan.
        damaged = encoded[:offset] + b"\xff\xc4\x00\x04\xff\xff" + encoded[offset:]
        with pytest.raises(BadImageError):
            decode(damaged)


def test_decode_rejects_jpegs_of_more_than_8_bits_by_name() -> None:
    offset = PHOTO.index(b"\xff\xc0") + 4
    with raises(BadImageError, "JPEG", "12", "8 bits"):
        decode(PHOTO[:offset] + b"\x0c" + PHOTO[offset + 1 :])


PNG = encode(noise(20, 30), "PNG")
IMAGE_DATA = dict(png_chunks(PNG))[b"IDAT"]
ANIMATED_PNG = encode(noise(16, 32), "PNG", **ANIMATION)


def with_image_data(encoded: bytes, data: bytes) -> bytes:
    chunks = [(kind, data if kind == b"IDAT" else old) for kind, old in png_chunks(encoded)]
    return join_png(chunks)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:4] + b"\xff" + data[5:],
        lambda data: data + b"\xff" * 50,
    ],
    ids=["empty", "half", "filter", "long"],
)
def test_decode_ignores_damage_to_later_frames_of_animated_png(
    damage: Callable[[bytes], bytes],
) -> None:
    chunks = png_chunks(ANIMATED_PNG)
    assert sum(kind == b"fdAT" for kind, _ in chunks) == 2
    damaged = [(kind, damage(data) if kind == b"fdAT" else data) for kind, data in chunks]
    np.testing.assert_array_equal(decode(join_png(damaged)), noise(16, 32))


@pytest.mark.parametrize("size", [0, 1, 31, 33, 2**31])
def test_decode_ignores_frame_sizes_of_animated_png(size: int) -> None:
    chunks = [
        (kind, data[:4] + struct.pack(">I", size) + data[8:] if kind == b"fcTL" else data)
        for kind, data in png_chunks(ANIMATED_PNG)
    ]
    np.testing.assert_array_equal(decode(join_png(chunks)), noise(16, 32))


@pytest.mark.parametrize("encoded", [PNG, ANIMATED_PNG], ids=["still", "animated"])
@pytest.mark.parametrize("num_rows", [0, 1, 9, 15])
def test_decode_rejects_png_whose_rows_are_missing(encoded: bytes, num_rows: int) -> None:
    rows = zlib.decompress(dict(png_chunks(encoded))[b"IDAT"])
    width = int.from_bytes(encoded[16:20])
    # The shorter data are compressed again, so that the checksums are right.
    data = zlib.compress(rows[: num_rows * (3 * width + 1) + 5])
    with raises(BadImageError, "PNG", "rows"):
        decode(with_image_data(encoded, data))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    ("bits", "color_type"), [(1, 0), (2, 0), (4, 3), (8, 2), (8, 6), (16, 0), (16, 6)]
)
def test_decode_rejects_any_png_without_its_last_byte(
    bits: int, color_type: int, interlaced: bool
) -> None:
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[color_type]
    palette = png_chunk(b"PLTE", bytes(48))
    for height, width in ((1, 1), (3, 5), (9, 13)):
        # A black image, whose pixels are those of missing rows.
        encoded = encode_png(
            np.zeros((height, width, channels), np.uint16),
            bits,
            color_type,
            palette,
            interlaced=interlaced,
        )
        np.testing.assert_array_equal(decode(encoded), np.zeros((height, width, 3), np.uint8))
        rows = zlib.decompress(dict(png_chunks(encoded))[b"IDAT"])
        with pytest.raises(BadImageError):
            decode(with_image_data(encoded, zlib.compress(rows[:-1])))


@pytest.mark.parametrize("interlaced", [False, True])
def test_decode_interlaced_png_equals_the_original(interlaced: bool) -> None:
    for height, width in ((1, 1), (2, 3), (5, 4), (20, 30)):
        encoded = encode_png(noise(height, width), 8, 2, interlaced=interlaced)
        np.testing.assert_array_equal(decode(encoded), noise(height, width))


def test_decode_rejects_png_with_a_wrong_checksum() -> None:
    for offset in range(8, len(PNG), 7):
        damaged = bytearray(PNG)
        damaged[offset] ^= 1
        with pytest.raises(BadImageError):
            decode(bytes(damaged))


def test_decode_ignores_wrong_checksums_of_optional_chunks() -> None:
    chunk = png_chunk(b"tEXt", b"Comment\0text")[:-1] + b"?"
    np.testing.assert_array_equal(decode(PNG[:33] + chunk + PNG[33:]), noise(20, 30))


def test_decode_rejects_png_without_palette_or_end() -> None:
    palette = encode_png(noise(3, 4)[..., :1], 8, 3, png_chunk(b"PLTE", bytes(768)))
    assert decode(palette).shape == (3, 4, 3)
    with raises(BadImageError, "palette", "PNG"):
        decode(encode_png(noise(3, 4)[..., :1], 8, 3))
    with raises(BadImageError, "end", "PNG"):
        decode(PNG[:-12])


def test_decode_accepts_png_of_several_data_chunks_and_bytes_after_the_end() -> None:
    chunks = png_chunks(PNG)
    position = [kind for kind, _ in chunks].index(b"IDAT")
    split = [(b"IDAT", IMAGE_DATA[:9]), (b"IDAT", b""), (b"IDAT", IMAGE_DATA[9:])]
    several = join_png([*chunks[:position], *split, *chunks[position + 1 :]])
    np.testing.assert_array_equal(decode(several + b"tail"), noise(20, 30))


def test_decode_rejects_apple_png_by_name() -> None:
    chunks = [(b"CgBI", b"\x50\x00\x20\x02"), *png_chunks(PNG)]
    with raises(BadImageError, "CgBI", "pngcrush"):
        decode(join_png(chunks))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP", "AVIF", "TGA", "JPEG2000"])
def test_decode_drops_alpha_without_multiplying_by_it(file_format: str) -> None:
    alpha = np.tile(np.arange(32, dtype=np.uint8) * 8 + 7, (16, 1))
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    encoded = encode(np.dstack([smooth(16, 32), alpha]), file_format, "RGBA", **options)
    difference = decode(encoded).astype(int) - smooth(16, 32)
    assert np.abs(difference).mean() < (8 if file_format == "AVIF" else 0.1)


def encode_tiff(samples: np.ndarray, endian: str) -> bytes:
    """Encodes an uncompressed TIFF of any sample type."""
    height, width = samples.shape[:2]
    channels = samples.shape[2] if samples.ndim == 3 else 1
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    data = samples.astype(samples.dtype.newbyteorder("<" if endian == "<" else ">")).tobytes()
    # Arrays of more than 4 bytes are stored after the 11 entries.
    arrays = 8 + 2 + 11 * 12 + 4
    bits = struct.pack(f"{endian}{channels}H", *[8 * samples.itemsize] * channels)
    kinds = struct.pack(f"{endian}{channels}H", *[kind] * channels)
    start = arrays + len(bits) + len(kinds)

    def entry(tag: int, value: int | bytes, position: int = 0) -> bytes:
        if isinstance(value, int):
            return struct.pack(endian + "HHII", tag, 4, 1, value)
        field = struct.pack(endian + "I", position) if len(value) > 4 else value.ljust(4, b"\0")
        return struct.pack(endian + "HHI", tag, 3, len(value) // 2) + field

    entries = [
        entry(256, width),
        entry(257, height),
        entry(258, bits, arrays),
        entry(259, 1),
        entry(262, 2 if channels > 1 else 1),
        entry(273, start),
        entry(277, channels),
        entry(278, height),
        entry(279, len(data)),
        entry(284, 1),
        entry(339, kinds, arrays + len(bits)),
    ]
    magic = b"II" if endian == "<" else b"MM"
    header = magic + struct.pack(endian + "HIH", 42, 8, len(entries))
    return header + b"".join(entries) + b"\0" * 4 + bits + kinds + data


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 3)])
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "u4", "i1", "i2", "i4"])
def test_decode_rejects_tiff_samples_without_a_defined_range_by_name(
    dtype: str, shape: tuple[int, ...], endian: str
) -> None:
    samples = np.linspace(0, 1, int(np.prod(shape))).reshape(shape).astype(dtype)
    name = {"f": "floating-point", "u": "unsigned", "i": "signed"}[dtype[0]]
    with raises(BadImageError, "TIFF", name, str(8 * int(dtype[1])), "8 or 16 bits"):
        decode(encode_tiff(samples, endian))


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_decode_reads_tiff_of_8_and_16_bits(dtype: str, endian: str) -> None:
    image = noise(6, 7)
    scale = 257 if dtype == "u2" else 1
    for samples in (image, image[..., 0]):
        decoded = decode(encode_tiff(samples.astype(dtype) * np.dtype(dtype).type(scale), endian))
        expected = samples if samples.ndim == 3 else np.repeat(samples[..., None], 3, axis=2)
        np.testing.assert_array_equal(decoded, expected)


def test_decode_rejects_tiff_whose_strips_are_missing() -> None:
    encoded = encode_tiff(noise(6, 7), "<")
    rows_per_strip = struct.pack("<HHII", 278, 4, 1, 6)
    assert rows_per_strip in encoded
    with raises(BadImageError, "TIFF"):
        decode(encoded.replace(rows_per_strip, struct.pack("<HHII", 278, 4, 1, 2)))


def test_decode_writes_nothing_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for name, encoded in files_of_all_formats().items():
        for _ in range(20 if name.startswith("TIFF") else 2):
            damaged = bytearray(encoded)
            damaged[int(rng.integers(len(encoded)))] ^= int(rng.integers(1, 256))
            with contextlib.suppress(BadImageError):
                decode(bytes(damaged))
    assert capfd.readouterr() == ("", "")


HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(40)


def test_decode_names_heic_and_the_package_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with raises(BadImageError, "HEIC", "pip install pillow-heif"):
        decode(HEIC)


def test_decode_reads_heic_with_pillow_heif() -> None:
    pytest.importorskip("pillow_heif")
    encoded = encode_heic(smooth(32, 48), quality=100)
    assert np.abs(decode(encoded).astype(int) - smooth(32, 48)).mean() < 8
    with pytest.raises(BadImageError):
        decode(HEIC)


@pytest.mark.parametrize(
    ("encoded", "name"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Not found</body></html>", "web page"),
        (b'<?xml version="1.0"?><svg/>', "SVG"),
        (b"%PDF-1.7", "PDF"),
        (b"PK\x03\x04" + bytes(40), "ZIP"),
        (b"8BPS" + bytes(40), "Photoshop"),
        (b"\xff\x0a" + bytes(40), "JPEG XL"),
        (b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a" + bytes(40), "JPEG XL"),
        (b"#?RADIANCE\n", "floating-point"),
        (b"v/1\x01" + bytes(40), "floating-point"),
        (b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isommp41" + bytes(40), "video"),
    ],
)
def test_decode_names_files_that_are_not_images(encoded: bytes, name: str) -> None:
    with raises(BadImageError, name):
        decode(encoded)


DOCUMENTATION = (Path(__file__).parents[2] / "docs" / "reference" / "image_formats.md").read_text()
TABLE = {
    row[0]: row[1:]
    for row in (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in DOCUMENTATION.splitlines()
        if line.startswith("|")
    )
    if row[0] not in ("format", "---")
}


def test_documentation_lists_the_formats_that_are_read() -> None:
    pytest.importorskip("pillow_heif")
    read = {name for name, (_, _, read, _) in TABLE.items() if read}
    for name in files_of_all_formats():
        # The longest name of a format, so that JPEG 2000 is not a JPEG.
        found = max((row for row in read if name.startswith(row)), key=len, default="")
        assert found, f"{name} is not documented"
    for row in read:
        assert any(name.startswith(row) for name in files_of_all_formats()), f"{row} is not tested"


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row[1]])
def test_documentation_says_where_the_orientation_is_applied(name: str) -> None:
    files = files_of_all_formats()
    rule = TABLE[name][1]
    assert rule in ("ignored", "if requested", "always")
    if name == "HEIC":
        pytest.importorskip("pillow_heif")
    if rule == "ignored":
        assert f"{name} orientation" not in files
        return
    encoded = files[f"{name} orientation"]
    shapes = [decode(encoded, exif_orientation=turn).shape for turn in (False, True)]
    stored, upright = (18, 22, 3), (22, 18, 3)
    assert shapes == [upright if rule == "always" else stored, upright]


def test_documentation_lists_the_file_names_of_images() -> None:
    documented = {suffix for row in TABLE.values() for suffix in row[0].split()}
    assert all(has_image_suffix(f"image{suffix.upper()}") for suffix in documented)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    for characters in itertools.product(letters, repeat=3):
        suffix = "." + "".join(characters)
        assert has_image_suffix(f"image{suffix}") == (suffix in documented), suffix


def test_documentation_names_the_limit_of_pixels() -> None:
    assert f"{MAX_PIXELS:,} pixels" in " ".join(DOCUMENTATION.split())


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
