"""WebDataset: images and labels in tar shards, with random access through an index."""

import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixer_jax.data.decode import BadImageError
from mixer_jax.data.image_files import display_path, is_ignored
from mixer_jax.data.names import FOLDER, WEB_DATASET, split_label
from mixer_jax.data.source import DIGEST, Example, Examples, Source, normalize_names
from mixer_jax.data.splits import (
    TRAIN,
    VALIDATION,
    hold_out,
    parse_split,
    standard_split,
    standardize_splits,
    substitution_notes,
)
from mixer_jax.data.tar_index import (
    Samples,
    ShardIndex,
    format_member,
    index_shards,
    join_shards,
    read_member,
)
from mixer_jax.errors import MissingFileError, RunError, UserError, abbreviate

# timm's description of the splits, and CLIP benchmark's list of class names.
_INFO_FILES = ("_info.json", "info.json")
_CLASS_NAMES_FILE = "classnames.txt"
_COMPRESSED_SHARDS = ("*.tar.gz", "*.tgz", "*.tar.bz2", "*.tar.xz", "*.tar.zst")
_BAD_LABEL = "label is missing or not a class"
# Larger integers are identifiers rather than classes.
_MAX_CLASSES = 1_000_000
_MAX_SHARDS = 1_000_000
# A range, or alternatives, in the innermost braces.
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")
_ALTERNATIVES = re.compile(r"\{([^{}]*,[^{}]*)\}")


class _Shards(NamedTuple):
    """Shards of a dataset.

    Attributes:
        folder: Folder to which the names of the shards are relative.
        paths: Path of each shard by its name.
        splits: Names of the shards of each split.
        num_samples: Number of samples of shards, according to `_info.json`.
        notes: Lines for the user.
    """

    folder: Path
    paths: dict[str, Path]
    splits: dict[str, list[str]]
    num_samples: dict[str, int]
    notes: list[str]


class _Classes(NamedTuple):
    """Classes of a dataset.

    Attributes:
        names: Name of each class.
        label_sets: Class indices of each distinct label, and () for a label that is missing, which
            is the last one.
        is_valid: Whether each label consists of classes; bool (num_labels + 1,).
        is_negative: Whether each label is a negative number, by which timm marks samples that are
            not in a subset of the classes; bool (num_labels + 1,).
        multi_label: Whether labels are lists.
        have_names: Whether labels are names, and not integers.
    """

    names: tuple[str, ...]
    label_sets: list[tuple[int, ...]]
    is_valid: np.ndarray
    is_negative: np.ndarray
    multi_label: bool
    have_names: bool


def open_webdataset(path: str, split: str) -> Source:
    """Opens one split of a dataset in WebDataset format.

    A sample is all files of a shard that have the same name up to the first dot: an image, and its
    label in KEY.cls, or in the field "label" or "cls" of KEY.json. A label is an integer or a name;
    in JSON, it may be a list of either. Splits are those of `_info.json`, as in timm's datasets, or
    follow from the names of the shards or their folders. Without a validation or test split, a
    tenth of every class is held out. Examples are ordered by the hash of their names, so that
    slices of a split contain all classes, and the order does not depend on the division into
    shards. A sample whose label is missing or not a class is a bad image.

    Args:
        path: Local folder that contains .tar files or folders of them; or a pattern with braces or
            wildcards such as "/data/imagenet-train-{0000..1023}.tar". Optionally with @ and the
            field of the JSON files that contains the label.
        split: Split in TFDS syntax, e.g. "train", "train[:99%]", "validation", "train+validation".

    Raises:
        UserError: A shard does not exist, or is compressed, damaged or truncated; labels are not
            classes; or the split does not exist or contains no images with labels.
    """
    location, field = _split_field(path)
    description = f"dataset '{WEB_DATASET}{path}'"
    shards = _find_shards(location, description)
    place = display_path(shards.folder)
    indexes, notes = index_shards(shards.folder, shards.paths, field)
    notes = [*shards.notes, *notes]
    samples, labels, shard_ids = join_shards(indexes[name] for name in shards.paths)
    _check_labels(samples, list(indexes.values()), field, description)
    classes = _find_classes(samples, labels, shards.folder, description, notes)

    indices = _order_splits(samples, shard_ids, shards, classes)
    if len(shards.splits) > 1 or TRAIN not in shards.splits:
        notes += substitution_notes(split, tuple(indices), place)
    slices = parse_split(split, {name: len(part) for name, part in indices.items()}, description)
    selected = [indices[name][start:stop] for name, start, stop in slices]
    chosen = np.concatenate([np.zeros(0, np.int64), *selected])
    notes += _notes_on_shards(shards, indexes, [name for name, _, _ in slices])
    notes += _notes_on_labels(samples, shards, classes, chosen)
    if not classes.is_valid[samples.label_ids[chosen]].any():
        raise UserError(
            f"split {split!r} of {description} contains no images with labels."
            + "".join(f" {note}." for note in notes)
        )
    if TRAIN in indices:
        present = samples.label_ids[indices[TRAIN]]
        is_held_out = len(shards.splits) == 1
        notes += _check_train_classes(present, classes, is_held_out, description, place)
    examples = _ShardExamples(
        [shards.folder / name for name in shards.paths],
        [indexes[name].size for name in shards.paths],
        shard_ids[chosen],
        samples.take(chosen),
        labels,
        classes,
    )
    return Source(
        f"{WEB_DATASET}{path} {split}",
        examples,
        classes.names,
        multi_label=classes.multi_label,
        notes=tuple(notes),
    )


