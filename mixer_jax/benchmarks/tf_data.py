"""Baseline of the input pipeline: the same work in tf.data, with RandAugment in TensorFlow.

Images are uint8 (height, width, 3) of a shape known when the graph is built. The constants of
RandAugment, its magnitudes and the probabilities of the sixteen operations are those of
`mixer_jax.data.randaugment`.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from mixer_jax.data.randaugment import CUTOUT_PIXELS, FILL, FULL_MAGNITUDE, TRANSLATE_PIXELS

VERSION: str = tf.__version__

# TensorFlow's default, which mixer_jax trains with, too: the pixels are equal.
_DCT = "INTEGER_FAST"
# Pillow's weights: all sums are exact in float32.
_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)


def hide_gpus() -> None:
    """Keeps TensorFlow off the GPUs: an input pipeline runs on the host."""
    tf.config.set_visible_devices([], "GPU")


def train_batches(
    encoded: Sequence[bytes],
    *,
    num_batches: int,
    batch_size: int,
    image_size: int,
    min_area: float,
    decode_full_image: bool,
    randaugment_layers: int,
    randaugment_magnitude: float,
    num_threads: int,
) -> tf.data.Dataset:
    """Creates a dataset of training images: decoded, randomly cropped, flipped and augmented.

    The JPEG files are used repeatedly. `min_area` is the smallest area of the Inception crop, as a
    fraction of the image; only the crop is decoded unless `decode_full_image` is set. RandAugment
    has magnitudes on a scale of 0 to 10, and 0 layers turn it off.
    """

    def prepare(file: tf.Tensor) -> tf.Tensor:
        shape = tf.io.extract_jpeg_shape(file)
        image = resize(crop(file, _random_box(shape, min_area), decode_full_image), image_size)
        image = tf.cast(tf.image.random_flip_left_right(image), tf.uint8)
        return rand_augment(image, randaugment_layers, randaugment_magnitude)

    files = tf.data.Dataset.from_tensor_slices(list(encoded))
    return _batches(files, prepare, num_batches, batch_size, num_threads)


def augmented_batches(
    images: np.ndarray,
    *,
    num_batches: int,
    batch_size: int,
    randaugment_layers: int,
    randaugment_magnitude: float,
    num_threads: int,
) -> tf.data.Dataset:
    """Creates a dataset of images with RandAugment; see `train_batches` for the arguments."""

    def prepare(image: tf.Tensor) -> tf.Tensor:
        return rand_augment(image, randaugment_layers, randaugment_magnitude)

    arrays = tf.data.Dataset.from_tensor_slices(images)
    return _batches(arrays, prepare, num_batches, batch_size, num_threads)


def _batches(
    inputs: tf.data.Dataset,
    prepare: Callable[[tf.Tensor], tf.Tensor],
    num_batches: int,
    batch_size: int,
    num_threads: int,
) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = num_threads
    # Images are prepared in parallel, so that operations need not be.
    options.threading.max_intra_op_parallelism = 1
    images = inputs.repeat().take(num_batches * batch_size)
    # The function has no Python control flow that depends on an image.
    prepare = tf.autograph.experimental.do_not_convert(prepare)
    images = images.map(prepare, num_parallel_calls=num_threads, deterministic=True)
    return images.batch(batch_size, drop_remainder=True).prefetch(2).with_options(options)


def _random_box(shape: tf.Tensor, min_area: float) -> tf.Tensor:
    """Samples the Inception crop: top, left, height, width."""
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        shape,
        tf.zeros([1, 0, 4]),
        min_object_covered=0.0,
        area_range=(min_area, 1.0),
        use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], size[:2]], axis=0)


def crop(file: tf.Tensor, box: tf.Tensor, decode_full_image: bool) -> tf.Tensor:
    """Decodes a box (top, left, height, width) of a JPEG file, uint8."""
    if not decode_full_image:
        return tf.io.decode_and_crop_jpeg(file, box, channels=3, dct_method=_DCT)
    top, left, height, width = tf.unstack(box)
    image = tf.io.decode_jpeg(file, channels=3, dct_method=_DCT)
    return image[top : top + height, left : left + width]


def resize(image: tf.Tensor, image_size: int) -> tf.Tensor:
    """Resizes an image to a square without antialiasing, float32."""
    return tf.image.resize(image, [image_size, image_size], antialias=False)


def auto_contrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches each channel linearly to the full range, except constant channels."""
    # Reducing channel by channel is twice as fast as reducing over the two leading axes.
    channels = tf.unstack(image, axis=-1)
    low = tf.cast(tf.stack([tf.reduce_min(channel) for channel in channels]), tf.float32)
    high = tf.cast(tf.stack([tf.reduce_max(channel) for channel in channels]), tf.float32)
    scale = tf.where(high > low, 255 / tf.maximum(high - low, 1), 1)
    start = tf.where(high > low, low, 0)
    return _as_pixels((tf.cast(image, tf.float32) - start) * scale)


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Flattens each channel's histogram, except channels with too few pixels."""
    return tf.stack([_equalize(channel) for channel in tf.unstack(image, axis=-1)], axis=-1)


