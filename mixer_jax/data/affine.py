"""Rotations and shears of images, with every pixel taken from where Pillow takes it."""

import functools
import math

import cv2
import numpy as np


def gather_pixels(image: np.ndarray, sources: np.ndarray, fill: int) -> np.ndarray:
    """Returns an image made of the pixels of another.

    Args:
        image: uint8 RGB (height, width, 3).
        sources: where each pixel comes from, as the functions below tell.
        fill: value of the pixels that come from outside of the image.
    """
    height, width = image.shape[:2]
    # Pixels of four bytes are taken in one piece, which is several times faster.
    pixels = np.empty((height * width + 1, 4), np.uint8)
    cv2.cvtColor(image, cv2.COLOR_RGB2RGBA, dst=pixels[:-1].reshape(height, width, 4))
    pixels[-1] = fill
    # All sources are in range, and "wrap" is faster than the default, which checks them.
    taken = pixels.view(np.int32)[:, 0].take(sources, mode="wrap")
    return cv2.cvtColor(taken.view(np.uint8).reshape(height, width, 4), cv2.COLOR_RGBA2RGB)


# Of one size of images and one magnitude there are two rotations, by sign, and four shears.
@functools.lru_cache(maxsize=4)
def rotation_source_coords(height: int, width: int, degrees: float) -> np.ndarray:
    """Returns where pixels come from when an image is rotated about its centre.

    Args:
        height: of the image and the result, pixels.
        width: likewise.
        degrees: anticlockwise.

    Returns:
        int64 (height, width): the number of the source when pixels are counted row by row, and
        height * width where it lies outside of the image. Read-only, as all callers share it.
    """
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # From the centre of a pixel of the result to its source, both from the centre of the image.
    x, y = (1 - width) / 2, (1 - height) / 2
    start_x, start_y = cosine * x - sine * y + width / 2, sine * x + cosine * y + height / 2
    return _source_coords(height, width, (cosine, -sine, start_x), (sine, cosine, start_y))


@functools.lru_cache(maxsize=8)
def shear_source_coords(height: int, width: int, slope_x: float, slope_y: float) -> np.ndarray:
    """Returns where pixels come from when an image is sheared, with its upper left corner fixed.

    Args:
        height: of the image and the result, pixels.
        width: likewise.
        slope_x: pixels to the right that a source lies further in every next row.
        slope_y: pixels down that a source lies further in every next column.

    Returns:
        As `rotation_source_coords`.
    """
    across = (1.0, slope_x, (1 + slope_x) / 2)
    return _source_coords(height, width, across, (slope_y, 1.0, (1 + slope_y) / 2))


def to_fixed_point(number: float) -> int:
    """Rounds to the 16.16 fixed point in which Pillow computes where a pixel comes from."""
    return math.floor(number * 65536 + 0.5)


def _source_coords(
    height: int, width: int, across: tuple[float, float, float], down: tuple[float, float, float]
) -> np.ndarray:
    """Returns the sources of an affine map.

    Args:
        height: of the image and the result, pixels.
        width: likewise.
        across: what a step along x, one along y and the upper left corner add to a source's x.
        down: likewise to its y.
    """
    x, y = np.arange(width), np.arange(height)[:, None]
    columns, rows = (
        (to_fixed_point(along_x) * x + to_fixed_point(along_y) * y + to_fixed_point(start)) >> 16
        for along_x, along_y, start in (across, down)
    )
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    sources = np.where(inside, rows * width + columns, height * width)
    sources.setflags(write=False)
    return sources
