"""Preprocessing of training and evaluation images (Section 3, Appendix B).

Images stay uint8 until they are on the device, since float32 would be four times as many bytes to
transfer; the jitted step maps them to [-1, 1].
"""

import functools
import math
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from mixer_jax.data.decode import Box, check_image_area, decode
from mixer_jax.data.permutation import PixelPermutation
from mixer_jax.data.randaugment import rand_augment

# Crop of 224 from 256 pixels, and in the same ratio for other sizes.
CROP_FRACTION = 224 / 256
# Evaluation crops of timm, which resizes with Pillow's filters.
_TIMM_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Range of aspect ratios (width by height) and number of attempts of TensorFlow's crop, and of
# torchvision's.
_INCEPTION_ASPECTS, _INCEPTION_ATTEMPTS = (0.75, 1.33), 100
_RESIZED_CROP_ASPECTS, _RESIZED_CROP_ATTEMPTS = (3 / 4, 4 / 3), 10
# Range of areas (fractions of the image's) and of aspect ratios (height by width), and number of
# attempts of random erasing in timm.
_ERASED_AREAS, _ERASED_ASPECTS, _ERASING_ATTEMPTS = (0.02, 1 / 3), (0.3, 1 / 0.3), 10
# Models see level v as v / 127.5 − 1: 127 and 128 are equally near to 0, and RandAugment fills with
# 128.
_ERASED_LEVEL = 128


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
    random_erasing: float = 0.0,
    random_erasing_mode: str = "constant",
    resize_size: int = 0,
    exif_orientation: bool = False,
    permutation: PixelPermutation | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decodes, randomly crops, flips, augments and erases one training image.

    Args:
        encoded: Bytes of one image file.
        rng: The only source of randomness.
        image_size: Side of the result, in pixels.
        train_crop: "inception", "random_resized_crop", "random_crop", "bilinear_crop",
            "random_shift" or "resize".
        min_area: Minimum area of the first two crops, as a fraction of the image's area.
        max_shift: Maximum shift of "random_shift", in pixels of the result.
        flip: Whether to flip half of the images horizontally.
        randaugment_layers: Number of RandAugment operations per image; 0 disables RandAugment.
        randaugment_magnitude: RandAugment magnitude, on a scale of 0 to 10.
        random_erasing: Probability of erasing a box of the image.
        random_erasing_mode: Fill of the box; see `erase_random_box`.
        resize_size: Height and width before "random_crop" and "bilinear_crop", in pixels; 0: 8/7 of
            `image_size`.
        exif_orientation: Whether to apply the EXIF orientation; see `decode`.
        permutation: Permutation of the pixels, applied last.
        out: Array for the result, uint8 (image_size, image_size, 3); None: a new array.

    Returns:
        uint8 RGB (image_size, image_size, 3); `out` if it is given.

    Raises:
        BadImageError: The image cannot be decoded. The contents of `out` are then undefined.
    """
    if out is None:
        out = np.empty((image_size, image_size, 3), np.uint8)
    sample_box = _BOX_SAMPLERS.get(train_crop)
    crop_fn = functools.partial(sample_box, rng=rng, min_area=min_area) if sample_box else None
    image = decode(encoded, crop_fn, exif_orientation=exif_orientation)
    if train_crop in _RESIZE_BEFORE_CROP:
        size = resize_size or _size_before_crop(image_size)
        image = random_crop(image, rng, image_size, size, _RESIZE_BEFORE_CROP[train_crop])
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
    if random_erasing and rng.random() < random_erasing:
        image = erase_random_box(image, rng, random_erasing_mode)
    if permutation is not None:
        image = permutation(image)
    if image is not out:
        out[...] = image
    return out


def eval_image(
    encoded: bytes,
    *,
    image_size: tuple[int, int],
    eval_crop: str,
    eval_crop_fraction: float = CROP_FRACTION,
    exif_orientation: bool = False,
    permutation: PixelPermutation | None = None,
) -> np.ndarray:
    """Decodes one evaluation image and takes the paper's or timm's evaluation crop.

    Args:
        encoded: Bytes of one image file.
        image_size: Height and width of the result, in pixels.
        eval_crop: Crop; see `crop_eval_image`.
        eval_crop_fraction: Its side, as a fraction of the resized image's.
        exif_orientation: Whether to apply the EXIF orientation; see `decode`.
        permutation: Permutation of the pixels, applied last.

    Returns:
        uint8 RGB (height, width, 3).

    Raises:
        BadImageError: The image cannot be decoded, or is so elongated that resizing it would take
            too many pixels.
    """
    image = decode(
        encoded, exif_orientation=exif_orientation, accurate_dct=eval_crop in _TIMM_FILTERS
    )
    return crop_eval_image(
        image,
        image_size=image_size,
        eval_crop=eval_crop,
        eval_crop_fraction=eval_crop_fraction,
        permutation=permutation,
    )


def crop_eval_image(
    image: np.ndarray,
    *,
    image_size: tuple[int, int],
    eval_crop: str,
    eval_crop_fraction: float = CROP_FRACTION,
    permutation: PixelPermutation | None = None,
) -> np.ndarray:
    """Takes the paper's or timm's evaluation crop of a decoded image, and permutes its pixels.

    Args:
        image: uint8 RGB (height, width, 3).
        image_size: Height and width of the result, in pixels.
        eval_crop: "shorter_side" resizes the image by area, keeping its aspect ratio, until it just
            covers the result's height and width divided by the fraction, and takes the center crop
            (Table 3: shorter side 256 for 224); "square" resizes height and width to the result's
            divided by the fraction (Table 2); "bicubic" and "bilinear" are like "shorter_side" with
            Pillow's decoder and filters, as timm evaluates its checkpoints; "resize" does not crop.
        eval_crop_fraction: Side of the crop, as a fraction of the resized image's (timm's
            crop_pct); without effect on "resize".
        permutation: Permutation of the pixels of the result.

    Returns:
        uint8 RGB (height, width, 3).

    Raises:
        BadImageError: The image is so elongated that resizing it would take too many pixels.
    """
    cropped = _crop_eval_image(image, image_size, eval_crop, eval_crop_fraction)
    return np.ascontiguousarray(cropped) if permutation is None else permutation(cropped)


def _crop_eval_image(
    image: np.ndarray, image_size: tuple[int, int], eval_crop: str, eval_crop_fraction: float
) -> np.ndarray:
    timm_style = eval_crop in _TIMM_FILTERS
    if eval_crop == "resize":
        return resize(image, *image_size)
    if timm_style:
        target = [math.floor(length / eval_crop_fraction) for length in image_size]
        height, width = _covering_size(image, target, math.floor)
        # OpenCV's bicubic and bilinear filters do not antialias.
        resized = Image.fromarray(image).resize((width, height), _TIMM_FILTERS[eval_crop])
        image = np.asarray(resized)
    else:
        target = [_size_before_crop(length, eval_crop_fraction) for length in image_size]
        if eval_crop == "shorter_side":
            target = _covering_size(image, target, round)
        image = resize_area(image, *target)
    margins = (length - crop for length, crop in zip(image.shape, image_size, strict=False))
    # timm rounds half a pixel to even; the authors' code rounds it down.
    top, left = (round(m / 2) if timm_style else m // 2 for m in margins)
    height, width = image_size
    return image[top : top + height, left : left + width]


def _size_before_crop(length: int, crop_fraction: float = CROP_FRACTION) -> int:
    return round(length / crop_fraction)


def _covering_size(
    image: np.ndarray, target: list[int], round_length: Callable[[float], int]
) -> list[int]:
    """Computes the smallest size with the image's aspect ratio that covers a target size.

    Args:
        image: Image (height, width, 3).
        target: Height and width to cover, in pixels; the result equals one of them.
        round_length: Function that rounds the other one to an integer.

    Raises:
        BadImageError: The result has too many pixels.
    """
    shape = image.shape[:2]
    new, old = max(zip(target, shape, strict=True), key=lambda pair: pair[0] / pair[1])
    height, width = (round_length(length * new / old) for length in shape)
    check_image_area(height, width)
    return [height, width]


def resize(image: np.ndarray, height: int, width: int, out: np.ndarray | None = None) -> np.ndarray:
    """Resizes by bilinear interpolation without antialiasing, into `out` if it is given.

    Interpolated levels are truncated to integers, as the authors do. Images of this size are
    returned unchanged.
    """
    if image.shape[:2] == (height, width):
        return image
    resized = cv2.resize(_widen(image), (width, height), interpolation=cv2.INTER_LINEAR)
    return _truncate(resized, out)


def resize_area(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes by area averaging: every pixel is the truncated mean of the area it covers."""
    rows, columns = image.shape[:2]
    if (rows, columns) == (height, width):
        return image
    image = _widen(image)
    # OpenCV averages areas only if neither axis is enlarged, so axes are reduced first.
    if height < rows or width < columns:
        smaller = (min(width, columns), min(height, rows))
        image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    if height > rows or width > columns:
        # Slightly less than the ratio: where old and new pixel edges coincide, a rounding error
        # would select the neighboring pixel.
        ratios = (height / rows, width / columns)
        fy, fx = (ratio * (1 - 1e-9) if ratio > 1 else 1.0 for ratio in ratios)
        image = cv2.resize(image, None, fx=fx, fy=fy, interpolation=cv2.INTER_AREA)
    return _truncate(image)


