"""RandAugment with the sixteen operations of the Mixer authors' training code.

Every operation maps one image to a new one. Operations that Pillow has as well are
bit-identical to Pillow's.

References:
  RandAugment, Cubuk et al. 2019, https://arxiv.org/abs/1909.13719
  MLP-Mixer, Tolstikhin et al. 2021, https://arxiv.org/abs/2105.01601, Appendix B
"""

import functools
import math
from collections.abc import Callable

import cv2
import numpy as np

RGBImage = np.ndarray  # uint8, (height, width, 3)

# Constants of the authors' code; the paper gives only the number of layers and the magnitude.
FULL_MAGNITUDE = 10
FILL = 128
CUTOUT_PIXELS = 40
TRANSLATE_PIXELS = 100

_LEVELS = np.arange(256)
_IDENTITY = _LEVELS.astype(np.uint8)

# ITU-R 601 luma in Pillow's 16-bit fixed point; the last column turns truncation into rounding.
# All sums fit in float32's 24-bit significand, so they are exact.
_LUMA = np.array([[19595, 38470, 7471, 32768]], np.float32) / 65536


def auto_contrast(image: RGBImage) -> RGBImage:
    """Stretches each channel linearly to the full range; constant channels are unchanged."""
    return _map_channels(image, _contrast_table)


def equalize(image: RGBImage) -> RGBImage:
    """Equalizes each channel's histogram; channels with too few pixels are unchanged."""
    return _map_channels(image, _equalize_table)


def invert(image: RGBImage) -> RGBImage:
    """Inverts every value: v becomes 255 − v."""
    return 255 - image


def rotate(image: RGBImage, degrees: float) -> RGBImage:
    """Rotates about the center of the image, counterclockwise for positive degrees."""
    return _gather_pixels(image, _rotation_sources(*image.shape[:2], degrees))


def posterize(image: RGBImage, bits: int) -> RGBImage:
    """Keeps the highest bits of every value; `bits` is clipped to [1, 8] as in TensorFlow."""
    dropped = 8 - min(max(bits, 1), 8)
    return image & np.uint8(256 - (1 << dropped))


def solarize(image: RGBImage, threshold: int) -> RGBImage:
    """Inverts the values at or above the threshold; nothing from a threshold of 256 on."""
    # XOR with 255 (which is -1) inverts, XOR with 0 does not. NumPy is slow at comparing bytes
    # with numbers above 255.
    inverted = image > min(threshold - 1, 255)
    return image ^ -inverted.view(np.uint8)


def solarize_add(image: RGBImage, addition: int) -> RGBImage:
    """Adds a nonnegative number to the values below 128, saturating at 255."""
    return cv2.add(image, (image < 128) * np.uint8(min(addition, 255)))


def color(image: RGBImage, factor: float) -> RGBImage:
    """Blends with the grayscale image: factor 0 is gray, 1 the image, above 1 more saturated."""
    return _blend(cv2.merge([_grayscale(image)] * 3), image, factor)


def contrast(image: RGBImage, factor: float) -> RGBImage:
    """Blends with constant gray: factor 0 is flat, 1 the image, above 1 higher in contrast.

    The gray level is Pillow's: the rounded mean of the grayscale image. The authors' code instead
    divides the sum of the histogram by 256, which is 196 for every 224 px image.
    """
    gray = _grayscale(image)
    mean = int(cv2.sumElems(gray)[0] / gray.size + 0.5)
    return cv2.LUT(image, _blend_table(factor)[mean])


def brightness(image: RGBImage, factor: float) -> RGBImage:
    """Blends with black: factor 0 is black, 1 the image, above 1 brighter."""
    return cv2.LUT(image, _blend_table(factor)[0])


def sharpness(image: RGBImage, factor: float) -> RGBImage:
    """Blends with a smoothed image: factor 0 is smooth, 1 the image, above 1 sharper.

    Smoothing is the 3x3 mean with weight 5 at the center, rounded as in Pillow (the authors' code
    truncates); the outermost pixels are not smoothed.
    """
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = image.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel / 13)[1:-1, 1:-1]
    return _blend(smooth, image, factor)


def shear_x(image: RGBImage, slope: float) -> RGBImage:
    """Shears along x: row y of the result starts `slope * y` pixels into row y of the image."""
    return _gather_pixels(image, _shear_sources(*image.shape[:2], slope, 0.0))