def _order_splits(
    samples: Samples, shard_ids: np.ndarray, shards: _Shards, classes: _Classes
) -> dict[str, np.ndarray]:
    """Returns the indices of the samples of each split, ordered by the hash of their names.

    Samples with negative labels are left out. Without another split, a tenth of the training split
    is held out.
    """
    order = np.argsort(samples.hashes, kind="stable")
    order = order[~classes.is_negative[samples.label_ids[order]]]
    number_of = {name: number for number, name in enumerate(shards.paths)}
    indices = {
        split: order[np.isin(shard_ids[order], [number_of[name] for name in names])]
        for split, names in shards.splits.items()
    }
    if list(indices) != [TRAIN]:
        return indices
    train = indices[TRAIN]
    num_classes = len(classes.names)
    # Samples whose label is not a class are divided like a class of their own.
    by_label = [label_set[0] if label_set else num_classes for label_set in classes.label_sets]
    labels = np.zeros(len(train), np.int64)
    if not classes.multi_label:
        labels = np.array(by_label, np.int64)[samples.label_ids[train]]
    rest, held_out = hold_out(labels)
    return {TRAIN: train[rest], VALIDATION: train[held_out]}


def list_webdataset_splits(path: str) -> tuple[str, ...]:
    """Lists the splits of a dataset in WebDataset format, without reading its shards.

    Raises:
        UserError: There are no shards, some do not exist, or the split of some is unknown.
    """
    splits = _find_shards(_split_field(path)[0], f"dataset '{WEB_DATASET}{path}'").splits
    return (TRAIN, VALIDATION) if list(splits) == [TRAIN] else tuple(splits)


