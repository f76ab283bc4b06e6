"""From the bytes of an image file to the uint8 image the model sees (Section 3, Appendix B).

Pixels leave here as uint8, a quarter of the bytes of float32 on the way to the device; the jitted
step maps them to [-1, 1].
"""

import functools
import math
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from mixer_jax.data.decode import Box, check_image_area, decode
from mixer_jax.data.randaugment import rand_augment

# The evaluation crop: resize to 256 for a crop of 224, and in proportion for other sizes.
_RESIZE, _CROP = 256, 224
# Evaluation crops with Pillow's filters, which timm's transforms call by these names.
_TIMM_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Inception crop: aspect ratios, and how often to draw before falling back to the centre.
_ASPECTS = (3 / 4, 4 / 3)
_LOG_ASPECTS = (math.log(_ASPECTS[0]), math.log(_ASPECTS[1]))
_TRIES = 10


def train_image(
    encoded: bytes,
    rng: np.random.Generator,
    *,
    image_size: int,
    train_crop: str,
    min_area: float,
    max_shift: int,
    flip: bool,
    randaugment_layers: int,
    randaugment_magnitude: float,
    exif_orientation: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decodes, crops at random, flips and augments one training image.

    Args:
        encoded: the bytes of an image file.
        rng: the only source of randomness.
        image_size: side of the result, pixels.
        train_crop: "inception", "random_crop", "random_shift" or "resize".
        min_area: of the inception crop, share of the image's area.
        max_shift: of the shift crop, pixels of the result.
        flip: whether half of the images are mirrored left to right.
        randaugment_layers: RandAugment operations an image; 0 is none.
        randaugment_magnitude: on the scale 0-10.
        exif_orientation: as `decode` takes it.
        out: uint8 (image_size, image_size, 3) to put the result into; None: a new array.

    Returns:
        uint8 RGB (image_size, image_size, 3), `out` if it is given.

    Raises:
        BadImageError: as `decode`; the contents of `out` are then unspecified.
    """
    if out is None:
        out = np.empty((image_size, image_size, 3), np.uint8)
    box = functools.partial(sample_inception_crop, rng=rng, min_area=min_area)
    image = decode(
        encoded, box if train_crop == "inception" else None, exif_orientation=exif_orientation
    )
    if train_crop == "random_crop":
        image = random_crop(image, rng, image_size)
    else:
        image = resize(image, image_size, image_size, out)
    if train_crop == "random_shift":
        image = random_shift(image, rng, max_shift)
    if flip and rng.random() < 0.5:
        image = cv2.flip(image, 1)
    if randaugment_layers:
        image = rand_augment(
            image, rng, num_layers=randaugment_layers, magnitude=randaugment_magnitude
        )
    if image is not out:
        out[...] = image
    return out


def eval_image(
    encoded: bytes,
    *,
    image_size: tuple[int, int],
    eval_crop: str,
    exif_orientation: bool = False,
) -> np.ndarray:
    """Decodes one image and takes the paper's evaluation crop, or timm's.

    Args:
        encoded: the bytes of an image file.
        image_size: height and width of the result, pixels.
        eval_crop: "shorter_side" resizes the image by area, keeping its aspect, until it just
            covers 8/7 of the result's height and width, and crops the centre (Table 3: its shorter
            side to 256 for 224); "square" resizes each side to 8/7 of the result's (Table 2);
            "bicubic" and "bilinear" are as "shorter_side" with Pillow's decoder and filters, as
            timm evaluates the weights it publishes (crop 0.875); "resize" crops nothing.
        exif_orientation: as `decode` takes it.

    Returns:
        uint8 RGB (height, width, 3).

    Raises:
        BadImageError: as `decode`; or the image is so long that it would have too many pixels when
            it is resized.
    """
    as_timm = eval_crop in _TIMM_FILTERS
    image = decode(encoded, exif_orientation=exif_orientation, accurate=as_timm)
    if eval_crop == "resize":
        return np.ascontiguousarray(resize(image, *image_size))
    if as_timm:
        height, width = _cover(image, [side * _RESIZE // _CROP for side in image_size], math.floor)
        # OpenCV's filters would not average over the pixels they leave out.
        resized = Image.fromarray(image).resize((width, height), _TIMM_FILTERS[eval_crop])
        image = np.asarray(resized)
    else:
        sides = [_before_crop(side) for side in image_size]
        if eval_crop == "shorter_side":
            sides = _cover(image, sides, round)
        image = resize_area(image, *sides)
    margins = (side - kept for side, kept in zip(image.shape, image_size, strict=False))
    # timm rounds half a pixel to even where the authors' code rounds down.
    top, left = (round(m / 2) if as_timm else m // 2 for m in margins)
    height, width = image_size
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def _before_crop(side: int) -> int:
    return round(side * _RESIZE / _CROP)


def _cover(image: np.ndarray, wanted: list[int], whole: Callable[[float], int]) -> list[int]:
    """Returns height and width of an image just large enough to cover those wanted.

    Args:
        image: whose aspect is kept.
        wanted: height and width, pixels; one of them is met exactly.
        whole: how the other one becomes a whole number.

    Raises:
        BadImageError: too many pixels.
    """
    sides = image.shape[:2]
    grown, side = max(zip(wanted, sides, strict=True), key=lambda pair: pair[0] / pair[1])
    height, width = (whole(length * grown / side) for length in sides)
    check_image_area(height, width)
    return [height, width]


def resize(image: np.ndarray, height: int, width: int, out: np.ndarray | None = None) -> np.ndarray:
    """Resizes by linear interpolation, without antialiasing; into `out`, if it is given.

    An image that has this size already is returned as it is.
    """
    if image.shape[:2] == (height, width):
        return image
    return cv2.resize(image, (width, height), dst=out, interpolation=cv2.INTER_LINEAR)


def resize_area(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes so that every pixel is the mean of the area it covers."""
    rows, columns = image.shape[:2]
    # OpenCV averages over areas only where no side grows, so that those that shrink go first.
    if height < rows or width < columns:
        smaller = (min(width, columns), min(height, rows))
        image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    if height > rows or width > columns:
        # A hair less than the ratio: where edges of pixels coincide, rounding could otherwise take
        # the neighbour.
        ratios = (height / rows, width / columns)
        fy, fx = (ratio * (1 - 1e-9) if ratio > 1 else 1.0 for ratio in ratios)
        image = cv2.resize(image, None, fx=fx, fy=fy, interpolation=cv2.INTER_AREA)
    return image


