"""What an example of a TFDS data set is judged on: one of its features, or computed from them.

A data set is named NAME or NAME@LABEL. Without a label it is the feature `label`, or `real_label`
where there are several right answers (ReaL, arXiv 2006.07159). Computed are those of VTAB (arXiv
1910.04867), with the thresholds of its authors' code (google-research/task_adaptation,
task_adaptation/data/{clevr,dsprites,kitti,smallnorb}.py).
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from mixer_jax.errors import UserError

LABEL_SEPARATOR = "@"
# Features that are taken where no label is named, the first found.
_USUAL = ("real_label", "label")
# What a hidden label is to TFDS, and here one that cannot be computed.
_HIDDEN = -1

# Names of features, each with those inside it; none: it is wanted whole.
Needed = dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class LabelSpec:
    """What the examples of a data set are judged on.

    Attributes:
        needed: the features that it is read from.
        class_names: a name for each class; empty: known when the data set is prepared.
        read: returns the indices of an example's classes, given these features; negative: hidden.
        multi_label: whether there may be several right answers, or none.
    """

    needed: Needed
    class_names: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], tuple[int, ...]]
    multi_label: bool = False


def parse_dataset_name(name: str) -> tuple[str, str | None]:
    """Returns a data set's name without its label, and the label; None: none is named."""
    name, mark, label = name.partition(LABEL_SEPARATOR)
    return name, label if mark else None


def bare_dataset_name(name: str) -> str:
    """Returns what a data set is called, without configuration, version and label."""
    return re.split(f"[/:{LABEL_SEPARATOR}]", name)[0]


def get_label_spec(name: str, features: Any) -> LabelSpec:
    """Returns what the examples of a data set are judged on.

    Args:
        name: of the data set, perhaps with a label.
        features: that it has, in TFDS's form.

    Raises:
        UserError: it has no such label, or no image; says which labels it has.
    """
    dataset, wanted = parse_dataset_name(name)
    labels = _all_labels(bare_dataset_name(name), features) if "image" in features else {}
    if wanted is None:
        wanted = next((usual for usual in _USUAL if usual in labels), None)
    if wanted in labels:
        return labels[wanted]
    choice = ", ".join(f"{dataset}{LABEL_SEPARATOR}{label}" for label in sorted(labels))
    if wanted is not None and labels:
        raise UserError(f"data set {dataset!r} has no label {wanted!r}; it has {choice}")
    unfit = [usual for usual in _USUAL if usual in features and "image" in features]
    missing = f"{unfit[0]} is no class label" if unfit else "needed are an image and a label"
    advice = f"; name one of its labels: {choice}" if labels else ""
    raise UserError(f"data set {dataset!r} has features {', '.join(features)}; {missing}{advice}")


def _all_labels(base: str, features: Any) -> dict[str, LabelSpec]:
    """Returns every label that a data set has, by its name."""
    import tensorflow_datasets as tfds

    labels = {}
    for feature, kind in features.items():
        several, one = hasattr(kind, "feature"), getattr(kind, "feature", kind)
        if isinstance(one, tfds.features.ClassLabel):
            # Some sets learn their classes from what they are made of, when they are prepared.
            class_names = () if one.num_classes is None else tuple(one.names)
            read = functools.partial(_read_feature, feature)
            labels[feature] = LabelSpec({feature: ()}, class_names, read, several)
    for name, label in _COMPUTED.get(base, {}).items():
        # Another data set may have the same name.
        if all(
            feature in features and all(_has(features[feature], part) for part in parts)
            for feature, parts in label.needed.items()
        ):
            labels[name] = label
    return labels


def _has(kind: Any, part: str) -> bool:
    """Says whether a feature is a sequence of several, one of that name among them."""
    inner: Any = getattr(kind, "feature", None)
    return hasattr(inner, "keys") and part in inner