def shear_y(image: RGBImage, slope: float) -> RGBImage:
    """Shears along y: column x of the result starts `slope * x` pixels down column x."""
    return _gather_pixels(image, _shear_sources(*image.shape[:2], 0.0, slope))


def translate_x(image: RGBImage, pixels: float) -> RGBImage:
    """Translates the image to the left."""
    result = np.full(image.shape, FILL, np.uint8)
    target, source = _translation_slices(image.shape[1], pixels)
    result[:, target] = image[:, source]
    return result


def translate_y(image: RGBImage, pixels: float) -> RGBImage:
    """Translates the image upward."""
    result = np.full(image.shape, FILL, np.uint8)
    target, source = _translation_slices(image.shape[0], pixels)
    result[target] = image[source]
    return result


def cutout(image: RGBImage, center: np.ndarray, half_size: int) -> RGBImage:
    """Fills a square of side 2 * half_size around `center` (row, column) with gray."""
    image = image.copy()
    row, column = center
    top, left = max(row - half_size, 0), max(column - half_size, 0)
    image[top : row + half_size, left : column + half_size] = FILL
    return image


def _contrast_table(plane: np.ndarray) -> np.ndarray:
    """Computes the lookup table that stretches a channel, uint8 (height, width)."""
    low, high, _, _ = cv2.minMaxLoc(plane)
    if high - low in (0, 255):
        return _IDENTITY
    scale = 255 / (high - low)
    return (_LEVELS * scale - low * scale).clip(0, 255).astype(np.uint8)


def _equalize_table(plane: np.ndarray) -> np.ndarray:
    """Computes the lookup table that equalizes a channel, uint8 (height, width)."""
    histogram = cv2.calcHist([plane], [0], None, [256], [0, 256]).ravel().astype(np.int64)
    cumulative = histogram.cumsum()
    total = int(cumulative[-1])
    # Pillow leaves the brightest level out of the step, so that it maps to 255.
    brightest = cumulative.searchsorted(total)
    step = (total - int(histogram[brightest])) // 255
    if step == 0:
        return _IDENTITY
    cumulative -= histogram
    cumulative += step // 2
    cumulative //= step
    return np.minimum(cumulative, 255).astype(np.uint8)


def _map_channels(image: RGBImage, table_fn: Callable[[np.ndarray], np.ndarray]) -> RGBImage:
    """Applies to each channel the lookup table that `table_fn` computes from it."""
    return cv2.merge([cv2.LUT(plane, table_fn(plane)) for plane in cv2.split(image)])


def _grayscale(image: RGBImage) -> np.ndarray:
    """Computes the luma, uint8 (height, width)."""
    return cv2.transform(image.astype(np.float32), _LUMA).astype(np.uint8)


@functools.lru_cache(maxsize=8, typed=True)
def _blend_table(factor: float) -> np.ndarray:
    """Computes the lookup table of `_blend`, uint8 [degenerate, value]."""
    # float32 and truncation, as in Pillow's C code.
    degenerate, value = _LEVELS.astype(np.float32)[:, None], _LEVELS.astype(np.float32)
    blended = value - degenerate
    blended *= factor
    blended += degenerate
    return blended.clip(0, 255).astype(np.uint8)


def _blend(degenerate: RGBImage, image: RGBImage, factor: float) -> RGBImage:
    """Interpolates (factor below 1) or extrapolates from a degenerate image to the image."""
    # Pairs of bytes are little-endian 16-bit indices into the flattened table.
    pairs = cv2.merge([each.reshape(len(image), -1) for each in (image, degenerate)])
    return cv2.LUT(pairs.view(np.uint16), _blend_table(factor).ravel()).reshape(image.shape)


def _translation_slices(length: int, pixels: float) -> tuple[slice, slice]:
    """Computes the slices of the result and of the image that overlap after a translation."""
    shift = min(max(_to_fixed_point(pixels + 0.5) >> 16, -length), length)
    left, right = max(shift, 0), max(-shift, 0)
    return slice(right, length - left), slice(left, length - right)


