"""Images as Python programs have them: paths, bytes, Pillow images and arrays."""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mixer_jax.data.decode import convert_image
from mixer_jax.data.image_files import NamedImage, display_path, read_image
from mixer_jax.errors import UserError

# Display name of an image, and a function that returns its pixels, uint8 RGB (height, width, 3).
NamedPixels = tuple[str, Callable[[], np.ndarray]]

_ENCODED = (bytes, bytearray, memoryview)
_SINGLE = (str, os.PathLike, *_ENCODED, Image.Image)
_TYPES = "a path, bytes, a Pillow image or an array of uint8 levels"


def name_images(images: Any, exif_orientation: bool) -> list[NamedImage | NamedPixels]:
    """Names images, and checks arrays.

    Args:
        images: One image or several; see `Classifier.predict`.
        exif_orientation: Whether Pillow images are rotated by their EXIF orientation.

    Raises:
        UserError: Images have another type, dtype or shape.
    """
    if isinstance(images, _SINGLE):
        images = [images]
    elif hasattr(images, "__array__"):
        array = np.asarray(images)
        # Arrays of numbers are images; others are sequences of paths or of bytes.
        if array.dtype.kind not in "OSU":
            images = list(array) if array.ndim == 4 else [array]
            if array.ndim == 4:
                _check_array(array, "images")
    elif isinstance(images, dict) or not isinstance(images, Sequence):
        try:
            images = None if isinstance(images, dict) else list(images)
        except TypeError:
            images = None
        if images is None:
            raise UserError(f"images must be a sequence of images, each {_TYPES}.")
    lock = threading.Lock()
    return [_name(index, image, exif_orientation, lock) for index, image in enumerate(images)]


def _name(
    index: int, image: Any, exif_orientation: bool, lock: threading.Lock
) -> NamedImage | NamedPixels:
    name = f"image {index}"
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        return display_path(path), functools.partial(read_image, path)
    if isinstance(image, _ENCODED):
        return name, functools.partial(bytes, image)
    if isinstance(image, Image.Image):
        name = display_path(getattr(image, "filename", "") or name)
        return name, functools.partial(_convert, image, exif_orientation, lock)
    if not hasattr(image, "__array__"):
        raise UserError(f"{name} must be {_TYPES}, got {type(image).__name__}.")
    array = np.asarray(image)
    if array.ndim == 4:
        raise UserError(
            f"{name} must have 2 or 3 axes, got shape {array.shape}. Pass a batch without a list."
        )
    _check_array(array, name)
    return name, functools.partial(_to_rgb, array)


def _convert(image: Image.Image, exif_orientation: bool, lock: threading.Lock) -> np.ndarray:
    # The same image can be there twice, and Pillow must not read it in two threads.
    with lock:
        return convert_image(image, exif_orientation=exif_orientation)


def _check_array(array: np.ndarray, name: str) -> None:
    """Raises UserError unless an array is an image or a batch of images."""
    if array.dtype != np.uint8:
        raise UserError(
            f"{name} must have uint8 levels, got {array.dtype}. Convert pixels in [0, 1] by "
            "(255 * pixels).round().astype('uint8'). Call the classifier with those in [-1, 1]."
        )
    if array.ndim != 2 and (array.ndim not in (3, 4) or array.shape[-1] not in (1, 3, 4)):
        raise UserError(
            f"{name} must have shape (height, width, 3), or (n, height, width, 3) for several, got "
            f"{array.shape}. Channels come last."
        )
    if 0 in (array.shape[1:3] if array.ndim == 4 else array.shape[:2]):
        raise UserError(f"{name} must not be empty, got shape {array.shape}.")


def _to_rgb(array: np.ndarray) -> np.ndarray:
    array = array[..., None] if array.ndim == 2 else array
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[..., :3]
