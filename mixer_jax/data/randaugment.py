"""RandAugment with the sixteen operations of the Mixer authors' training code.

Every operation takes an image and returns a new one; where Pillow has the same operation the
result is Pillow's to the bit.

References:
  RandAugment, Cubuk et al. 2019, https://arxiv.org/abs/1909.13719
  MLP-Mixer, Tolstikhin et al. 2021, https://arxiv.org/abs/2105.01601, Appendix B
"""

import functools
from collections.abc import Callable

import cv2
import numpy as np

from mixer_jax.data.affine import (
    gather_pixels,
    rotation_source_coords,
    shear_source_coords,
    to_fixed_point,
)

RGBImage = np.ndarray  # uint8, (height, width, 3)

# The authors' code, where the paper gives only the number of layers and the magnitude.
FULL_MAGNITUDE = 10
FILL = 128
CUTOUT_PIXELS = 40
TRANSLATE_PIXELS = 100

_LEVELS = np.arange(256)
_IDENTITY = _LEVELS.astype(np.uint8)

# ITU-R 601 luma in Pillow's 16-bit fixed point; the last column makes truncation round. All sums
# of these fit in float32's 24 bits, so they are exact.
_LUMA = np.array([[19595, 38470, 7471, 32768]], np.float32) / 65536


def auto_contrast(image: RGBImage) -> RGBImage:
    """Stretches each channel linearly to the full range; a constant channel stays."""
    return _map_channels(image, _stretching_table)


def equalize(image: RGBImage) -> RGBImage:
    """Flattens each channel's histogram; a channel of too few pixels to do so stays."""
    return _map_channels(image, _flattening_table)


def invert(image: RGBImage) -> RGBImage:
    """Reflects every value about the middle of the range."""
    return 255 - image


def rotate(image: RGBImage, degrees: float) -> RGBImage:
    """Rotates about the centre of the image, anticlockwise for positive degrees."""
    return gather_pixels(image, rotation_source_coords(*image.shape[:2], degrees), FILL)


def posterize(image: RGBImage, bits: int) -> RGBImage:
    """Keeps the highest bits of every value, at least 1 and at most 8 as in TensorFlow."""
    dropped = 8 - min(max(bits, 1), 8)
    return image & np.uint8(256 - (1 << dropped))


def solarize(image: RGBImage, threshold: int) -> RGBImage:
    """Inverts the values at or above the threshold; 256 and more changes nothing."""
    # An exclusive or with 255, which is -1, inverts; one with 0 keeps. NumPy is slow to compare
    # bytes with more than 255.
    inverted = image > min(threshold - 1, 255)
    return image ^ -inverted.view(np.uint8)


def solarize_add(image: RGBImage, addition: int) -> RGBImage:
    """Adds to the values below 128, up to 255; the addition is not negative."""
    return cv2.add(image, (image < 128) * np.uint8(min(addition, 255)))


def color(image: RGBImage, factor: float) -> RGBImage:
    """Blends with the greyscale image: factor 0 is grey, 1 is the image, more is vivid."""
    return _blend(cv2.merge([_greyscale(image)] * 3), image, factor)


def contrast(image: RGBImage, factor: float) -> RGBImage:
    """Blends with a constant grey: factor 0 is flat, 1 is the image, more is stark.

    The grey is Pillow's, the rounded mean of the greyscale image. The authors' TensorFlow code
    divides the sum of the histogram by 256 instead, which is 196 for every image of 224 px.
    """
    grey = _greyscale(image)
    mean = int(cv2.sumElems(grey)[0] / grey.size + 0.5)
    return cv2.LUT(image, _blends(factor)[mean])


def brightness(image: RGBImage, factor: float) -> RGBImage:
    """Blends with black: factor 0 is black, 1 is the image, more is bright."""
    return cv2.LUT(image, _blends(factor)[0])