def _equalize(channel: tf.Tensor) -> tf.Tensor:
    values = tf.cast(channel, tf.int32)
    histogram = tf.raw_ops.DenseBincount(
        input=tf.reshape(values, [-1]), size=256, weights=np.zeros(0, np.int32)
    )
    step = (tf.reduce_sum(histogram) - histogram[tf.reduce_max(values)]) // 255
    darker = tf.cumsum(histogram, exclusive=True)
    flat = (step // 2 + darker) // tf.maximum(step, 1)
    table = tf.minimum(tf.where(step > 0, flat, np.arange(256, dtype=np.int32)), 255)
    return tf.gather(tf.cast(table, tf.uint8), values)


def invert(image: tf.Tensor) -> tf.Tensor:
    """Inverts every value."""
    return 255 - image


def rotate(image: tf.Tensor, degrees: tf.Tensor | float) -> tf.Tensor:
    """Rotates about the center of the image, counterclockwise for positive degrees."""
    cosine, sine = tf.cos(degrees * (math.pi / 180)), tf.sin(degrees * (math.pi / 180))
    y, x = image.shape[0] / 2, image.shape[1] / 2
    return _affine(
        image, cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y
    )


def posterize(image: tf.Tensor, bits: int) -> tf.Tensor:
    """Keeps the highest bits of every value, from 1 to 8."""
    return tf.bitwise.bitwise_and(image, np.uint8(256 - (1 << 8 - min(max(bits, 1), 8))))


def solarize(image: tf.Tensor, threshold: int) -> tf.Tensor:
    """Inverts the values at or above the threshold; none for 256 and more."""
    return image if threshold > 255 else tf.where(image < threshold, image, 255 - image)


def solarize_add(image: tf.Tensor, addition: int) -> tf.Tensor:
    """Adds to the values below 128, up to 255."""
    added = tf.minimum(255 - image, np.uint8(min(addition, 255)))
    return image + tf.cast(image < 128, tf.uint8) * added


def color(image: tf.Tensor, factor: float) -> tf.Tensor:
    """Blends with the grayscale image."""
    return _blend(_grayscale(image), tf.cast(image, tf.float32), factor)


def contrast(image: tf.Tensor, factor: float) -> tf.Tensor:
    """Blends with a constant gray, the rounded mean of the grayscale image."""
    mean = tf.floor(tf.reduce_mean(_grayscale(image)) + 0.5)
    return _blend(mean, tf.cast(image, tf.float32), factor)


def brightness(image: tf.Tensor, factor: float) -> tf.Tensor:
    """Blends with black."""
    return _as_pixels(tf.cast(image, tf.float32) * factor)


def sharpness(image: tf.Tensor, factor: float) -> tf.Tensor:
    """Blends with a smoothed image, except at the border."""
    values = tf.cast(image, tf.float32)
    # Sums are as fast as TensorFlow's depthwise convolution with oneDNN, and five times as fast as
    # without it.
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    center = values[1:-1, 1:-1]
    smooth = tf.floor((rows[:-2] + rows[1:-1] + rows[2:] + 4 * center) / 13 + 0.5)
    inside = _blend(smooth, center, factor)
    middle = tf.concat([image[1:-1, :1], inside, image[1:-1, -1:]], axis=1)
    return tf.concat([image[:1], middle, image[-1:]], axis=0)


def shear_x(image: tf.Tensor, slope: tf.Tensor | float) -> tf.Tensor:
    """Shears the image along x."""
    return _affine(image, 1.0, slope, 0.0, 0.0, 1.0, 0.0)


def shear_y(image: tf.Tensor, slope: tf.Tensor | float) -> tf.Tensor:
    """Shears the image along y."""
    return _affine(image, 1.0, 0.0, 0.0, slope, 1.0, 0.0)


def translate_x(image: tf.Tensor, pixels: tf.Tensor | float) -> tf.Tensor:
    """Shifts the image to the left by a number of pixels."""
    return _affine(image, 1.0, 0.0, pixels, 0.0, 1.0, 0.0)


def translate_y(image: tf.Tensor, pixels: tf.Tensor | float) -> tf.Tensor:
    """Shifts the image up by a number of pixels."""
    return _affine(image, 1.0, 0.0, 0.0, 0.0, 1.0, pixels)


def cutout(image: tf.Tensor, row: tf.Tensor, column: tf.Tensor, half_size: int) -> tf.Tensor:
    """Paints a gray square of side 2 * half_size around (row, column), clipped to the image."""
    height, width = image.shape[:2]
    top, bottom = tf.maximum(row - half_size, 0), tf.minimum(row + half_size, height)
    left, right = tf.maximum(column - half_size, 0), tf.minimum(column + half_size, width)
    gray = tf.fill([bottom - top, right - left, 3], np.uint8(FILL))
    middle = tf.concat([image[top:bottom, :left], gray, image[top:bottom, right:]], axis=1)
    return tf.concat([image[:top], middle, image[bottom:]], axis=0)


def _grayscale(image: tf.Tensor) -> tf.Tensor:
    """Computes the luma, rounded to integers, float32 (height, width, 1)."""
    channels = tf.unstack(tf.cast(image, tf.float32), axis=-1)
    luma = sum(weight * channel for weight, channel in zip(_LUMA, channels, strict=True))
    return tf.floor(luma + 0.5)[..., None]


def _blend(degenerate: tf.Tensor, values: tf.Tensor, factor: float) -> tf.Tensor:
    """Interpolates between the degenerate image and the image, or extrapolates beyond it."""
    return _as_pixels(degenerate + factor * (values - degenerate))


def _as_pixels(values: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.clip_by_value(values, 0, 255), tf.uint8)


def _affine(image: tf.Tensor, *matrix: tf.Tensor | float) -> tf.Tensor:
    """Warps to the nearest pixel, with FILL outside of the image.

    The affine map from a position in the result to its source has six numbers, in pixels from the
    corner of the image.
    """
    a, b, c, d, e, f = matrix
    # TensorFlow measures from the center of the first pixel.
    c, f = c + (a + b - 1) / 2, f + (d + e - 1) / 2
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=tf.cast(tf.stack([a, b, c, d, e, f, 0.0, 0.0]), tf.float32)[None],
        output_shape=image.shape[:2],
        interpolation="NEAREST",
        fill_mode="CONSTANT",
        fill_value=float(FILL),
    )[0]


