"""From the bytes of an image file to the uint8 image the model sees (Section 3, Appendix B).

Pixels leave here as uint8, a quarter of the bytes of float32 on the way to the device; the jitted
step maps them to [-1, 1].
"""

import math

import cv2
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from mixer_jax.data.randaugment import rand_augment

# The evaluation crop: resize to 256 for a crop of 224, and in proportion for other sizes.
RESIZE_RATIO = 256 / 224
# Inception crop: aspect ratios, and how often to draw before falling back to the whole image.
_ASPECTS = (3 / 4, 4 / 3)
_TRIES = 10


def decode(encoded: bytes) -> np.ndarray:
    """Returns the image of a file's bytes as uint8 RGB (h, w, 3); EXIF orientation is ignored.

    Raises:
        ValueError: the bytes are no image that OpenCV can read.
    """
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:  # No bytes at all, or more pixels than it agrees to hold.
        image = None
    if image is None:
        raise ValueError(f"{len(encoded)} bytes that are no readable image")
    return image


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
) -> np.ndarray:
    """Decodes, crops at random, flips and augments one training image.

    Args:
        encoded: the bytes of an image file.
        rng: the only source of randomness.
        image_size: side of the result, pixels.
        train_crop: "inception", "shift" or "resize".
        min_area: of the inception crop, share of the image's area.
        max_shift: of the shift crop, pixels of the result.
        flip: whether half of the images are mirrored left to right.
        randaugment_layers: RandAugment operations an image; 0 is none.
        randaugment_magnitude: on the scale 0-10.

    Returns:
        uint8 RGB (image_size, image_size, 3).
    """
    image = decode(encoded)
    if train_crop == "inception":
        image = resize(inception_crop(image, rng, min_area), image_size, image_size)
    else:
        image = resize(image, image_size, image_size)
        if train_crop == "shift":
            image = shift(image, rng, max_shift)
    if flip and rng.random() < 0.5:
        image = image[:, ::-1]
    if randaugment_layers:
        image = rand_augment(
            image, rng, num_layers=randaugment_layers, magnitude=randaugment_magnitude
        )
    return np.ascontiguousarray(image)


def eval_image(encoded: bytes, *, image_size: int, eval_crop: str) -> np.ndarray:
    """Decodes one image and takes the paper's evaluation crop.

    Args:
        encoded: the bytes of an image file.
        image_size: side of the result, pixels.
        eval_crop: "shorter_side" resizes that side to 8/7 of the result and crops the centre
            (Table 3); "square" resizes both sides to it (Table 2); "whole" crops nothing.

    Returns:
        uint8 RGB (image_size, image_size, 3).
    """
    image = decode(encoded)
    if eval_crop == "whole":
        return resize(image, image_size, image_size)
    height, width = image.shape[:2]
    side = round(image_size * RESIZE_RATIO)
    if eval_crop == "square":
        image = resize(image, side, side, cv2.INTER_AREA)
    else:
        scale = side / min(height, width)
        image = resize(
            image, max(side, round(height * scale)), max(side, round(width * scale)), cv2.INTER_AREA
        )
    top, left = (image.shape[0] - image_size) // 2, (image.shape[1] - image_size) // 2
    return np.ascontiguousarray(image[top : top + image_size, left : left + image_size])


def resize(
    image: np.ndarray, height: int, width: int, interpolation: int = cv2.INTER_LINEAR
) -> np.ndarray:
    """Resizes without antialiasing unless `interpolation` is by area, which averages."""
    if image.shape[:2] == (height, width):
        return image
    return cv2.resize(image, (width, height), interpolation=interpolation)


def inception_crop(image: np.ndarray, rng: np.random.Generator, min_area: float) -> np.ndarray:
    """Returns a random part with area in [min_area, 1] of the image's and aspect in [3/4, 4/3].

    Ten draws that do not fit the image are followed by the whole image.
    """
    height, width = image.shape[:2]
    for _ in range(_TRIES):
        aspect = math.exp(rng.uniform(*np.log(_ASPECTS)))
        area = rng.uniform(min_area, 1.0) * height * width
        crop_height, crop_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = rng.integers(height - crop_height + 1)
            left = rng.integers(width - crop_width + 1)
            return image[top : top + crop_height, left : left + crop_width]
    return image


def shift(image: np.ndarray, rng: np.random.Generator, max_shift: int) -> np.ndarray:
    """Moves the image by up to `max_shift` pixels along both axes; black comes in at the edge."""
    dy, dx = rng.integers(-max_shift, max_shift + 1, size=2)
    height, width = image.shape[:2]
    padded = cv2.copyMakeBorder(image, *(max_shift,) * 4, cv2.BORDER_CONSTANT)
    top, left = max_shift + dy, max_shift + dx
    return padded[top : top + height, left : left + width]


def to_model_range(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Maps pixels 0…255 to [-1, 1], on the device."""
    return images.astype(jnp.float32) / 127.5 - 1.0
