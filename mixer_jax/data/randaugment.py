"""RandAugment with the sixteen operations of the Mixer authors' training code.

Every operation takes an image and returns a new one; where Pillow has the same operation the
result is Pillow's to the bit.

References:
  RandAugment, Cubuk et al. 2019, https://arxiv.org/abs/1909.13719
  MLP-Mixer, Tolstikhin et al. 2021, https://arxiv.org/abs/2105.01601, Appendix B
"""

from collections.abc import Callable

import cv2
import numpy as np

RGBImage = np.ndarray  # uint8, (height, width, 3)

# The authors' code, where the paper gives only the number of layers and the magnitude.
FULL_MAGNITUDE = 10
FILL = 128
CUTOUT_PIXELS = 40
TRANSLATE_PIXELS = 100

_LEVELS = np.arange(256)

# ITU-R 601 luma in Pillow's 16-bit fixed point; the last column makes truncation round. All sums
# of these fit in float32's 24 bits, so they are exact.
_LUMA = np.array([[19595, 38470, 7471, 32768]], np.float32) / 65536


def auto_contrast(image: RGBImage) -> RGBImage:
    """Stretches each channel linearly to the full range; a constant channel stays."""
    tables = []
    for histogram in _histograms(image):
        low, high = np.flatnonzero(histogram)[[0, -1]]
        scale = 255 / max(high - low, 1)
        tables.append(_LEVELS * scale - low * scale if high > low else _LEVELS)
    return _look_up(image, *tables)


def equalize(image: RGBImage) -> RGBImage:
    """Flattens each channel's histogram; a channel of too few pixels to do so stays."""
    tables = []
    for histogram in _histograms(image):
        # Pillow leaves the brightest level out of the step, so that it maps to 255.
        step = (histogram.sum() - histogram[np.flatnonzero(histogram)[-1]]) // 255
        darker = np.cumsum(histogram) - histogram
        tables.append((step // 2 + darker) // step if step else _LEVELS)
    return _look_up(image, *tables)


def invert(image: RGBImage) -> RGBImage:
    """Reflects every value about the middle of the range."""
    return 255 - image


def rotate(image: RGBImage, degrees: float) -> RGBImage:
    """Rotates about the centre of the image, anticlockwise for positive degrees."""
    height, width = image.shape[:2]
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    centre = np.array([width / 2, height / 2])
    turn = np.array([[cosine, -sine], [sine, cosine]])
    return _affine(image, np.column_stack([turn, centre - turn @ centre]))


def posterize(image: RGBImage, bits: int) -> RGBImage:
    """Keeps the highest bits of every value, at least 1 and at most 8 as in TensorFlow."""
    dropped = 8 - min(max(bits, 1), 8)
    return _look_up(image, _LEVELS >> dropped << dropped)


def solarize(image: RGBImage, threshold: int) -> RGBImage:
    """Inverts the values at or above the threshold; 256 and more changes nothing."""
    return _look_up(image, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS))


def solarize_add(image: RGBImage, addition: int) -> RGBImage:
    """Adds to the values below 128, up to 255."""
    return _look_up(image, np.where(_LEVELS < 128, _LEVELS + addition, _LEVELS))


def color(image: RGBImage, factor: float) -> RGBImage:
    """Blends with the greyscale image: factor 0 is grey, 1 is the image, more is vivid."""
    return _blend(cv2.merge([_greyscale(image)] * 3), image, factor)


def contrast(image: RGBImage, factor: float) -> RGBImage:
    """Blends with a constant grey: factor 0 is flat, 1 is the image, more is stark.

    The grey is Pillow's, the rounded mean of the greyscale image. The authors' TensorFlow code
    divides the sum of the histogram by 256 instead, which is 196 for every image of 224 px.
    """
    mean = int(_greyscale(image).mean() + 0.5)
    return _look_up(image, _blend(np.array(mean), _LEVELS, factor))


def brightness(image: RGBImage, factor: float) -> RGBImage:
    """Blends with black: factor 0 is black, 1 is the image, more is bright."""
    return _look_up(image, _blend(np.array(0), _LEVELS, factor))


def sharpness(image: RGBImage, factor: float) -> RGBImage:
    """Blends with a smoothed image: factor 0 is smooth, 1 is the image, more is sharp.

    Smoothing is the 3x3 mean with weight 5 at the centre, rounded as in Pillow where the authors'
    code truncates; the outermost pixels are not smoothed.
    """
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = image.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel / kernel.sum())[1:-1, 1:-1]
    return _blend(smooth, image, factor)