def _random_sign() -> tf.Tensor:
    return tf.where(tf.random.uniform([]) < 0.5, 1.0, -1.0)


def _random_cutout(image: tf.Tensor, strength: float) -> tf.Tensor:
    row, column = (tf.random.uniform([], 0, length, tf.int32) for length in image.shape[:2])
    return cutout(image, row, column, int(CUTOUT_PIXELS * strength))


def _enhance_factor(strength: float) -> float:
    return 1.8 * strength + 0.1


OPERATIONS: dict[str, Callable[[tf.Tensor, float], tf.Tensor]] = {
    "AutoContrast": lambda image, strength: auto_contrast(image),
    "Equalize": lambda image, strength: equalize(image),
    "Invert": lambda image, strength: invert(image),
    "Rotate": lambda image, strength: rotate(image, _random_sign() * 30 * strength),
    "Posterize": lambda image, strength: posterize(image, int(4 * strength)),
    "Solarize": lambda image, strength: solarize(image, int(256 * strength)),
    "Color": lambda image, strength: color(image, _enhance_factor(strength)),
    "Contrast": lambda image, strength: contrast(image, _enhance_factor(strength)),
    "Brightness": lambda image, strength: brightness(image, _enhance_factor(strength)),
    "Sharpness": lambda image, strength: sharpness(image, _enhance_factor(strength)),
    "ShearX": lambda image, strength: shear_x(image, _random_sign() * 0.3 * strength),
    "ShearY": lambda image, strength: shear_y(image, _random_sign() * 0.3 * strength),
    "TranslateX": lambda image, strength: translate_x(
        image, _random_sign() * TRANSLATE_PIXELS * strength
    ),
    "TranslateY": lambda image, strength: translate_y(
        image, _random_sign() * TRANSLATE_PIXELS * strength
    ),
    "Cutout": _random_cutout,
    "SolarizeAdd": lambda image, strength: solarize_add(image, int(110 * strength)),
}


def rand_augment(image: tf.Tensor, num_layers: int, magnitude: float) -> tf.Tensor:
    """Applies operations sampled uniformly with replacement, one after the other."""
    operations, strength = OPERATIONS.values(), magnitude / FULL_MAGNITUDE
    for _ in range(num_layers):
        branches = [functools.partial(operation, image, strength) for operation in operations]
        index = tf.random.uniform([], 0, len(branches), tf.int32)
        image = tf.ensure_shape(tf.switch_case(index, branches), image.shape)
    return image