class _ShardExamples(Examples):
    """Examples read from shards; the names are stored as one byte string to save memory."""

    def __init__(
        self,
        paths: list[Path],
        shard_sizes: list[int],
        shard_ids: np.ndarray,
        samples: Samples,
        labels: list[str],
        classes: _Classes,
    ):
        self._paths, self._shard_sizes, self._shard_ids = paths, shard_sizes, shard_ids
        self._samples = samples._replace(names=np.zeros(0, np.uint8))
        self._names = samples.names.tobytes()
        self._ends = np.cumsum(samples.name_lengths, dtype=np.int64)
        self._labels = labels
        self._label_sets, self._is_valid = classes.label_sets, classes.is_valid

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        labels = self.read_labels(index)
        samples, name = self._samples, self._name(index)
        image = read_member(
            self._paths[self._shard_ids[index]],
            offset=int(samples.offsets[index]),
            size=int(samples.sizes[index]),
            header_crc=int(samples.header_crcs[index]),
            name=name,
        )
        return Example(image=image, labels=labels, name=name)

    def read_labels(self, index: int) -> tuple[int, ...]:
        """Returns the label of an image, which is in the index.

        Raises:
            BadImageError: The label is missing or not a class.
        """
        label_id = self._samples.label_ids[index]
        if not self._is_valid[label_id]:
            detail = self._labels[label_id] if label_id >= 0 else ""
            raise BadImageError(_BAD_LABEL, detail, self._name(index))
        return self._label_sets[label_id]

    def fingerprint(self) -> dict[str, str]:
        """Computes digests of names and sizes of the images, and of the labels."""
        # The last one is that of a label that is missing.
        digests = "".join(_digest(label.encode()) for label in [*self._labels, ""])
        labels = np.frombuffer(bytes.fromhex(digests), np.uint64)[self._samples.label_ids]
        names, sizes = self._samples.hashes.tobytes(), self._samples.sizes.tobytes()
        return {
            "images": f"{DIGEST}{_digest(names)}-{_digest(names + sizes)}",
            "labels": _digest(labels.tobytes()),
        }

    def check_files(self) -> None:
        """Checks that every shard exists, and has the size that it had when it was indexed."""
        for shard_id in np.unique(self._shard_ids).tolist():
            path, expected = self._paths[shard_id], self._shard_sizes[shard_id]
            try:
                size = path.stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                raise MissingFileError(f"{display_path(path)} does not exist.") from None
            except OSError as error:
                raise RunError(f"{display_path(path)} cannot be read: {error.strerror}.") from error
            if size != expected:
                raise RunError(
                    f"{display_path(path)} must have {expected:,} bytes, as when it was indexed, "
                    f"got {size:,}. Copy it again."
                )

    def _name(self, index: int) -> str:
        stop = self._ends[index]
        name = os.fsdecode(self._names[stop - self._samples.name_lengths[index] : stop])
        return f"{display_path(self._paths[self._shard_ids[index]])}/{format_member(name)}"


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _split_field(path: str) -> tuple[str, str]:
    """Splits PATH@FIELD, unless the @ belongs to the path; the field is empty without an @."""
    if path.endswith(".tar") or os.path.lexists(os.path.expanduser(path)):
        return path, ""
    return split_label(path)


def expand_braces(pattern: str) -> list[str]:
    """Expands {00..11}, {00..10..2} and {a,b} as shells and the webdataset library do; sorted.

    Raises:
        UserError: The pattern has too many expansions.
    """
    pending, expanded = [pattern], set[str]()
    while pending:
        text = pending.pop()
        match = _RANGE.search(text) or _ALTERNATIVES.search(text)
        if match is None:
            expanded.add(text)
            continue
        is_range = match.re is _RANGE
        values = _expand_range(*match.groups()) if is_range else match[1].split(",")
        if len(values) + len(pending) + len(expanded) > _MAX_SHARDS:
            raise UserError(
                f"pattern {pattern!r} must have at most {_MAX_SHARDS:,} expansions. Check its "
                "ranges."
            )
        pending += [f"{text[: match.start()]}{value}{text[match.end() :]}" for value in values]
    return sorted(expanded)


def _expand_range(first: str, last: str, step: str | None) -> list[str]:
    start, stop = int(first), int(last)
    direction = 1 if start <= stop else -1
    numbers = range(start, stop + direction, direction * (int(step or 1) or 1))
    # Bounds that start with zeros pad all numbers to the same width.
    is_padded = any(len(bound) > len(str(int(bound))) for bound in (first, last))
    width = max(len(first), len(last)) if is_padded else 0
    return [f"{number:0{width}d}" for number in itertools.islice(numbers, _MAX_SHARDS + 1)]


def _find_shards(location: str, description: str) -> _Shards:
    """Finds the shards of a folder or pattern, and the split of each.

    Raises:
        UserError: There are no shards, some do not exist, or the split of some is unknown.
    """
    expanded = _check_local(location, description)
    is_folder = os.path.isdir(expanded)
    paths = _list_shards(expanded, description) if is_folder else _expand(expanded, description)
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    folder = Path(expanded if is_folder else common)
    shards = {path.relative_to(folder).as_posix(): path for path in sorted(map(Path, set(paths)))}
    splits, num_samples, notes = _read_info(folder, description)
    if splits and is_folder:
        listed = dict.fromkeys(itertools.chain.from_iterable(splits.values()))
        if missing := [name for name in listed if name not in shards]:
            raise UserError(
                f"{description} must contain the {len(listed):,} shards that its "
                f"{_INFO_FILES[0]} lists, got {len(listed) - len(missing):,}, without "
                f"{abbreviate(missing)}. Download them, or name the others by a pattern."
            )
        if others := [name for name in shards if name not in listed]:
            names = abbreviate(map(display_path, others))
            notes.append(
                f"{display_path(folder)}: skipped shards that {_INFO_FILES[0]} does not list: "
                f"{names}"
            )
    else:
        split_of = {name: split for split, names in splits.items() for name in names}
        splits = _infer_splits(shards, split_of, description)
    used = set(itertools.chain.from_iterable(splits.values()))
    shards = {name: path for name, path in shards.items() if name in used}
    return _Shards(folder, shards, splits, num_samples, notes)


