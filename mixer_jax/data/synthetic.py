"""Synthetic images, to try or time a recipe without data."""

from typing import Any

import cv2
import numpy as np

from mixer_jax.data.names import SYNTHETIC
from mixer_jax.data.source import Example, Examples, Source


class _SyntheticExamples(Examples):
    """Noise images with random labels; a few encoded images are reused."""

    def __init__(self, split: str, num_classes: int, num_examples: int, image_size: int):
        self._num_classes, self._num_examples = num_classes, num_examples
        self._seed = list(split.encode())
        rng = np.random.default_rng(self._seed)
        # Coarse noise compresses like a photograph, so that decoding takes a realistic time.
        coarse = rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
        shape = (image_size, image_size)
        images = (cv2.resize(image, shape, interpolation=cv2.INTER_CUBIC) for image in coarse)
        self._encoded = [cv2.imencode(".jpg", image)[1].tobytes() for image in images]

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]  # Raises the IndexError that ends an iteration.
        return Example(
            image=self._encoded[index % len(self._encoded)],
            labels=self.read_labels(index),
            name=f"example {index}",
        )

    def read_labels(self, index: int) -> tuple[int, ...]:
        """Draws the label of an example."""
        label = np.random.default_rng([*self._seed, index]).integers(self._num_classes)
        return (int(label),)

    def fingerprint(self) -> dict[str, str]:
        """Returns the values that determine the examples, except their number and the classes."""
        return {"dataset": SYNTHETIC, "split": bytes(self._seed).decode()}


def synthetic_source(
    split: str, num_classes: int, num_examples: int, image_size: int = 256
) -> Source:
    """Generates noise images with random labels, without files.

    Args:
        split: Any text; it seeds images and labels.
        num_classes: Number of classes.
        num_examples: Number of examples.
        image_size: Side of the square images, in pixels.
    """
    examples = _SyntheticExamples(split, num_classes, num_examples, image_size)
    return Source(f"{SYNTHETIC} {split}", examples, tuple(map(str, range(num_classes))))
