"""Labels of TFDS datasets: features of an example, or classes computed from them.

A dataset is named NAME or NAME@LABEL. The default label is the feature `label`, or `real_label` for
datasets with several correct answers (ReaL, arXiv 2006.07159), or `labels` for those with any
number of labels. Labels of objects in an image are named by their path, `objects/label`, and are
labels of the image. The computed labels are those of
VTAB (arXiv 1910.04867), with the thresholds of its authors' code (google-research/task_adaptation,
task_adaptation/data/{clevr,dsprites,kitti,smallnorb}.py).
"""

import dataclasses
import functools
import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from mixer_jax.data.decode import BadImageError, decode
from mixer_jax.data.names import LABEL_SEPARATOR
from mixer_jax.errors import UserError

# Default labels; the first one that the dataset has is used.
_DEFAULT_LABELS = ("real_label", "label", "labels")
# TFDS's value of a label that is not public; also used for labels that cannot be computed.
_HIDDEN = -1

# Feature names, each with the names of subfeatures to read; an empty tuple selects all of it.
FeatureSelection = dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class LabelSpec:
    """Label of a dataset's examples.

    Attributes:
        features: Features from which the label is computed.
        class_names: Name of each class; empty if known only after the dataset is prepared.
        extract: Function from these features to the class indices; negative: hidden.
        multi_label: Whether an example may have any number of labels.
    """

    features: FeatureSelection
    class_names: tuple[str, ...]
    extract: Callable[[Mapping[str, Any]], tuple[int, ...]]
    multi_label: bool = False


def parse_dataset_name(name: str) -> tuple[str, str | None]:
    """Splits NAME@LABEL into name and label; the label is None without an @."""
    name, separator, label = name.partition(LABEL_SEPARATOR)
    return name, label if separator else None


def bare_dataset_name(name: str) -> str:
    """Removes config, version and label from a dataset's name."""
    return re.split(f"[/:{LABEL_SEPARATOR}]", name)[0]


def get_label_spec(name: str, features: Any) -> LabelSpec:
    """Looks up the label of a dataset.

    Args:
        name: Name of the dataset, optionally with a label.
        features: TFDS features of the dataset.

    Raises:
        UserError: The dataset has no such label, or no image. The message lists its labels.
    """
    dataset, requested = parse_dataset_name(name)
    specs = _list_label_specs(bare_dataset_name(name), features) if "image" in features else {}
    if requested is None:
        requested = next((label for label in _DEFAULT_LABELS if label in specs), None)
    if requested in specs:
        return specs[requested]
    choices = ", ".join(f"{dataset}{LABEL_SEPARATOR}{label}" for label in sorted(specs))
    if requested is not None and specs:
        raise UserError(
            f"label of dataset {dataset!r} must be one of {choices}, got {requested!r}."
        )
    not_classes = [label for label in _DEFAULT_LABELS if label in features and "image" in features]
    problem = f"{not_classes[0]} is not a class label" if not_classes else ""
    hint = f" Name one of its labels: {choices}." if specs else ""
    raise UserError(
        f"dataset {dataset!r} must have an image and a class label, got features "
        f"{', '.join(features)}{f' ({problem})' if problem else ''}.{hint}"
    )


def _list_label_specs(base_name: str, features: Any) -> dict[str, LabelSpec]:
    """Collects all labels of a dataset by name."""
    import tensorflow_datasets as tfds

    specs = {}

    def add(path: tuple[str, ...], element: Any, multi_label: bool) -> None:
        if isinstance(element, tfds.features.ClassLabel):
            # Some datasets define their classes only when they are prepared.
            class_names = () if element.num_classes is None else tuple(element.names)
            extract = functools.partial(_extract_feature, path)
            specs["/".join(path)] = LabelSpec(
                {path[0]: path[1:]}, class_names, extract, multi_label
            )

    for name, feature in features.items():
        is_sequence = hasattr(feature, "feature")
        element = feature.feature if is_sequence else feature
        add((name,), element, is_sequence)
        if is_sequence and hasattr(element, "items"):
            for part, subfeature in element.items():
                add((name, part), subfeature, True)
    for name, spec in _COMPUTED_LABELS.get(base_name, {}).items():
        # A user's dataset may have the same name but other features.
        if all(
            feature in features and all(_has_subfeature(features[feature], part) for part in parts)
            for feature, parts in spec.features.items()
        ):
            specs[name] = spec
    return specs


def _has_subfeature(feature: Any, name: str) -> bool:
    element: Any = getattr(feature, "feature", None)
    return hasattr(element, "keys") and name in element


def _extract_feature(path: tuple[str, ...], example: Mapping[str, Any]) -> tuple[int, ...]:
    value: Any = functools.reduce(operator.getitem, path, example)
    # An image may show several objects of one class.
    return tuple(dict.fromkeys(np.atleast_1d(value).tolist()))