def _check_local(location: str, description: str) -> str:
    """Returns an absolute path or pattern.

    Raises:
        UserError: It is not a path, or there is nothing at the path.
    """
    path = os.path.abspath(os.path.expanduser(location)) if location else ""
    if not path or "://" in location or location.startswith("pipe:"):
        reason = "is not a local path"
    elif not os.path.lexists(path) and not re.search(r"[{*?[]", path):
        reason = "does not exist"
    else:
        return path
    raise UserError(
        f"{description} must be a local folder of .tar files or a pattern, but {location!r} "
        f"{reason}. Write {WEB_DATASET}PATH, for example {WEB_DATASET}/data/imagenet or "
        f"{WEB_DATASET}/data/imagenet-train-{{0000..1023}}.tar."
    )


def _list_shards(folder: str, description: str) -> list[str]:
    """Lists the .tar files in a folder and in its folders.

    Raises:
        UserError: There are none.
    """
    root = Path(folder)
    paths = [
        path
        for pattern in ("*.tar", "*/*.tar")
        for path in root.glob(pattern)
        if path.is_file() and not any(map(is_ignored, path.relative_to(root).parts))
    ]
    if paths:
        return list(map(str, paths))
    compressed = [path.name for suffix in _COMPRESSED_SHARDS for path in root.glob(suffix)]
    fix = f"For a folder of images, write {FOLDER}{folder}."
    if compressed:
        fix = f"Unpack {compressed[0]!r} and others like it, for example by gunzip."
    raise UserError(
        f"{description} must contain .tar files, or folders of .tar files, got none. {fix}"
    )


def _expand(pattern: str, description: str) -> list[str]:
    """Expands a pattern to existing files.

    Raises:
        UserError: A part of the pattern matches no file.
    """
    if os.path.isfile(pattern):
        return [pattern]
    paths, missing = [], []
    for path in expand_braces(pattern):
        if os.path.isfile(path):
            paths.append(path)
            continue
        matches = [match for match in glob.glob(path, recursive=True) if os.path.isfile(match)]
        paths += matches
        if not matches:
            missing.append(path)
    if missing:
        raise UserError(
            f"shards of {description} must exist, got none for {len(missing):,} of "
            f"{len(missing) + len(paths):,} paths: {abbreviate(map(display_path, missing))}. Check "
            "the path, and quote patterns so that the shell does not expand them."
        )
    return paths


def _read_info(
    folder: Path, description: str
) -> tuple[dict[str, list[str]], dict[str, int], list[str]]:
    """Reads timm's description of a dataset.

    Returns:
        Shards of each split, number of samples by shard, and lines for the user; all empty without
        such a file.

    Raises:
        UserError: The file is damaged.
    """
    path = next((folder / name for name in _INFO_FILES if (folder / name).is_file()), None)
    if path is None:
        return {}, {}, []
    splits: dict[str, list[str]] = {}
    num_samples: dict[str, int] = {}
    notes = []
    try:
        info = json.loads(path.read_bytes()).get("splits", {})
        for split, original in standardize_splits(info, description).items():
            splits[split] = [str(name) for name in info[original]["filenames"]]
            lengths = info[original].get("shard_lengths", ())
            num_samples |= dict(zip(splits[split], map(int, lengths), strict=False))
            if field := info[original].get("alt_label"):
                notes.append(
                    f"{display_path(path)}: split {original!r} has labels in the field {field!r}, "
                    f"which @{field} selects"
                )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"info file {display_path(path)} must list the shards of each split in JSON, as timm's "
            f"datasets do ({type(error).__name__}: {error}). Fix it, or remove it to infer the "
            "splits from the names of the shards."
        ) from error
    return splits, num_samples, notes


