"""Which example stands at which place of the stream, and how it is prepared there.

The data position is the step: which examples make batch n, and how each is augmented, depends only
on (seed, n). A run that is resumed, on as many hosts or on others, sees what it would have seen.
"""

import abc
import math
from typing import Any, NamedTuple

import grain
import numpy as np

from mixer_jax.data.decode import BadImageError
from mixer_jax.data.preprocess import eval_image, train_image
from mixer_jax.data.source import Source
from mixer_jax.errors import RunError

# Substitutes for an image that cannot be used are drawn from this far into the stream.
_FAR = 2**40
# Bytes; XLA on the CPU copies an array whose address is no multiple of this.
_ALIGNMENT = 64
# So many in a row that cannot be used are no accident.
_SUBSTITUTES = 100


class BadImage(NamedTuple):
    """An image that could not be used.

    Attributes:
        name: what a person finds it by.
        reason: what is wrong, in words that are the same for all such images.
    """

    name: str
    reason: str


class LoadedBatch(NamedTuple):
    """Images ready for the device.

    Attributes:
        arrays: by name, each with one row an image.
        bad: those met on the way that could not be used.
    """

    arrays: dict[str, np.ndarray]
    bad: list[BadImage]


def shuffled_indices(source: Source, seed: int) -> grain.MapDataset:
    """Returns the endless order of training: the index of the example at each place.

    Every epoch of every part of the source is a new permutation of that part; the parts take turns
    in proportion to their weights. Reading at a place costs the same wherever it is.
    """
    parts = [
        grain.MapDataset.range(part.start, part.stop).seed(seed + number).shuffle().repeat()
        for number, part in enumerate(source.parts)
    ]
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, weights=[part.weight for part in source.parts])


class Reader(abc.ABC):
    """Prepares images at given positions; may be sent to other processes."""

    @abc.abstractmethod
    def allocate(self, count: int) -> dict[str, np.ndarray]:
        """Returns arrays of zeros for so many images, by name, each with one row an image."""

    @abc.abstractmethod
    def fill(self, positions: np.ndarray, arrays: dict[str, np.ndarray]) -> list[BadImage]:
        """Prepares the images at `positions`, (n,), in n rows of arrays fresh from `allocate`.

        Returns:
            Those met on the way that could not be used.
        """

    def __call__(self, positions: np.ndarray) -> LoadedBatch:
        """Returns the images at `positions`, (n,), in arrays of their own."""
        arrays = self.allocate(len(positions))
        return LoadedBatch(arrays, self.fill(positions, arrays))


class TrainReader(Reader):
    """Prepares training images at given places of the stream.

    Its arrays are `image` uint8 (n, image_size, image_size, 3) and `label` int32 (n,).
    """

    def __init__(self, source: Source, seed: int, image_size: int, preprocess: dict[str, Any]):
        """Takes what the images depend on.

        Args:
            source: to read from.
            seed: order and augmentation follow from it.
            image_size: side of the images, pixels.
            preprocess: keyword arguments of `train_image`.
        """
        self._source, self._seed = source, seed
        self._image_size, self._preprocess = image_size, preprocess
        self._order = shuffled_indices(source, seed)

    def allocate(self, count: int) -> dict[str, np.ndarray]:
        """As `Reader`."""
        size = self._image_size
        images = _zeros((count, size, size, 3), np.uint8)
        return {"image": images, "label": _zeros((count,), np.int32)}

    def fill(self, positions: np.ndarray, arrays: dict[str, np.ndarray]) -> list[BadImage]:
        """As `Reader`.

        Raises:
            RunFailedError: a hundred images in a row cannot be used.
        """
        images, labels = arrays["image"], arrays["label"]
        randomness = _PerExampleRng(self._seed)
        bad: list[BadImage] = []
        for row, position in enumerate(positions.tolist()):
            labels[row] = self._read(position, randomness.at(position), images[row], bad)
        return bad

    def _read(
        self, position: int, rng: np.random.Generator, out: np.ndarray, bad: list[BadImage]
    ) -> int:
        """Prepares one image and returns its label."""
        index = self._order[position]
        for _ in range(_SUBSTITUTES):
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
                return example["labels"][0]
            except BadImageError as error:
                bad.append(BadImage(error.name or name, error.reason))
            index = self._order[position + 1 + int(rng.integers(_FAR))]
        raise RunError(
            f"{self._source.name}: {_SUBSTITUTES} images in a row cannot be used, the last is "
            f"{bad[-1].name} ({bad[-1].reason})"
        )


def _zeros(shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """As `np.zeros`, but placed where JAX can use an array on the CPU without copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


class _PerExampleRng:
    """Random numbers at every place of the stream.

    Nothing of one place depends on another, so that any host can begin anywhere.
    """

    def __init__(self, seed: int):
        self._bits = np.random.Philox(key=[seed, 0])
        self._fresh = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def at(self, position: int) -> np.random.Generator:
        """Returns `Generator(Philox(key=[seed, position]))`, to be used until the next call."""
        # To set a state takes a tenth of the time that a new generator does.
        self._fresh["state"]["key"][1] = position
        self._bits.state = self._fresh
        return self._generator


class EvalReader(Reader):
    """Prepares evaluation images in the order of the source; positions beyond it are padding.

    Its arrays are `image` uint8 (n, height, width, 3); `label` int32 (n,), or where an
    example may have several labels bool (n, num_classes), true for each of them; `mask` bool (n,),
    false for what does not count: padding, images that cannot be used or have no label.
    """

    def __init__(
        self,
        source: Source,
        image_size: tuple[int, int],
        eval_crop: str,
        exif_orientation: bool,
    ):
        """Takes what the images depend on.

        Args:
            source: to read from.
            image_size: height and width of the images, pixels.
            eval_crop: as `eval_image` takes it.
            exif_orientation: likewise.
        """
        self._source, self._image_size = source, image_size
        self._settings: dict[str, Any] = {
            "eval_crop": eval_crop,
            "exif_orientation": exif_orientation,
        }

    def allocate(self, count: int) -> dict[str, np.ndarray]:
        """As `Reader`."""
        labels = _zeros((count,), np.int32)
        if self._source.multi_label:
            labels = _zeros((count, self._source.num_classes), np.bool_)
        images = _zeros((count, *self._image_size, 3), np.uint8)
        return {"image": images, "label": labels, "mask": _zeros((count,), np.bool_)}

    def fill(self, positions: np.ndarray, arrays: dict[str, np.ndarray]) -> list[BadImage]:
        """As `Reader`."""
        images, labels, mask = arrays["image"], arrays["label"], arrays["mask"]
        bad: list[BadImage] = []
        for row, position in enumerate(positions.tolist()):
            if position >= len(self._source):
                continue
            name = ""
            try:
                example = self._source.examples[position]
                name = example["name"]
                images[row] = eval_image(
                    example["image"], image_size=self._image_size, **self._settings
                )
            except BadImageError as error:
                bad.append(BadImage(error.name or name, error.reason))
                continue
            right = list(example["labels"])
            if self._source.multi_label:
                labels[row, right] = True
            else:
                labels[row] = right[0]
            mask[row] = bool(right)
        return bad