def sample_inception_crop(
    height: int, width: int, rng: np.random.Generator, min_area: float
) -> Box:
    """Draws a part with area in [min_area, 1] of the image's and aspect in [3/4, 4/3].

    Ten draws that do not fit the image are followed by its centre: the largest part of it whose
    aspect is in that range.

    Args:
        height: of the image, pixels.
        width: likewise.
        rng: the only source of randomness.
        min_area: share of the image's area.
    """
    low, high = _LOG_ASPECTS
    for _ in range(_TRIES):
        # What rng.uniform does, in a third of the time.
        aspect = math.exp(low + (high - low) * rng.random())
        area = (min_area + (1.0 - min_area) * rng.random()) * height * width
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return top, left, box_height, box_width
    narrowest, widest = _ASPECTS
    box_height = min(height, max(1, round(width / narrowest)))
    box_width = min(width, max(1, round(height * widest)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_crop(image: np.ndarray, rng: np.random.Generator, image_size: int) -> np.ndarray:
    """Resizes both sides to 8/7 of `image_size` by area and takes a part of that size anywhere.

    The training crop of fine-tuning, which knows no Inception crop (Section 3; arXiv 2010.11929,
    B.1.1).
    """
    side = _before_crop(image_size)
    top, left = rng.integers(side - image_size + 1, size=2)
    image = resize_area(image, side, side)
    return image[top : top + image_size, left : left + image_size]


def random_shift(image: np.ndarray, rng: np.random.Generator, max_shift: int) -> np.ndarray:
    """Moves the image by up to `max_shift` pixels along both axes; black comes in at the edge."""
    dy, dx = rng.integers(-max_shift, max_shift + 1, size=2)
    height, width = image.shape[:2]
    padded = cv2.copyMakeBorder(image, *(max_shift,) * 4, cv2.BORDER_CONSTANT)
    top, left = max_shift + dy, max_shift + dx
    return padded[top : top + height, left : left + width]