def shear_x(image: RGBImage, slope: float) -> RGBImage:
    """Shears along x: row y of the result starts `slope * y` pixels into row y of the image."""
    return _affine(image, np.array([[1, slope, 0], [0, 1, 0]]))


def shear_y(image: RGBImage, slope: float) -> RGBImage:
    """Shears along y: column x of the result starts `slope * x` pixels down column x."""
    return _affine(image, np.array([[1, 0, 0], [slope, 1, 0]]))


def translate_x(image: RGBImage, pixels: float) -> RGBImage:
    """Moves the image to the left by a number of pixels."""
    return _affine(image, np.array([[1, 0, pixels], [0, 1, 0]]))


def translate_y(image: RGBImage, pixels: float) -> RGBImage:
    """Moves the image up by a number of pixels."""
    return _affine(image, np.array([[1, 0, 0], [0, 1, pixels]]))


def cutout(image: RGBImage, centre: np.ndarray, half_size: int) -> RGBImage:
    """Paints a grey square of side 2 * half_size about (row, column), cut off at the edges."""
    image = image.copy()
    row, column = centre
    top, left = max(row - half_size, 0), max(column - half_size, 0)
    image[top : row + half_size, left : column + half_size] = FILL
    return image


def _histograms(image: RGBImage) -> np.ndarray:
    """Counts the values of each channel, int64 (3, 256)."""
    histograms = np.empty((3, 256), np.int64)
    for channel, histogram in enumerate(histograms):
        histogram[:] = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel()
    return histograms


def _look_up(image: RGBImage, *tables: np.ndarray) -> RGBImage:
    """Replaces every value by its entry, clipped to 0-255, in one table or in its channel's."""
    table = np.clip(np.stack(tables, axis=-1), 0, 255).astype(np.uint8)
    return cv2.LUT(image, table[None])


def _greyscale(image: RGBImage) -> np.ndarray:
    """Returns the luma, uint8 (height, width)."""
    return cv2.transform(image.astype(np.float32), _LUMA).astype(np.uint8)


def _blend(degenerate: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """Moves from the degenerate image towards the image and beyond, uint8."""
    # float32, then truncation, as in Pillow's C code.
    blended = np.subtract(image, degenerate, dtype=np.float32)
    blended *= factor
    blended += degenerate
    return blended.clip(0, 255).astype(np.uint8)


def _affine(image: RGBImage, matrix: np.ndarray) -> RGBImage:
    """Warps by the nearest pixel, with FILL where there is none.

    Args:
      image: the image.
      matrix: (2, 3), from a place (x, y, 1) in the result to its source (x, y), both in pixels
        from the corner of the image.

    Returns:
      The warped image.
    """
    # Pillow's 16.16 fixed point from pixel centres. cv2.warpAffine has 10 bits, which moves up to
    # 5 % of the pixels of a sheared image by one.
    height, width = image.shape[:2]
    start = matrix @ (0.5, 0.5, 1)
    fixed = np.floor(np.column_stack([matrix[:, :2], start]) * 65536 + 0.5).astype(np.int64)
    columns, rows = np.arange(width), np.arange(height)[:, None]
    source_x, source_y = ((a * columns + b * rows + c) >> 16 for a, b, c in fixed)
    return cv2.remap(
        image,
        source_x.astype(np.float32),
        source_y.astype(np.float32),
        cv2.INTER_NEAREST,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(FILL, FILL, FILL),
    )


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
    for index in rng.integers(len(operations), size=num_layers):
        image = operations[index](image, magnitude / FULL_MAGNITUDE, rng)
    return image
