"""The peer of our input pipeline: the same work as a tf.data pipeline."""

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from mixer_jax.benchmarks.tf_randaugment import rand_augment

VERSION: str = tf.__version__

# TensorFlow's default, and what ours trains with: the pixels are the same.
_DCT = "INTEGER_FAST"


def keep_off_accelerators() -> None:
    """Leaves the machine's GPUs alone: an input pipeline runs on the host."""
    tf.config.set_visible_devices([], "GPU")


def training_batches(
    encoded: Sequence[bytes],
    *,
    num_batches: int,
    batch_size: int,
    image_size: int,
    min_area: float,
    decode_whole: bool,
    randaugment_layers: int,
    randaugment_magnitude: float,
    threads: int,
) -> tf.data.Dataset:
    """Returns a data set of training images: decoded, cropped at random, flipped and augmented.

    Args:
        encoded: JPEG files, used over and over.
        num_batches: how many it has.
        batch_size: images a batch.
        image_size: side of the images, pixels.
        min_area: of the inception crop, share of the image's area.
        decode_whole: whether to decode the image and then crop it, or to decode only the crop.
        randaugment_layers: RandAugment operations an image; 0 is none.
        randaugment_magnitude: on the scale 0-10.
        threads: that prepare images.
    """

    def prepare(file: tf.Tensor) -> tf.Tensor:
        shape = tf.io.extract_jpeg_shape(file)
        image = resize(crop(file, _random_box(shape, min_area), decode_whole), image_size)
        image = tf.cast(tf.image.random_flip_left_right(image), tf.uint8)
        return rand_augment(image, randaugment_layers, randaugment_magnitude)

    files = tf.data.Dataset.from_tensor_slices(list(encoded))
    return _batches(files, prepare, num_batches, batch_size, threads)


def augmented_batches(
    images: np.ndarray,
    *,
    num_batches: int,
    batch_size: int,
    randaugment_layers: int,
    randaugment_magnitude: float,
    threads: int,
) -> tf.data.Dataset:
    """Returns a data set of images with RandAugment applied; arguments as `training_batches`."""

    def prepare(image: tf.Tensor) -> tf.Tensor:
        return rand_augment(image, randaugment_layers, randaugment_magnitude)

    arrays = tf.data.Dataset.from_tensor_slices(images)
    return _batches(arrays, prepare, num_batches, batch_size, threads)


def _batches(
    inputs: tf.data.Dataset,
    prepare: Callable[[tf.Tensor], tf.Tensor],
    num_batches: int,
    batch_size: int,
    threads: int,
) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = threads
    # Parallel over images, so that no operation needs to be parallel inside.
    options.threading.max_intra_op_parallelism = 1
    images = inputs.repeat().take(num_batches * batch_size)
    # Nothing in it is Python that depends on an image.
    prepare = tf.autograph.experimental.do_not_convert(prepare)
    images = images.map(prepare, num_parallel_calls=threads, deterministic=True)
    return images.batch(batch_size, drop_remainder=True).prefetch(2).with_options(options)


def _random_box(shape: tf.Tensor, min_area: float) -> tf.Tensor:
    """Draws the inception crop: top, left, height, width."""
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        shape,
        tf.zeros([1, 0, 4]),
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(min_area, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], size[:2]], axis=0)


def crop(file: tf.Tensor, box: tf.Tensor, decode_whole: bool) -> tf.Tensor:
    """Returns the part of a JPEG file in a box (top, left, height, width), uint8."""
    if not decode_whole:
        return tf.io.decode_and_crop_jpeg(file, box, channels=3, dct_method=_DCT)
    top, left, height, width = tf.unstack(box)
    image = tf.io.decode_jpeg(file, channels=3, dct_method=_DCT)
    return image[top : top + height, left : left + width]


def resize(image: tf.Tensor, image_size: int) -> tf.Tensor:
    """Resizes to a square without antialiasing, float32."""
    return tf.image.resize(image, [image_size, image_size], antialias=False)