def _widen(image: np.ndarray) -> np.ndarray:
    """Converts uint8 levels to uint16 in steps of 1/256, since OpenCV rounds what it interpolates.

    Unlike float32, whose rounding errors could be truncated to the level below, it keeps areas of
    one color exact; it also takes half the memory.
    """
    wide = image.astype(np.uint16)
    wide <<= 8
    return wide


def _truncate(wide: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Truncates levels of `_widen` to uint8."""
    if out is None:
        out = np.empty(wide.shape, np.uint8)
    return np.right_shift(wide, 8, out=out, casting="unsafe")


def sample_inception_crop(
    height: int, width: int, rng: np.random.Generator, min_area: float
) -> Box:
    """Samples a box from the distribution of TensorFlow's `sample_distorted_bounding_box`.

    The aspect ratio is uniform in [0.75, 1.33]. Given it, the height is uniform among those for
    which the box fits into the image and covers at least `min_area`, so that small areas are more
    likely than large ones. After 100 samples that do not fit, takes the whole image.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        rng: The only source of randomness.
        min_area: Minimum area, as a fraction of the image's area; the maximum is 1.
    """
    min_pixels, max_pixels = min_area * height * width, height * width
    low, high = _INCEPTION_ASPECTS
    for _ in range(_INCEPTION_ATTEMPTS):
        # Equal to rng.uniform, in a third of the time.
        aspect = low + (high - low) * rng.random()
        widest = math.ceil((width + 0.5) / aspect) - 1
        max_height = min(height, round(math.sqrt(max_pixels / aspect)), widest)
        min_height = min(max_height, round(math.sqrt(min_pixels / aspect)))
        box_height = min_height + int(rng.random() * (max_height - min_height + 1))
        # Rounding may have moved the area across one of its bounds.
        area = box_height * round(box_height * aspect)
        box_height += int(area < min_pixels) - int(area > max_pixels)
        box_width = round(box_height * aspect)
        fits = 0 < box_height <= height and 0 < box_width <= width
        if fits and min_pixels <= box_height * box_width <= max_pixels:
            # TensorFlow never draws the last of several positions.
            top = int(rng.random() * max(1, height - box_height))
            left = int(rng.random() * max(1, width - box_width))
            return top, left, box_height, box_width
    return 0, 0, height, width


def sample_resized_crop(height: int, width: int, rng: np.random.Generator, min_area: float) -> Box:
    """Samples a box from the distribution of torchvision's and timm's `RandomResizedCrop`.

    The area is uniform and the aspect ratio log-uniform in [3/4, 4/3]. After ten samples that do
    not fit into the image, takes the center crop: the largest box with an aspect ratio in that
    range. See `sample_inception_crop` for the arguments.
    """
    min_aspect, max_aspect = _RESIZED_CROP_ASPECTS
    low, high = math.log(min_aspect), math.log(max_aspect)
    for _ in range(_RESIZED_CROP_ATTEMPTS):
        aspect = math.exp(low + (high - low) * rng.random())
        area = (min_area + (1.0 - min_area) * rng.random()) * height * width
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return top, left, box_height, box_width
    box_height = min(height, max(1, round(width / min_aspect)))
    box_width = min(width, max(1, round(height * max_aspect)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


_BOX_SAMPLERS = {
    "inception": sample_inception_crop,
    "random_resized_crop": sample_resized_crop,
}


# Training crops for fine-tuning, without an Inception crop: that of Mixer (Section 3; arXiv
# 2010.11929, B.1.1), and that of BiT-HyperRule (arXiv 1912.11370, Section 3.3).
_RESIZE_BEFORE_CROP = {"random_crop": resize_area, "bilinear_crop": resize}


def random_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    image_size: int,
    resize_size: int,
    resize_fn: Callable[[np.ndarray, int, int], np.ndarray],
) -> np.ndarray:
    """Resizes height and width to `resize_size` and takes a random square crop."""
    top, left = rng.integers(resize_size - image_size + 1, size=2)
    image = resize_fn(image, resize_size, resize_size)
    return image[top : top + image_size, left : left + image_size]


def random_shift(image: np.ndarray, rng: np.random.Generator, max_shift: int) -> np.ndarray:
    """Shifts the image by up to `max_shift` pixels along each axis, padding with black."""
    dy, dx = rng.integers(-max_shift, max_shift + 1, size=2)
    height, width = image.shape[:2]
    padded = cv2.copyMakeBorder(image, *(max_shift,) * 4, cv2.BORDER_CONSTANT)
    top, left = max_shift + dy, max_shift + dx
    return padded[top : top + height, left : left + width]


def erase_random_box(image: np.ndarray, rng: np.random.Generator, mode: str) -> np.ndarray:
    """Erases a random box of an image (Zhong et al. 2017, arXiv 1708.04896, Algorithm 1).

    The box has the distribution of timm's `RandomErasing`: its area is uniform between 2 % and a
    third of the image's, and its aspect ratio log-uniform between 0.3 and 3.3. After ten samples
    that do not fit into the image, nothing is erased.

    Args:
        image: uint8 RGB (height, width, 3); it is not modified.
        rng: The only source of randomness.
        mode: Fill of the box: "constant", a gray that the model's normalization maps to almost 0;
            "random", one color; or "pixel", a color for each pixel. Random levels are uniform in
            0…255, as in the paper; those of timm are normal.

    Returns:
        The image with the box erased, uint8 (height, width, 3).
    """
    height, width = image.shape[:2]
    low, high = (math.log(aspect) for aspect in _ERASED_ASPECTS)
    min_area, max_area = _ERASED_AREAS
    for _ in range(_ERASING_ATTEMPTS):
        area = (min_area + (max_area - min_area) * rng.random()) * height * width
        aspect = math.exp(low + (high - low) * rng.random())
        box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if box_height < height and box_width < width:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            image = image.copy()
            box = image[top : top + box_height, left : left + box_width]
            if mode == "constant":
                box[:] = _ERASED_LEVEL
            else:
                shape = box.shape if mode == "pixel" else (3,)
                box[:] = rng.integers(256, size=shape, dtype=np.uint8)
            return image
    return image