def _read_feature(feature: str, example: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(np.atleast_1d(example[feature]).tolist())


def _count_objects(example: Mapping[str, Any]) -> tuple[int]:
    """CLEVR's scenes have 3 to 10 objects; those of its test split have none, which hides them."""
    count = len(example["objects"]["size"])
    return (count - _FEWEST_OBJECTS if count else _HIDDEN,)


def _bin(distances: Sequence[float], thresholds: Sequence[float]) -> int:
    """Returns how many thresholds the shortest distance exceeds; an equal one it does not."""
    return sum(min(distances) > threshold for threshold in thresholds)


def _nearest_object(example: Mapping[str, Any]) -> tuple[int]:
    """The third of the coordinates in an image is the distance from the camera."""
    distances = [float(place[2]) for place in example["objects"]["pixel_coords"]]
    return (_bin(distances, _OBJECT_DISTANCES) if distances else _HIDDEN,)


def _nearest_vehicle(example: Mapping[str, Any]) -> tuple[int]:
    """The third of the coordinates is the distance along the camera's axis, in metres."""
    objects = example["objects"]
    distances = [
        float(place[2])
        for place, kind in zip(objects["location"], objects["type"], strict=True)
        if kind in _VEHICLES
    ]
    return (_bin(distances, _VEHICLE_DISTANCES) if distances else len(_VEHICLE_DISTANCES) + 1,)


def _group(feature: str, values: int, example: Mapping[str, Any]) -> tuple[int]:
    """Joins neighbouring values of a feature to sixteen classes."""
    return (int(example[feature]) * _GROUPS // values,)


def _ranges(thresholds: Sequence[float], unit: str = "") -> tuple[str, ...]:
    """Returns names for the classes between thresholds."""
    low, high = f"up to {thresholds[0]:g}{unit}", f"above {thresholds[-1]:g}{unit}"
    between = (f"{start:g} to {stop:g}{unit}" for start, stop in itertools.pairwise(thresholds))
    return low, *between, high


def _grouped(feature: str, values: int, what: str) -> LabelSpec:
    names = tuple(f"{what} {number} of {_GROUPS}" for number in range(1, _GROUPS + 1))
    return LabelSpec({feature: ()}, names, functools.partial(_group, feature, values))


def _named(feature: str, class_names: tuple[str, ...]) -> LabelSpec:
    """Returns the label that a feature is, with names that TFDS does not give its classes."""
    return LabelSpec({feature: ()}, class_names, functools.partial(_read_feature, feature))


_FEWEST_OBJECTS, _MOST_OBJECTS = 3, 10
# CLEVR's units; no object is farther than 100.
_OBJECT_DISTANCES = (8.0, 8.5, 9.0, 9.5, 10.0)
# Car, van and truck, of KITTI's kinds of objects.
_VEHICLES = (0, 1, 2)
# Metres; images without a vehicle are a class of their own.
_VEHICLE_DISTANCES = (8.0, 20.0)
_GROUPS = 16

_COMPUTED = {
    "clevr": {
        "count_all": LabelSpec(
            {"objects": ("size",)},
            tuple(f"{count} objects" for count in range(_FEWEST_OBJECTS, _MOST_OBJECTS + 1)),
            _count_objects,
        ),
        "closest_object_distance": LabelSpec(
            {"objects": ("pixel_coords",)}, _ranges(_OBJECT_DISTANCES), _nearest_object
        ),
    },
    "dsprites": {
        "x_position": _grouped("label_x_position", 32, "x position"),
        "orientation": _grouped("label_orientation", 40, "orientation"),
    },
    "kitti": {
        "closest_vehicle_distance": LabelSpec(
            {"objects": ("location", "type")},
            (*_ranges(_VEHICLE_DISTANCES, " m"), "no vehicle"),
            _nearest_vehicle,
        ),
    },
    "smallnorb": {
        "label_azimuth": _named("label_azimuth", tuple(f"{20 * i}°" for i in range(18))),
        "label_elevation": _named("label_elevation", tuple(f"{30 + 5 * i}°" for i in range(9))),
    },
}


def image_fixup(name: str) -> Callable[[bytes], bytes] | None:
    """Returns what makes the images of a data set look as they are meant; None: they do already."""
    return _whiten if bare_dataset_name(name) == "dsprites" else None


def _whiten(encoded: bytes) -> bytes:
    """Makes white what is 1 in a file of dSprites, whose pixels are 0 and 1: black to the eye.

    VTAB multiplies them by 255 after decoding; here everything after this reads image files.
    """
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_GRAYSCALE)
    if image is None:
        return encoded  # Whoever decodes it later tells what is wrong.
    white = np.where(image > 0, np.uint8(255), np.uint8(0))
    return cv2.imencode(".png", white)[1].tobytes()
