"""Baseline of the input pipeline: the same work in tf.data."""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from mixer_jax.benchmarks.tf_randaugment import rand_augment

VERSION: str = tf.__version__

# TensorFlow's default, which mixer_jax trains with, too: the pixels are equal.
_DCT = "INTEGER_FAST"


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

    Args:
        encoded: JPEG files, used repeatedly.
        num_batches: Length of the dataset.
        batch_size: Images per batch.
        image_size: Side of the square images, in pixels.
        min_area: Smallest area of the Inception crop, as a fraction of the image.
        decode_full_image: Whether to decode the whole image before cropping it, or only the crop.
        randaugment_layers: RandAugment operations per image; 0 turns it off.
        randaugment_magnitude: Magnitude on the scale 0-10.
        num_threads: Threads that prepare images.
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
