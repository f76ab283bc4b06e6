"""Reading and preprocessing examples at positions of the training or evaluation stream.

The position in the data is the step: which examples form batch n, and how each is augmented, is a
pure function of (seed, n). A run resumed on any number of hosts sees the same batches.
"""

import abc
import math
import statistics
from typing import Any, NamedTuple

import grain
import numpy as np

from mixer_jax.data.decode import BadImageError, decode
from mixer_jax.data.permutation import PixelPermutation
from mixer_jax.data.preprocess import CROP_FRACTION, eval_image, train_image
from mixer_jax.data.source import Source
from mixer_jax.errors import RunError

# Substitutes for bad images are drawn from up to this many positions ahead in the stream.
_SUBSTITUTE_RANGE = 2**40
# If this many substitutes in a row are bad as well, the dataset is unusable.
_MAX_SUBSTITUTES = 100
# In bytes; on CPU, XLA copies arrays that are not aligned to it.
_ALIGNMENT = 64
# Number of images that are decoded to estimate the image size of a dataset.
_AREA_SAMPLES = 16


class BadImage(NamedTuple):
    """Image that could not be used.

    Attributes:
        name: Path or name by which a person finds the image.
        reason: The problem, worded identically for all images that have it.
    """

    name: str
    reason: str


class LoadedBatch(NamedTuple):
    """Preprocessed images on the host.

    Attributes:
        arrays: Arrays by name, each with one row per image.
        bad_images: Images that could not be used.
    """

    arrays: dict[str, np.ndarray]
    bad_images: list[BadImage]


def shuffled_indices(source: Source, seed: int) -> grain.MapDataset:
    """Maps each position of the endless training stream to the index of an example.

    Every epoch of every component of the source is a new permutation of that component; components
    alternate in proportion to their weights. Access takes constant time at any position.
    """
    orders = [
        grain.MapDataset.range(component.start, component.stop)
        .seed(seed + number)
        .shuffle()
        .repeat()
        for number, component in enumerate(source.components)
    ]
    if len(orders) == 1:
        return orders[0]
    weights = [component.weight for component in source.components]
    return grain.MapDataset.mix(orders, weights=weights)


class Reader(abc.ABC):
    """Reads and preprocesses the examples at given positions; can be pickled for workers."""

    @abc.abstractmethod
    def allocate(self, num_rows: int) -> dict[str, np.ndarray]:
        """Allocates zeroed arrays by name, each with one row per image."""

    @abc.abstractmethod
    def fill(self, positions: np.ndarray, arrays: dict[str, np.ndarray]) -> list[BadImage]:
        """Preprocesses the images at `positions`, (n,), into n rows of zeroed arrays.

        Returns:
            Images that could not be used.
        """

    def __call__(self, positions: np.ndarray) -> LoadedBatch:
        """Preprocesses the images at `positions`, (n,), into new arrays."""
        arrays = self.allocate(len(positions))
        return LoadedBatch(arrays, self.fill(positions, arrays))


class TrainReader(Reader):
    """Reads training examples: shuffled, augmented, with substitutes for bad images.

    Its arrays are `image` uint8 (n, image_size, image_size, 3), and `label` int32 (n,) or, for
    multi-label sources, bool (n, num_classes).
    """

    def __init__(self, source: Source, seed: int, image_size: int, preprocess: dict[str, Any]):
        """Stores the settings that determine the images.

        Args:
            source: Source of the examples.
            seed: Seed of order and augmentation.
            image_size: Side of the images, in pixels.
            preprocess: Keyword arguments of `train_image`.
        """
        self._source, self._seed = source, seed
        self._image_size, self._preprocess = image_size, preprocess
        self._indices = shuffled_indices(source, seed)

    def allocate(self, num_rows: int) -> dict[str, np.ndarray]:
        """Allocates `image` and `label`."""
        size = self._image_size
        images = _aligned_zeros((num_rows, size, size, 3), np.uint8)
        return {"image": images, "label": _allocate_labels(self._source, num_rows)}

    def fill(self, positions: np.ndarray, arrays: dict[str, np.ndarray]) -> list[BadImage]:
        """Preprocesses the images at `positions`, (n,), into n rows of `arrays`.

        Raises:
            RunError: A hundred images in a row cannot be used.
        """
        images, labels = arrays["image"], arrays["label"]
        rngs = _PerExampleRng(self._seed)
        bad_images: list[BadImage] = []
        for row, position in enumerate(positions.tolist()):
            targets = self._read(position, rngs.at(position), images[row], bad_images)
            _set_labels(labels, row, targets)
        return bad_images

    def _read(
        self, position: int, rng: np.random.Generator, out: np.ndarray, bad_images: list[BadImage]
    ) -> tuple[int, ...]:
        """Preprocesses one image, or a substitute, into `out` and returns its labels."""
        index = self._indices[position]
        for _ in range(_MAX_SUBSTITUTES):
            name = ""
            try:
                example = self._source.examples[index]
                name = example["name"]
                train_image(
                    example["image"],
                    rng,
                    image_size=self._image_size,
                    **self._preprocess,
                    out=out,
                )
                return example["labels"]
            except BadImageError as error:
                bad_images.append(BadImage(error.name or name, error.reason))
            index = self._indices[position + 1 + int(rng.integers(_SUBSTITUTE_RANGE))]
        raise RunError(
            f"{self._source.name}: {_MAX_SUBSTITUTES} images in a row cannot be used; the last is "
            f"{bad_images[-1].name} ({bad_images[-1].reason})."
        )