def _gather_pixels(image: RGBImage, sources: np.ndarray) -> RGBImage:
    """Gathers pixels by their coordinates.

    Args:
        image: Image (height, width, 3).
        sources: Flat index of each pixel's source, (height, width); height * width means
            `FILL`.
    """
    height, width = image.shape[:2]
    # Gathering one 32-bit word per pixel is several times faster than three bytes.
    pixels = np.empty((height * width + 1, 4), np.uint8)
    cv2.cvtColor(image, cv2.COLOR_RGB2RGBA, dst=pixels[:-1].reshape(height, width, 4))
    pixels[-1] = FILL
    # All indices are in range; "wrap" is faster than the default mode, which checks them.
    gathered = pixels.view(np.int32)[:, 0].take(sources, mode="wrap")
    return cv2.cvtColor(gathered.view(np.uint8).reshape(height, width, 4), cv2.COLOR_RGBA2RGB)


# For one image size and magnitude there are two rotations (by sign) and four shears.
@functools.lru_cache(maxsize=4)
def _rotation_sources(height: int, width: int, degrees: float) -> np.ndarray:
    """Computes the sources of a counterclockwise rotation about the center of the image."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # Source of the upper left pixel's center, relative to the center of the image.
    x, y = (1 - width) / 2, (1 - height) / 2
    start_x, start_y = cosine * x - sine * y + width / 2, sine * x + cosine * y + height / 2
    return _affine_sources(height, width, (cosine, -sine, start_x), (sine, cosine, start_y))


@functools.lru_cache(maxsize=8)
def _shear_sources(height: int, width: int, slope_x: float, slope_y: float) -> np.ndarray:
    """Computes the sources of a shear that leaves the upper left corner in place.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        slope_x: Shift of the sources to the right, in pixels per row.
        slope_y: Shift of the sources downward, in pixels per column.
    """
    x_map = (1.0, slope_x, (1 + slope_x) / 2)
    return _affine_sources(height, width, x_map, (slope_y, 1.0, (1 + slope_y) / 2))


def _affine_sources(
    height: int, width: int, x_map: tuple[float, float, float], y_map: tuple[float, float, float]
) -> np.ndarray:
    """Computes the sources of an affine map by Pillow's nearest-neighbor arithmetic.

    Args:
        height: Height of the image and the result, in pixels.
        width: Width of the image and the result, in pixels.
        x_map: Coefficients of x, y and 1 in a source's x coordinate.
        y_map: Coefficients of x, y and 1 in a source's y coordinate.

    Returns:
        Flat index of each pixel's source, int64 (height, width); height * width for sources outside
        of the image. Read-only, because cached results are shared.
    """
    x, y = np.arange(width), np.arange(height)[:, None]
    columns, rows = (
        (_to_fixed_point(per_x) * x + _to_fixed_point(per_y) * y + _to_fixed_point(start)) >> 16
        for per_x, per_y, start in (x_map, y_map)
    )
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    sources = np.where(inside, rows * width + columns, height * width)
    sources.setflags(write=False)
    return sources


def _to_fixed_point(number: float) -> int:
    """Rounds to the 16.16 fixed-point format of Pillow's affine transforms."""
    return math.floor(number * 65536 + 0.5)


def _random_sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


def _enhance_factor(strength: float) -> float:
    return 1.8 * strength + 0.1


# Operations by name; the strength is 1 at FULL_MAGNITUDE. Unlike in most other implementations, a
# larger magnitude of Posterize keeps more bits.
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
    """Applies operations sampled uniformly with replacement.

    Args:
        image: uint8 RGB (height, width, 3); it is not modified.
        rng: The only source of randomness.
        num_layers: Number of operations.
        magnitude: Strength on a scale of 0 to 10; larger values extrapolate.

    Returns:
        The augmented image, uint8 (height, width, 3); `image` itself if num_layers is 0.

    Raises:
        ValueError: The image is not uint8 RGB, or a number is negative.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"image must be uint8 RGB of shape (height, width, 3), got {image.dtype} of shape "
            f"{image.shape}"
        )
    if num_layers < 0 or magnitude < 0:
        raise ValueError(
            f"num_layers and magnitude must not be negative, got {num_layers} and {magnitude}. "
            "The paper's ImageNet-1k recipe uses 2 and 15"
        )
    operations = list(OPERATIONS.values())
    for index in rng.integers(len(operations), size=num_layers).tolist():
        image = operations[index](image, magnitude / FULL_MAGNITUDE, rng)
    return image
