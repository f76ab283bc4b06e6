"""A synthetic multi-label task: pictures of any number of colored shapes."""

from collections.abc import Iterator
from typing import Any, ClassVar

import cv2
import numpy as np
import tensorflow_datasets as tfds

from tests.helpers.images import encode

# The last class has no image.
NAMES = ("red square", "green disc", "blue cross", "unicorn")
SIZE = 16
COUNTS = {"train": 512, "test": 256}


def draw(index: int) -> tuple[bytes, list[int]]:
    """Draws each of three shapes with probability 0.4; returns the file and its labels."""
    rng = np.random.default_rng(index)
    image = rng.integers(0, 80, (SIZE, SIZE, 3), dtype=np.uint8)
    labels = np.flatnonzero(rng.random(3) < 0.4).tolist()
    for label in rng.permutation(labels).tolist():
        x, y = rng.integers(3, SIZE - 3, 2).tolist()
        if label == 0:
            cv2.rectangle(image, (x - 2, y - 2), (x + 2, y + 2), (255, 0, 0), -1)
        elif label == 1:
            cv2.circle(image, (x, y), 2, (0, 255, 0), -1)
        else:
            cv2.line(image, (x - 2, y - 2), (x + 2, y + 2), (0, 0, 255))
            cv2.line(image, (x - 2, y + 2), (x + 2, y - 2), (0, 0, 255))
    return encode(image, "PNG"), labels


class MixerShapes(tfds.core.GeneratorBasedBuilder):
    """Pictures of shapes, with classes, and the classes of their objects."""

    VERSION = tfds.core.Version("1.0.0")
    LABEL: ClassVar[Any] = tfds.features.ClassLabel(names=NAMES)

    def _info(self) -> Any:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "labels": tfds.features.Sequence(self.LABEL),
            "objects": tfds.features.Sequence(
                {"label": self.LABEL, "area": tfds.features.Scalar(np.int64)}
            ),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        ends = np.cumsum(list(COUNTS.values())).tolist()
        return {
            split: self._generate_examples(range(end - count, end))
            for (split, count), end in zip(COUNTS.items(), ends, strict=True)
        }

    def _generate_examples(self, indices: range) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in indices:
            image, labels = draw(index)
            # An image may show several objects of one class.
            objects = [{"label": label, "area": 25} for label in [*labels, *labels[:1]]]
            yield index, {"image": image, "labels": labels, "objects": objects}


def write_shapes(data_dir: str) -> None:
    """Writes the dataset with TFDS."""
    builder = tfds.builder("mixer_shapes", data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