class EvalReader(Reader):
    """Reads evaluation examples in the order of the source; positions past its end are padding.

    Its arrays are `image` uint8 (n, height, width, 3); `label` int32 (n,), or bool
    (n, num_classes) for multi-label sources; and `mask` bool (n,), which is False for padding, bad
    images and, unless they count, images without labels.
    """

    def __init__(
        self,
        source: Source,
        image_size: tuple[int, int],
        eval_crop: str,
        exif_orientation: bool,
        eval_crop_fraction: float = CROP_FRACTION,
        permutation: PixelPermutation | None = None,
        count_unlabeled: bool = False,
    ):
        """Stores the settings that determine the images.

        Args:
            source: Source of the examples.
            image_size: Height and width of the images, in pixels.
            eval_crop: Evaluation crop; see `eval_image`.
            exif_orientation: Whether to apply the EXIF orientation.
            eval_crop_fraction: Side of the crop, as a fraction of the resized image's.
            permutation: Permutation of the pixels.
            count_unlabeled: Whether images without labels count: they have none of the classes.
        """
        self._source, self._image_size = source, image_size
        self._count_unlabeled = count_unlabeled
        self._preprocess: dict[str, Any] = {
            "eval_crop": eval_crop,
            "eval_crop_fraction": eval_crop_fraction,
            "exif_orientation": exif_orientation,
            "permutation": permutation,
        }

    def allocate(self, num_rows: int) -> dict[str, np.ndarray]:
        """Allocates `image`, `label` and `mask`."""
        labels = _allocate_labels(self._source, num_rows)
        images = _aligned_zeros((num_rows, *self._image_size, 3), np.uint8)
        return {"image": images, "label": labels, "mask": _aligned_zeros((num_rows,), np.bool_)}

    def fill(self, positions: np.ndarray, arrays: dict[str, np.ndarray]) -> list[BadImage]:
        """Preprocesses the images at `positions`, (n,), into n rows of `arrays`."""
        images, labels, mask = arrays["image"], arrays["label"], arrays["mask"]
        bad_images: list[BadImage] = []
        for row, position in enumerate(positions.tolist()):
            if position >= len(self._source):
                continue
            name = ""
            try:
                example = self._source.examples[position]
                name = example["name"]
                images[row] = eval_image(
                    example["image"], image_size=self._image_size, **self._preprocess
                )
            except BadImageError as error:
                bad_images.append(BadImage(error.name or name, error.reason))
                continue
            _set_labels(labels, row, example["labels"])
            mask[row] = bool(example["labels"]) or self._count_unlabeled
        return bad_images


def median_image_area(source: Source) -> float:
    """Estimates the median image area, in square pixels, from images spread over a source.

    Bad images are skipped; the result is 0 if all are bad.
    """
    num_samples = min(_AREA_SAMPLES, len(source))
    areas = []
    for sample in range(num_samples):
        try:
            example = source.examples[sample * len(source) // num_samples]
            height, width = decode(example["image"]).shape[:2]
        except BadImageError:
            continue
        areas.append(height * width)
    return statistics.median(areas) if areas else 0.0


def _allocate_labels(source: Source, num_rows: int) -> np.ndarray:
    if source.multi_label:
        return _aligned_zeros((num_rows, source.num_classes), np.bool_)
    return _aligned_zeros((num_rows,), np.int32)


def _set_labels(labels: np.ndarray, row: int, targets: tuple[int, ...]) -> None:
    """Sets a zeroed row of multi-hot labels, or a single label."""
    if labels.ndim == 2:
        labels[row, list(targets)] = True
    else:
        labels[row] = targets[0]


def _aligned_zeros(shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """Allocates a zeroed array that JAX can use on CPU without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


class _PerExampleRng:
    """Independent random generators for every position, reusing one generator object."""

    def __init__(self, seed: int):
        self._bit_generator = np.random.Philox(key=[seed, 0])
        self._state = self._bit_generator.state
        self._generator = np.random.Generator(self._bit_generator)

    def at(self, position: int) -> np.random.Generator:
        """Resets to `Generator(Philox(key=[seed, position]))`; valid until the next call."""
        # Setting the state takes a tenth of the time of constructing a generator.
        self._state["state"]["key"][1] = position
        self._bit_generator.state = self._state
        return self._generator