def _count_objects(example: Mapping[str, Any]) -> tuple[int]:
    """Counts the objects of a CLEVR scene, 3 to 10; none in the test split, which hides them."""
    count = len(example["objects"]["size"])
    return (count - _MIN_OBJECTS if count else _HIDDEN,)


def _bin_nearest(distances: Sequence[float], thresholds: Sequence[float]) -> int:
    """Counts the thresholds that are less than the shortest distance."""
    return sum(min(distances) > threshold for threshold in thresholds)


def _nearest_object(example: Mapping[str, Any]) -> tuple[int]:
    """Bins the distance of the nearest object; the third coordinate is the distance."""
    distances = [float(coords[2]) for coords in example["objects"]["pixel_coords"]]
    return (_bin_nearest(distances, _OBJECT_DISTANCES) if distances else _HIDDEN,)


def _nearest_vehicle(example: Mapping[str, Any]) -> tuple[int]:
    """Bins the distance of the nearest vehicle along the camera's axis, the third coordinate."""
    objects = example["objects"]
    distances = [
        float(coords[2])
        for coords, object_type in zip(objects["location"], objects["type"], strict=True)
        if object_type in _VEHICLES
    ]
    no_vehicle = len(_VEHICLE_DISTANCES) + 1
    return (_bin_nearest(distances, _VEHICLE_DISTANCES) if distances else no_vehicle,)


def _group_values(feature: str, num_values: int, example: Mapping[str, Any]) -> tuple[int]:
    """Merges neighboring values of a feature into sixteen classes."""
    return (int(example[feature]) * _NUM_GROUPS // num_values,)


def _range_names(thresholds: Sequence[float], unit: str = "") -> tuple[str, ...]:
    """Names the classes between thresholds."""
    low, high = f"up to {thresholds[0]:g}{unit}", f"above {thresholds[-1]:g}{unit}"
    between = (f"{start:g} to {stop:g}{unit}" for start, stop in itertools.pairwise(thresholds))
    return low, *between, high


def _grouped_label(feature: str, num_values: int, name: str) -> LabelSpec:
    class_names = tuple(f"{name} {index} of {_NUM_GROUPS}" for index in range(1, _NUM_GROUPS + 1))
    extract = functools.partial(_group_values, feature, num_values)
    return LabelSpec({feature: ()}, class_names, extract)


def _named_label(feature: str, class_names: tuple[str, ...]) -> LabelSpec:
    """Specifies a feature as the label, with class names that TFDS lacks."""
    return LabelSpec({feature: ()}, class_names, functools.partial(_extract_feature, (feature,)))


_MIN_OBJECTS, _MAX_OBJECTS = 3, 10
# In CLEVR's units; no object is farther than 100.
_OBJECT_DISTANCES = (8.0, 8.5, 9.0, 9.5, 10.0)
# KITTI's object types car, van and truck.
_VEHICLES = (0, 1, 2)
# In meters; images without a vehicle are a separate class.
_VEHICLE_DISTANCES = (8.0, 20.0)
_NUM_GROUPS = 16

_COMPUTED_LABELS = {
    "clevr": {
        "count_all": LabelSpec(
            {"objects": ("size",)},
            tuple(f"{count} objects" for count in range(_MIN_OBJECTS, _MAX_OBJECTS + 1)),
            _count_objects,
        ),
        "closest_object_distance": LabelSpec(
            {"objects": ("pixel_coords",)}, _range_names(_OBJECT_DISTANCES), _nearest_object
        ),
    },
    "dsprites": {
        "x_position": _grouped_label("label_x_position", 32, "x position"),
        "orientation": _grouped_label("label_orientation", 40, "orientation"),
    },
    "kitti": {
        "closest_vehicle_distance": LabelSpec(
            {"objects": ("location", "type")},
            (*_range_names(_VEHICLE_DISTANCES, " m"), "no vehicle"),
            _nearest_vehicle,
        ),
    },
    "smallnorb": {
        "label_azimuth": _named_label("label_azimuth", tuple(f"{20 * i}°" for i in range(18))),
        "label_elevation": _named_label(
            "label_elevation", tuple(f"{30 + 5 * i}°" for i in range(9))
        ),
    },
}


def image_fixup(name: str) -> Callable[[bytes], bytes] | None:
    """Looks up the function that corrects the image files of a dataset; None: not needed."""
    return _whiten if bare_dataset_name(name) == "dsprites" else None


def _whiten(encoded: bytes) -> bytes:
    """Maps 1 to 255 in a dSprites image, whose pixels are 0 and 1.

    VTAB multiplies by 255 after decoding; here the result is encoded again, since a source yields
    image files.
    """
    try:
        image = decode(encoded)[..., 0]
    except BadImageError:
        return encoded  # The reader of the image reports what is wrong with it.
    white = np.where(image > 0, np.uint8(255), np.uint8(0))
    return cv2.imencode(".png", white)[1].tobytes()