def sharpness(image: RGBImage, factor: float) -> RGBImage:
    """Blends with a smoothed image: factor 0 is smooth, 1 is the image, more is sharp.

    Smoothing is the 3x3 mean with weight 5 at the centre, rounded as in Pillow where the authors'
    code truncates; the outermost pixels are not smoothed.
    """
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = image.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel / 13)[1:-1, 1:-1]
    return _blend(smooth, image, factor)


def shear_x(image: RGBImage, slope: float) -> RGBImage:
    """Shears along x: row y of the result starts `slope * y` pixels into row y of the image."""
    return gather_pixels(image, shear_source_coords(*image.shape[:2], slope, 0.0), FILL)


def shear_y(image: RGBImage, slope: float) -> RGBImage:
    """Shears along y: column x of the result starts `slope * x` pixels down column x."""
    return gather_pixels(image, shear_source_coords(*image.shape[:2], 0.0, slope), FILL)


def translate_x(image: RGBImage, pixels: float) -> RGBImage:
    """Moves the image to the left by a number of pixels."""
    result = np.full(image.shape, FILL, np.uint8)
    kept, source = _overlap(image.shape[1], pixels)
    result[:, kept] = image[:, source]
    return result


def translate_y(image: RGBImage, pixels: float) -> RGBImage:
    """Moves the image up by a number of pixels."""
    result = np.full(image.shape, FILL, np.uint8)
    kept, source = _overlap(image.shape[0], pixels)
    result[kept] = image[source]
    return result


def cutout(image: RGBImage, centre: np.ndarray, half_size: int) -> RGBImage:
    """Paints a grey square of side 2 * half_size about (row, column), cut off at the edges."""
    image = image.copy()
    row, column = centre
    top, left = max(row - half_size, 0), max(column - half_size, 0)
    image[top : row + half_size, left : column + half_size] = FILL
    return image


def _stretching_table(plane: np.ndarray) -> np.ndarray:
    """Tabulates what stretches one channel, uint8 (height, width), to the full range."""
    low, high, _, _ = cv2.minMaxLoc(plane)
    if high - low in (0, 255):
        return _IDENTITY
    scale = 255 / (high - low)
    return (_LEVELS * scale - low * scale).clip(0, 255).astype(np.uint8)


def _flattening_table(plane: np.ndarray) -> np.ndarray:
    """Tabulates what flattens the histogram of one channel, uint8 (height, width)."""
    histogram = cv2.calcHist([plane], [0], None, [256], [0, 256]).ravel().astype(np.int64)
    up_to = histogram.cumsum()
    total = int(up_to[-1])
    # Pillow leaves the brightest level out of the step, so that it maps to 255.
    brightest = up_to.searchsorted(total)
    step = (total - int(histogram[brightest])) // 255
    if step == 0:
        return _IDENTITY
    up_to -= histogram
    up_to += step // 2
    up_to //= step
    return np.minimum(up_to, 255).astype(np.uint8)


def _map_channels(image: RGBImage, tabulate: Callable[[np.ndarray], np.ndarray]) -> RGBImage:
    """Replaces the values of each channel by the table made of that channel."""
    return cv2.merge([cv2.LUT(plane, tabulate(plane)) for plane in cv2.split(image)])


def _greyscale(image: RGBImage) -> np.ndarray:
    """Returns the luma, uint8 (height, width)."""
    return cv2.transform(image.astype(np.float32), _LUMA).astype(np.uint8)


@functools.lru_cache(maxsize=8, typed=True)
def _blends(factor: float) -> np.ndarray:
    """Tabulates moves from a degenerate value to a value and beyond, uint8 [degenerate, value]."""
    # float32, then truncation, as in Pillow's C code.
    degenerate, value = _LEVELS.astype(np.float32)[:, None], _LEVELS.astype(np.float32)
    blended = value - degenerate
    blended *= factor
    blended += degenerate
    return blended.clip(0, 255).astype(np.uint8)


