"""Small fakes of the datasets of VTAB-1k and of the paper's average of five.

Each has the features of the real dataset and is written by TFDS.
"""

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

from mixer_jax.data.tfds_labels import bare_dataset_name

# Numbers of examples according to the TFDS catalog (tensorflow.org/datasets/catalog).
COUNTS = {
    "caltech101": {"train": 3060, "test": 6084},
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "clevr": {"train": 70_000, "validation": 15_000, "test": 15_000},
    "diabetic_retinopathy_detection": {
        "sample": 10,
        "train": 35_126,
        "validation": 10_906,
        "test": 42_670,
    },
    "dmlab": {"train": 65_550, "validation": 22_628, "test": 22_735},
    "dsprites": {"train": 737_280},
    "dtd": {"train": 1880, "validation": 1880, "test": 1880},
    "eurosat": {"train": 27_000},
    "imagenet2012": {"train": 1_281_167, "validation": 50_000, "test": 100_000},
    "imagenet2012_real": {"validation": 50_000},
    "kitti": {"train": 6347, "validation": 423, "test": 711},
    "oxford_flowers102": {"train": 1020, "validation": 1020, "test": 6149},
    "oxford_iiit_pet": {"train": 3680, "test": 3669},
    "patch_camelyon": {"train": 262_144, "validation": 32_768, "test": 32_768},
    "resisc45": {"train": 31_500},
    "smallnorb": {"train": 24_300, "test": 24_300},
    "sun397": {"train": 76_128, "validation": 10_875, "test": 21_750},
    "svhn_cropped": {"train": 73_257, "test": 26_032, "extra": 531_131},
}
# Datasets of JPEG files; the others are stored losslessly.
_JPEG = {
    "caltech101",
    "diabetic_retinopathy_detection",
    "dmlab",
    "dtd",
    "eurosat",
    "imagenet2012",
    "imagenet2012_real",
    "oxford_flowers102",
    "oxford_iiit_pet",
    "resisc45",
    "sun397",
}
# Number of examples in each segment between two slice bounds.
SEGMENT_SIZE = 5


@dataclasses.dataclass(frozen=True)
class SliceMap:
    """Maps slices of a dataset to slices of its fake.

    Every segment of a split between two slice bounds has the same small size in the fake, so that
    disjoint slices stay disjoint, overlapping slices overlap, and empty slices are empty.

    Attributes:
        bounds: Sorted bounds of all slices, 0 and the number of examples, by split.
    """

    bounds: dict[str, tuple[int, ...]]

    @classmethod
    def from_splits(cls, dataset: str, splits: Iterable[str]) -> "SliceMap":
        bounds = {name: {0, count} for name, count in COUNTS[bare_dataset_name(dataset)].items()}
        for split in splits:
            for name, slice_ in re.findall(r"(\w+)(?:\[(.*?)\])?", split):
                bounds[name] |= {int(bound) for bound in slice_.split(":") if bound}
        return cls({name: tuple(sorted(values)) for name, values in bounds.items()})

    def sizes(self) -> dict[str, int]:
        """Computes the number of examples of the fake by split."""
        return {name: SEGMENT_SIZE * (len(bounds) - 1) for name, bounds in self.bounds.items()}

    def translate(self, split: str) -> str:
        def map_slice(match: re.Match[str]) -> str:
            bounds = self.bounds[match[1]]
            slices = [
                str(SEGMENT_SIZE * bounds.index(int(bound))) if bound else ""
                for bound in match[2].split(":")
            ]
            return f"{match[1]}[{':'.join(slices)}]"

        return re.sub(r"(\w+)\[(.*?)\]", map_slice, split)


def real_features(dataset: str, folder: Path) -> Any:
    """Looks up the features of the real dataset."""
    return tfds.builder(dataset.partition("@")[0], data_dir=folder).info.features


def write_fake_dataset(dataset: str, sizes: dict[str, int], folder: Path) -> dict[str, list[Any]]:
    """Prepares a fake with random examples as array_record.

    Args:
        dataset: Dataset in TFDS syntax, without a label.
        sizes: Number of examples by split.
        folder: The data_dir.

    Returns:
        The examples passed to TFDS, by split.
    """
    builder = tfds.builder(dataset, data_dir=folder, file_format="array_record")
    rng = np.random.default_rng(0)
    examples = {
        split: [
            _example(bare_dataset_name(dataset), split, builder.info.features, rng)
            for _ in range(size)
        ]
        for split, size in sizes.items()
    }

    def generate(split: str) -> Iterator[tuple[int, Any]]:
        yield from enumerate(examples[split])

    # Replaces the download; everything else is the real builder.
    builder._split_generators = lambda dl_manager: {split: generate(split) for split in examples}
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_config=config)
    return examples


def _example(base: str, split: str, features: Any, rng: np.random.Generator) -> dict[str, Any]:
    example = {name: _value(base, feature, rng) for name, feature in features.items()}
    if base in _OBJECTS:
        example["objects"] = _OBJECTS[base](example["objects"], rng)
    if (base, split) == ("clevr", "test"):
        example["objects"] = []  # Hidden in the real dataset too.
    return example


def _value(base: str, feature: Any, rng: np.random.Generator) -> Any:
    """Samples a random value of a feature."""
    match feature:
        case tfds.features.Image():
            shape = [length or int(rng.integers(20, 40)) for length in feature.shape]
            pixels = rng.integers(2 if base == "dsprites" else 256, size=shape, dtype=np.uint8)
            jpeg = base in _JPEG and shape[-1] == 3
            # TFDS would import TensorFlow to encode it, which takes seconds.
            return cv2.imencode(".jpg" if jpeg else ".png", pixels)[1].tobytes()
        case tfds.features.ClassLabel():
            return int(rng.integers(feature.num_classes))
        case tfds.features.BBoxFeature():
            return tfds.features.BBox(0.1, 0.2, 0.3, 0.4)
        case tfds.features.Text():
            return f"text {rng.integers(10**9)}"
        case tfds.features.Sequence():
            return [_value(base, feature.feature, rng) for _ in range(rng.integers(5))]
        case tfds.features.FeaturesDict():
            return {name: _value(base, part, rng) for name, part in feature.items()}
        case _:
            return rng.normal(size=feature.shape).astype(np.float32)


def _clevr_objects(objects: list[Any], rng: np.random.Generator) -> list[Any]:
    """Samples 3 to 10 objects with distances as in CLEVR."""
    template = {
        "color": 0,
        "material": 0,
        "shape": 0,
        "size": 0,
        "rotation": 0.0,
        "3d_coords": np.zeros(3, np.float32),
    }
    nearest = rng.uniform(7.2, 10.8)
    return [
        {**template, "pixel_coords": np.array([9, 9, rng.uniform(nearest, 11)], np.float32)}
        for _ in range(rng.integers(3, 11))
    ]


def _kitti_objects(objects: list[Any], rng: np.random.Generator) -> list[Any]:
    """Places the objects 1 to 40 m in front of the camera."""
    return [
        {**item, "location": np.array([-50, 0, rng.uniform(1, 40)], np.float32)} for item in objects
    ]


_OBJECTS = {"clevr": _clevr_objects, "kitti": _kitti_objects}
