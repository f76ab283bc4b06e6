"""Which example stands at which place of the stream, and how it is prepared there.

The data position is the step: which examples make batch n, and how each is augmented, depends only
on (seed, n). A run that is resumed, on as many hosts or on others, sees what it would have seen.
"""

from typing import Any, NamedTuple

import grain
import numpy as np

from mixer_jax.data.decoding import BadImageError
from mixer_jax.data.examples import Source
from mixer_jax.data.preprocess import eval_image, train_image
from mixer_jax.errors import RunFailedError

# Substitutes for an image that cannot be used are drawn from this far into the stream.
_FAR = 2**40
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


class Prepared(NamedTuple):
    """Images ready for the device.

    Attributes:
        arrays: by name, each with one row an image.
        bad: those met on the way that could not be used.
    """

    arrays: dict[str, np.ndarray]
    bad: list[BadImage]


def example_order(source: Source, seed: int) -> grain.MapDataset:
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


class TrainReader:
    """Prepares training images at given places of the stream; may be sent to other processes."""

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
        self._order = example_order(source, seed)

    def __call__(self, positions: np.ndarray) -> Prepared:
        """Prepares the examples at `positions` of the stream, (n,).

        Returns:
            `image` uint8 (n, image_size, image_size, 3) and `label` int32 (n,).

        Raises:
            RunFailedError: a hundred images in a row cannot be used.
        """
        images = np.empty((len(positions), self._image_size, self._image_size, 3), np.uint8)
        labels = np.empty(len(positions), np.int32)
        bad: list[BadImage] = []
        for row, position in enumerate(positions.tolist()):
            images[row], labels[row] = self._read(position, bad)
        return Prepared({"image": images, "label": labels}, bad)

    def _read(self, position: int, bad: list[BadImage]) -> tuple[np.ndarray, int]:
        # Nothing of one place depends on another, so that any host can begin anywhere.
        rng = np.random.Generator(np.random.Philox(key=[self._seed, position]))
        index = self._order[position]
        for _ in range(_SUBSTITUTES):
            name = ""
            try:
                example = self._source.examples[index]
                name = example["name"]
                image = train_image(
                    example["image"], rng, image_size=self._image_size, **self._preprocess
                )
                return image, example["labels"][0]
            except BadImageError as error:
                bad.append(BadImage(error.name or name, error.reason))
            index = self._order[position + 1 + int(rng.integers(_FAR))]
        raise RunFailedError(
            f"{self._source.name}: {_SUBSTITUTES} images in a row cannot be used, the last is "
            f"{bad[-1].name} ({bad[-1].reason})"
        )


class EvalReader:
    """Prepares evaluation images in the order of the source."""

    def __init__(self, source: Source, image_size: int, eval_crop: str, exif_orientation: bool):
        """Takes what the images depend on.

        Args:
            source: to read from.
            image_size: side of the images, pixels.
            eval_crop: as `eval_image` takes it.
            exif_orientation: likewise.
        """
        self._source, self._image_size = source, image_size
        self._settings: dict[str, Any] = {
            "eval_crop": eval_crop,
            "exif_orientation": exif_orientation,
        }

    def __call__(self, positions: np.ndarray) -> Prepared:
        """Prepares the examples at `positions` of the source, (n,); those beyond it are padding.

        Returns:
            `image` uint8 (n, image_size, image_size, 3); `label` int32 (n,), or where an example
            may have several labels bool (n, num_classes), true for each of them; `mask` bool (n,),
            false for what does not count: padding, images that cannot be used or have no label.
        """
        count, size = len(positions), self._image_size
        images = np.zeros((count, size, size, 3), np.uint8)
        labels = np.zeros(count, np.int32)
        if self._source.multi_label:
            labels = np.zeros((count, self._source.num_classes), np.bool_)
        mask = np.zeros(count, np.bool_)
        bad: list[BadImage] = []
        for row, position in enumerate(positions.tolist()):
            if position >= len(self._source):
                continue
            name = ""
            try:
                example = self._source.examples[position]
                name = example["name"]
                images[row] = eval_image(example["image"], image_size=size, **self._settings)
            except BadImageError as error:
                bad.append(BadImage(error.name or name, error.reason))
                continue
            right = list(example["labels"])
            if self._source.multi_label:
                labels[row, right] = True
            else:
                labels[row] = right[0]
            mask[row] = bool(right)
        return Prepared({"image": images, "label": labels, "mask": mask}, bad)
