"""Tests of decoding: every kind of file comes out as RGB or is refused, parts equal the whole."""

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
from tests.helpers.images import encode, noise, photograph, png_that_claims, smooth, turned
from tests.helpers.messages import raises


def by_pillow(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def part(box: Box) -> Callable[[int, int], Box]:
    return lambda height, width: box


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "LA", "RGBA"])
def test_png_decodes_as_pillow_does(mode: str) -> None:
    image = np.dstack([noise(7, 9), np.arange(63, dtype=np.uint8).reshape(7, 9)])
    encoded = io.BytesIO()
    # A palette has its transparency tested below.
    whole = Image.fromarray(image[..., :3] if mode == "P" else image)
    whole.convert(mode).save(encoded, "PNG")
    np.testing.assert_array_equal(decode(encoded.getvalue()), by_pillow(encoded.getvalue()))


def test_a_palette_with_a_transparent_colour() -> None:
    encoded = io.BytesIO()
    Image.fromarray(smooth(9, 9)).quantize(4).save(encoded, "PNG", transparency=2)
    np.testing.assert_array_equal(decode(encoded.getvalue()), by_pillow(encoded.getvalue()))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_become_the_higher_eight(suffix: str, channels: int) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 2**16, (8, 9, channels), np.uint16)
    decoded = decode(cv2.imencode(suffix, image)[1].tobytes())
    # OpenCV rounds those of colour in TIFF.
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


@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_decodes_as_pillow_does(kind: str) -> None:
    decoded = decode(JPEGS[kind], accurate=True)
    assert decoded.dtype == np.uint8
    difference = np.abs(decoded.astype(int) - by_pillow(JPEGS[kind]))
    # The same library is below; of CMYK there is no one way to RGB.
    assert difference.max() == 0 if "CMYK" not in kind else difference.mean() < 2


@pytest.mark.parametrize("accurate", [False, True])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_part_equals_that_part_of_the_whole(kind: str, accurate: bool) -> None:
    whole, rng = decode(JPEGS[kind], accurate=accurate), np.random.default_rng(0)
    # Every last row, so that each comes to lie at every place among the rows of blocks.
    for bottom in range(1, 121):
        top, left = int(rng.integers(bottom)), int(rng.integers(149))
        width = int(rng.integers(1, 151 - left))
        found = decode(JPEGS[kind], part((top, left, bottom - top, width)), accurate=accurate)
        np.testing.assert_array_equal(found, whole[top:bottom, left : left + width])


def test_the_box_is_chosen_from_the_size() -> None:
    seen = []

    def choose(height: int, width: int) -> Box:
        seen.append((height, width))
        return 1, 2, 3, 4

    for encoded in (encode(noise(20, 30), "PNG"), encode(noise(20, 30), "JPEG")):
        assert decode(encoded, choose).shape == (3, 4, 3)
    assert seen == [(20, 30)] * 2


@pytest.mark.parametrize("file_format", ["GIF", "BMP", "WEBP", "TIFF", "PPM", "ICO", "PCX"])
def test_other_formats(file_format: str) -> None:
    options: dict[str, Any] = {"lossless": True} if file_format == "WEBP" else {}
    encoded = encode(noise(16, 16), file_format, **options)
    np.testing.assert_array_equal(decode(encoded), by_pillow(encoded))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_ignored_unless_wanted(orientation: int) -> None:
    upright, encoded = decode(turned(smooth(16, 32), 1)), turned(smooth(16, 32), orientation)
    np.testing.assert_array_equal(decode(encoded), upright)
    # What each of the eight says must be done to the image (EXIF 2.3, tag 274).
    done = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[:, ::-1],
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[::-1],
    }[orientation]
    np.testing.assert_array_equal(decode(encoded, exif_orientation=True), done)
    height, width = done.shape[:2]
    box = (1, 2, height - 3, width - 4)
    corner = decode(encoded, part(box), exif_orientation=True)
    np.testing.assert_array_equal(corner, done[1 : height - 2, 2 : width - 2])