def _infer_splits(
    shards: Mapping[str, Path], split_of: Mapping[str, str], description: str
) -> dict[str, list[str]]:
    """Returns the shards of each split, by their names and those of their folders.

    Raises:
        UserError: Only some shards have the name of a split.
    """
    found: dict[str, list[str]] = {}
    unknown = []
    for name, path in shards.items():
        split = split_of.get(name) or _split_of_name(path)
        if split is None:
            unknown.append(name)
        else:
            found.setdefault(split, []).append(name)
    if unknown and found:
        raise UserError(
            f"shards of {description} must all have the name of a split, or none of them, got "
            f"{abbreviate(map(display_path, unknown))} next to "
            f"{abbreviate(display_path(names[0]) for names in found.values())}. Rename them, for "
            "example to train-0000.tar, or name the shards by a pattern."
        )
    if not found:
        return {TRAIN: unknown}
    return {split: found[split] for split in standardize_splits(found, description)}


def _split_of_name(path: Path) -> str | None:
    """Returns the split that is named last in the name of a shard, or that of its folder."""
    words = re.split(r"[^0-9A-Za-z]+", path.stem)
    splits = [split for word in words if (split := standard_split(word))]
    return splits[-1] if splits else standard_split(path.parent.name)


def _check_labels(
    samples: Samples, indexes: list[ShardIndex], field: str, description: str
) -> None:
    """Checks that there are images and labels.

    Raises:
        UserError: There are none. The message lists what the samples have instead.
    """
    if np.any(samples.label_ids >= 0):
        return
    extensions = dict.fromkeys(itertools.chain.from_iterable(i.extensions for i in indexes))
    files = abbreviate((f".{format_member(extension)}" for extension in extensions), 10) or "none"
    if not len(samples.label_ids):
        raise UserError(
            f"shards of {description} must contain images, such as KEY.jpg, got files with the "
            f"extensions {files}."
        )
    names = dict.fromkeys(itertools.chain.from_iterable(index.fields for index in indexes))
    fields = abbreviate(map(format_member, names), 20)
    hint = f" JSON files have the fields {fields}." if fields else ""
    if field:
        rule = f"must have the field {field!r} in KEY.json, with a class or a list of classes"
        fix = "Name another field."
    else:
        rule = 'must have a label in KEY.cls, or in the field "label" or "cls" of KEY.json'
        fix = f"Name a field by {WEB_DATASET}PATH@FIELD." if fields else "Write the shards again."
    raise UserError(f"images of {description} {rule}, got the extensions {files}.{hint} {fix}")


def _find_classes(
    samples: Samples, labels: list[str], folder: Path, description: str, notes: list[str]
) -> _Classes:
    """Finds the classes of all labels.

    Integers are indices of the classes, which are named by them or by `classnames.txt`; names are
    sorted.

    Raises:
        UserError: Labels are of different types, lists repeat a class, or integers are too large.
    """
    ids = np.flatnonzero(np.bincount(samples.label_ids + 1)[1:]).tolist()
    values = {label_id: json.loads(labels[label_id]) for label_id in ids}
    lists = {i: value if isinstance(value, list) else [value] for i, value in values.items()}
    multi_label = any(isinstance(value, list) for value in values.values())
    is_negative = np.zeros(len(labels) + 1, np.bool_)
    is_valid = np.zeros(len(labels) + 1, np.bool_)
    for label_id, items in lists.items():
        has_negative = min((item for item in items if isinstance(item, int)), default=0) < 0
        is_negative[label_id] = has_negative and items == [values[label_id]]
        is_valid[label_id] = not has_negative
        if len(set(items)) < len(items):
            raise UserError(
                f"labels of {description} must be lists of different classes, got "
                f"{labels[label_id]}. Write the indices of the classes instead of a vector."
            )
    items = [item for i, items in lists.items() if is_valid[i] for item in items]
    names = sorted({item for item in items if isinstance(item, str)})
    have_names = bool(names)
    numbers = {item for item in items if isinstance(item, int)}
    if names and numbers:
        raise UserError(
            f"labels of {description} must be all integers or all names, got {min(numbers)} and "
            f"{names[0]!r}."
        )
    if numbers:
        names = _name_integers(max(numbers), folder, description, notes)
        index_of: dict[int | str, int] = {number: number for number in numbers}
    else:
        index_of = {name: index for index, name in enumerate(names)}
    label_sets: list[tuple[int, ...]] = [()] * (len(labels) + 1)
    for i, items in lists.items():
        if is_valid[i]:
            label_sets[i] = tuple(sorted(index_of[item] for item in items))
    return _Classes(tuple(names), label_sets, is_valid, is_negative, multi_label, have_names)


