"""TFDS builder `digits`: the handwritten digits shipped with scikit-learn; nothing is downloaded.

1,797 scans of 8×8 pixels with 17 gray levels, from the UCI dataset "Optical Recognition of
Handwritten Digits" (Alpaydin and Kaynak, 1998).
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import cv2
import numpy as np
import tensorflow_datasets as tfds

NUM_TRAIN = 1437
NUM_TEST = 360
_CLASSES = {"all": range(10), "low": range(5), "high": range(5, 10)}


class Digits(tfds.core.GeneratorBasedBuilder):
    """Digits 0-9 ("all"), 0-4 ("low") or 5-9 ("high"), with the same split into train and test."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=name, description=f"Classes {min(digits)} to {max(digits)}.")
        for name, digits in _CLASSES.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        names = [str(digit) for digit in _CLASSES[self.builder_config.name]]
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=names),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # Nothing is downloaded.
        order = np.random.Generator(np.random.PCG64(0)).permutation(NUM_TRAIN + NUM_TEST)
        return {
            "train": self._generate_examples(order[:NUM_TRAIN]),
            "test": self._generate_examples(order[NUM_TRAIN:]),
        }

    def _generate_examples(self, indices: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        # Imported late, because scikit-learn takes longer to import than everything else together.
        from sklearn.datasets import load_digits

        scans = load_digits()
        digits = _CLASSES[self.builder_config.name]
        for index in indices.tolist():
            digit = int(scans.target[index])
            if digit in digits:
                gray = np.round(scans.images[index] * (255 / 16)).astype(np.uint8)
                _, png = cv2.imencode(".png", gray)
                yield index, {"image": png.tobytes(), "label": digits.index(digit)}