PHOTO = encode(photograph(), "JPEG", quality=90)
WITH_THUMBNAIL = PHOTO[:2] + b"\xff\xe1\x00\x0cExif\xff\xd8ab\xff\xd9" + PHOTO[2:]
BMP = encode(noise(2, 2), "BMP")
# An example of each reason, by a name of its own.
CAUSES = {
    "empty": b"",
    "unknown": b"not an image",
    "damaged": png_that_claims(9, 9),
    "too large": png_that_claims(60_000, 60_000),
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
    "broken PNG": (png_that_claims(9, 9), "damaged"),
    "large PNG": (png_that_claims(10**4, 10**4), "too large"),
    "huge PNG": (png_that_claims(60_000, 60_000), "too large"),
    "large BMP": (BMP[:18] + (10**4).to_bytes(4, "little") * 2 + BMP[26:], "too large"),
    "start of a JPEG": (b"\xff\xd8\xff\xe0", "incomplete"),
    "JPEG without end": (WITH_THUMBNAIL[:-2], "incomplete"),
    **{f"JPEG of {n} tenths": (PHOTO[: len(PHOTO) * n // 10], "incomplete") for n in range(1, 10)},
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("exif_orientation", [False, True])
def test_what_is_no_whole_image_is_refused(kind: str, exif_orientation: bool) -> None:
    encoded, cause = BAD[kind]
    with pytest.raises(BadImageError) as caught:
        decode(encoded, exif_orientation=exif_orientation)
    assert caught.value.reason == reason_of(CAUSES[cause])
    assert caught.value.reason in str(caught.value)
    # Reasons are counted, so that they must not differ from image to image.
    assert not any(character.isdigit() for character in caught.value.reason)


def test_every_cause_has_a_reason_of_its_own() -> None:
    assert len({reason_of(encoded) for encoded in CAUSES.values()}) == len(CAUSES)


def test_a_thumbnail_is_not_taken_for_the_end_nor_for_the_image() -> None:
    np.testing.assert_array_equal(decode(WITH_THUMBNAIL), decode(PHOTO))


@pytest.mark.parametrize("tail", [b"\0" * 99, b"camera data", PHOTO[:500]])
def test_what_follows_a_jpeg_does_no_harm(tail: bytes) -> None:
    np.testing.assert_array_equal(decode(PHOTO + tail), decode(PHOTO))


def test_stray_bytes_are_forgiven_as_elsewhere() -> None:
    start_of_scan = PHOTO.index(b"\xff\xda")
    stray = PHOTO[:start_of_scan] + b"\xff\xff" + PHOTO[start_of_scan:]
    np.testing.assert_array_equal(decode(stray), decode(PHOTO))


def test_a_frame_of_no_height_is_refused_and_nothing_crashes() -> None:
    at = PHOTO.index(b"\xff\xc0") + 5
    with pytest.raises(BadImageError):
        decode(PHOTO[:at] + b"\0\0" + PHOTO[at + 2 :])


def test_any_byte_may_be_wrong() -> None:
    rng = np.random.default_rng(0)
    refused = 0
    small = encode(smooth(24, 32), "JPEG")
    for at in range(len(small)):
        wrong = bytearray(small)
        wrong[at] ^= int(rng.integers(1, 256))
        try:
            assert decode(bytes(wrong)).ndim == 3
        except BadImageError:
            refused += 1
    assert 0 < refused < len(small)


def test_a_bomb_is_refused_before_it_goes_off() -> None:
    tracemalloc.start()
    with raises(BadImageError, "20000") as caught:
        decode(png_that_claims(20_000, 20_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Decoded, it would be 1.2 GB.
    assert peak < 10**6
    assert caught.value.reason == reason_of(CAUSES["too large"])


def test_the_largest_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixer_jax.data.decode.MAX_PIXELS", 20 * 30)
    assert decode(encode(noise(20, 30), "JPEG")).shape == (20, 30, 3)
    too_large: list[Any] = [encode(noise(20, 31), kind) for kind in ("JPEG", "PNG", "GIF")]
    for encoded in too_large:
        with raises(BadImageError, "31", "20"):
            decode(encoded)