def _blend(degenerate: RGBImage, image: RGBImage, factor: float) -> RGBImage:
    """Moves from the degenerate image towards the image and beyond."""
    # Two bytes, the lower one first, are one 16-bit index into the flattened table.
    pairs = cv2.merge([each.reshape(len(image), -1) for each in (image, degenerate)])
    return cv2.LUT(pairs.view(np.uint16), _blends(factor).ravel()).reshape(image.shape)


def _overlap(length: int, pixels: float) -> tuple[slice, slice]:
    """Returns what a move keeps of an axis: where it is in the result, and in the image."""
    shift = min(max(to_fixed_point(pixels + 0.5) >> 16, -length), length)
    left, right = max(shift, 0), max(-shift, 0)
    return slice(right, length - left), slice(left, length - right)


def _random_sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


def _enhance_factor(strength: float) -> float:
    return 1.8 * strength + 0.1


# What each operation does at a strength, which is 1 at FULL_MAGNITUDE. Posterize is the reverse of
# most other code: a larger magnitude keeps more bits.
OPERATIONS: dict[str, Callable[[RGBImage, float, np.random.Generator], RGBImage]] = {
    "AutoContrast": lambda image, strength, rng: auto_contrast(image),
    "Equalize": lambda image, strength, rng: equalize(image),
    "Invert": lambda image, strength, rng: invert(image),
    "Rotate": lambda image, strength, rng: rotate(image, _random_sign(rng) * 30 * strength),
    "Posterize": lambda image, strength, rng: posterize(image, int(4 * strength)),
    "Solarize": lambda image, strength, rng: solarize(image, int(256 * strength)),
    "Color": lambda image, strength, rng: color(image, _enhance_factor(strength)),
    "Contrast": lambda image, strength, rng: contrast(image, _enhance_factor(strength)),
    "Brightness": lambda image, strength, rng: brightness(image, _enhance_factor(strength)),
    "Sharpness": lambda image, strength, rng: sharpness(image, _enhance_factor(strength)),
    "ShearX": lambda image, strength, rng: shear_x(image, _random_sign(rng) * 0.3 * strength),
    "ShearY": lambda image, strength, rng: shear_y(image, _random_sign(rng) * 0.3 * strength),
    "TranslateX": lambda image, strength, rng: translate_x(
        image, _random_sign(rng) * TRANSLATE_PIXELS * strength
    ),
    "TranslateY": lambda image, strength, rng: translate_y(
        image, _random_sign(rng) * TRANSLATE_PIXELS * strength
    ),
    "Cutout": lambda image, strength, rng: cutout(
        image, rng.integers(image.shape[:2]), int(CUTOUT_PIXELS * strength)
    ),
    "SolarizeAdd": lambda image, strength, rng: solarize_add(image, int(110 * strength)),
}


def rand_augment(
    image: np.ndarray, rng: np.random.Generator, *, num_layers: int, magnitude: float
) -> np.ndarray:
    """Applies operations drawn uniformly with replacement, one after the other.

    Args:
      image: uint8 RGB of shape (height, width, 3); it is not modified.
      rng: source of every random choice; equal states give equal results.
      num_layers: how many operations to apply.
      magnitude: strength on a scale of 0 to 10; larger values extrapolate.

    Returns:
      The augmented image, uint8 (height, width, 3); `image` itself if num_layers is 0.

    Raises:
      ValueError: if the image is not uint8 RGB, or a number is negative.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"image is {image.dtype} of shape {image.shape}; "
            "RandAugment needs uint8 RGB of shape (height, width, 3)"
        )
    if num_layers < 0 or magnitude < 0:
        raise ValueError(
            f"num_layers {num_layers} and magnitude {magnitude} must not be negative; "
            "the paper's ImageNet-1k recipe has 2 and 15"
        )
    operations = list(OPERATIONS.values())
    for index in rng.integers(len(operations), size=num_layers).tolist():
        image = operations[index](image, magnitude / FULL_MAGNITUDE, rng)
    return image