def _name_integers(largest: int, folder: Path, description: str, notes: list[str]) -> list[str]:
    """Returns the names of classes that labels name by integers.

    Raises:
        UserError: The largest integer is not the index of a class.
    """
    path = folder / _CLASS_NAMES_FILE
    if path.is_file():
        names = list(normalize_names(path.read_text("utf-8", "replace").splitlines()))
        if len(set(names)) == len(names):
            if largest >= len(names):
                raise UserError(
                    f"labels of {description} must be less than {len(names):,}, the number of "
                    f"classes in {display_path(path)}, got {largest}. Add the missing names."
                )
            return names
        notes.append(f"{display_path(path)} is not used, since it repeats names of classes")
    if largest >= _MAX_CLASSES:
        raise UserError(
            f"labels of {description} must be less than {_MAX_CLASSES:,}, got {largest}. Name "
            f"another field by {WEB_DATASET}PATH@FIELD."
        )
    return [str(number) for number in range(largest + 1)]


def _check_train_classes(
    label_ids: np.ndarray, classes: _Classes, is_held_out: bool, description: str, place: str
) -> list[str]:
    """Returns a note if classes have no training images, as in a part of a dataset.

    Raises:
        UserError: They are names that only another split of the data has, perhaps misspelled.
    """
    present_ids = np.flatnonzero(np.bincount(label_ids + 1)[1:]).tolist()
    present = {index for label_id in present_ids for index in classes.label_sets[label_id]}
    empty = [name for index, name in enumerate(classes.names) if index not in present]
    if not empty:
        return []
    if classes.have_names and not is_held_out:
        raise UserError(
            f"{description} must have training images of each of its {len(classes.names):,} "
            f"classes, got none of {abbreviate(map(repr, empty))}. Correct the labels of the other "
            "splits."
        )
    return [
        f"{place}: {len(empty):,} of {len(classes.names):,} classes have no training images: "
        f"{abbreviate(empty)}"
    ]


def _notes_on_shards(
    shards: _Shards, indexes: Mapping[str, ShardIndex], splits: Iterable[str]
) -> Iterator[str]:
    """Yields lines about files that are not used, and about shards that may be incomplete."""
    place = display_path(shards.folder)
    # A split that is held out has the shards of the training split.
    used = itertools.chain.from_iterable(shards.splits.get(s, shards.paths) for s in splits)
    indexes = {name: indexes[name] for name in used}
    for count, what in (
        (sum(index.num_without_image for index in indexes.values()), "samples without an image"),
        (sum(index.num_not_regular for index in indexes.values()), "links and special files"),
    ):
        if count:
            yield f"{place}: skipped {count:,} {what}"
    lengths = {
        name: len(index.samples.offsets) + index.num_without_image
        for name, index in indexes.items()
    }
    expected = shards.num_samples
    for names, what in (
        ([name for name in indexes if not lengths[name]], "without samples"),
        (
            [name for name in indexes if expected.get(name, lengths[name]) != lengths[name]],
            f"with another number of samples than in {_INFO_FILES[0]}",
        ),
    ):
        if names:
            listed = abbreviate(map(display_path, names))
            yield f"{place}: {len(names):,} shards {what}, which may be incomplete: {listed}"


def _notes_on_labels(
    samples: Samples, shards: _Shards, classes: _Classes, chosen: np.ndarray
) -> Iterator[str]:
    """Yields lines about labels that are not classes, and about copies of images."""
    place = display_path(shards.folder)
    if count := np.count_nonzero(~classes.is_valid[samples.label_ids[chosen]]):
        yield f"{place}: {count:,} images are bad, since their label is missing or not a class"
    if count := np.count_nonzero(classes.is_negative[samples.label_ids]):
        yield f"{place}: skipped {count:,} images with a negative label"
    # The header has name, size and time. Names alone may start anew in every shard.
    headers = samples.hashes ^ samples.header_crcs.astype(np.uint64)
    if count := np.count_nonzero(np.diff(np.sort(headers)) == 0):
        yield f"{place}: {count:,} images have the name, size and time of another one, as copies do"
