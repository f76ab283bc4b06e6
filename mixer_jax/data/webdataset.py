"""WebDataset: images and labels in tar shards, with random access through an index."""

import bisect
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixer_jax.data.decode import BadImageError
from mixer_jax.data.image_files import display_path
from mixer_jax.data.names import FOLDER, WEB_DATASET, split_label
from mixer_jax.data.source import (
    BAD_LABEL,
    DIGEST,
    NO_LABEL,
    Example,
    Examples,
    LabelArrays,
    Source,
    absent_class_notes,
    sort_class_names,
)
from mixer_jax.data.splits import (
    TRAIN,
    VALIDATION,
    hold_out,
    select_rows,
    standard_split,
    standardize_splits,
    substitution_notes,
)
from mixer_jax.data.tar_index import Label, Shard, describe_files, index_shards
from mixer_jax.errors import UserError, abbreviate
from mixer_jax.files import parse_json

# timm's list of the shards of each split, and CLIP benchmark's list of class names.
_INFO_FILE = "_info.json"
_CLASS_NAMES_FILE = "classnames.txt"
# Integers in their usual spelling: "007" is a name. Those of more digits are identifiers.
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_MAX_CLASSES = 1_000_000
# Largest number of paths that a pattern expands to, and of their characters.
_MAX_PATHS, _MAX_CHARACTERS = 500_000, 2**26
# A range, or alternatives, in the innermost braces.
_BRACES = re.compile(
    r"\{(?:(?P<first>\d{1,18})\.\.(?P<last>\d{1,18})|(?P<alternatives>[^{}]*,[^{}]*))\}"
)


def open_webdataset(path: str, split: str) -> Source:
    """Opens one split of a dataset in WebDataset format.

    A sample is all files of a shard that have the same name up to the first dot: an image, and its
    label in KEY.cls, or in the field "label" or "cls" of KEY.json. A label is the name of a class,
    or an integer; in JSON, it may be a list of either. If all labels are integers, they are indices
    of the classes, which `classnames.txt` names; otherwise, classes are sorted by name. A sample
    whose label is missing or not a class is a bad image.

    Splits are those of `_info.json`, as in timm's datasets, or follow from the names of the shards
    or their folders. If there is only a training split, a tenth of every class is held out as
    "validation". Examples are ordered by the hash of their names, so that slices of a split contain
    all classes, and the order does not depend on the division into shards.

    Args:
        path: Local folder that contains .tar files or folders of them; or a pattern with braces or
            wildcards such as "/data/imagenet-train-{0000..1023}.tar". Optionally with @ and the
            field of the JSON files that contains the label.
        split: Split in TFDS syntax, e.g. "train", "train[:99%]", "validation", "train+validation".

    Raises:
        UserError: A shard does not exist, or is compressed, damaged or truncated; the split does
            not exist or contains no images with labels.
    """
    location, field = _split_field(path)
    description = f"dataset '{WEB_DATASET}{path}'"
    folder, shards_of = _find_shards(location, description)
    place = display_path(folder)
    index, notes = index_shards(folder, itertools.chain(*shards_of.values()), field)
    # One split after the other.
    shards = [index.shards[name] for names in shards_of.values() for name in names]
    samples = np.concatenate([shard.samples for shard in shards])
    used, label_ids = np.unique(samples["label"], return_inverse=True)
    distinct = [index.labels[label] for label in used]
    if not any(distinct):
        raise _missing_labels_error(shards[0], field, description)
    class_names, index_of = _find_classes(distinct, folder, description)
    labels = _index_labels(distinct, index_of).select(label_ids)

    counts = {
        name: sum(len(index.shards[shard].samples) for shard in names)
        for name, names in shards_of.items()
    }
    rows_of = _order_splits(samples["hash"], counts, labels)
    if len(counts) > 1 or TRAIN not in counts:
        notes += substitution_notes(split, rows_of, place)
    rows, used_splits = select_rows(split, rows_of, description)
    selected = labels.select(rows)
    num_bad = np.count_nonzero(selected.values == NO_LABEL)
    if num_bad == len(rows):
        raise UserError(
            f"split {split!r} of {description} must contain images with labels, got {len(rows):,} "
            "images, none with a label. Use another split or field."
        )
    if num_bad:
        notes.append(f"{place}: {num_bad:,} images are bad, since their label is not a class")
    if num_skipped := sum(shard.num_skipped for shard in shards):
        notes.append(f"{place}: skipped {num_skipped:,} samples without an image")
    if TRAIN in used_splits:
        notes += absent_class_notes(class_names, selected, f"{place} {split}")
    return Source(
        f"{WEB_DATASET}{path} {split}",
        _ShardExamples(shards, rows, selected),
        class_names,
        multi_label=selected.ends is not None,
        notes=tuple(notes),
    )


def list_webdataset_splits(path: str) -> tuple[str, ...]:
    """Lists the splits of a dataset in WebDataset format, without reading its shards.

    Args:
        path: As for `open_webdataset`.

    Raises:
        UserError: There are no shards, some do not exist, or the split of some is unknown.
    """
    _, shards_of = _find_shards(_split_field(path)[0], f"dataset '{WEB_DATASET}{path}'")
    return (TRAIN, VALIDATION) if list(shards_of) == [TRAIN] else tuple(shards_of)


class _ShardExamples(Examples):
    """Examples read from shards.

    An example is bad if its label is missing or not a class.
    """

    def __init__(self, shards: list[Shard], rows: np.ndarray, labels: LabelArrays):
        """Stores the rows.

        Args:
            shards: Shards of all splits.
            rows: Index of each example into the concatenation of the shards.
            labels: Labels of each example.
        """
        self._shards, self._rows, self._labels = shards, rows, labels
        lengths = (len(shard.samples) for shard in shards)
        self._starts = list(itertools.accumulate(lengths, initial=0))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        shard, row = self._locate(index)
        labels = self.read_labels(index)
        return Example(image=shard.read(row), labels=labels, name=shard.name(row))

    def read_labels(self, index: int) -> tuple[int, ...]:
        """Returns the labels of an image, which is not read."""
        labels = self._labels.read(range(len(self))[index])
        if NO_LABEL in labels:
            shard, row = self._locate(index)
            raise BadImageError(BAD_LABEL, "", shard.name(row))
        return labels

    def fingerprint(self) -> dict[str, str]:
        """Computes digests of names and sizes of the images, and of the labels."""
        samples = np.concatenate([shard.samples for shard in self._shards])[self._rows]
        names, sizes = samples["hash"].tobytes(), samples["size"].tobytes()
        digests = [hashlib.blake2b(data, digest_size=8) for data in (names, names + sizes)]
        return {
            "images": f"{DIGEST}{'-'.join(digest.hexdigest() for digest in digests)}",
            "labels": self._labels.digest(),
        }

    def check_files(self) -> None:
        """Checks that the shards exist and have not changed since they were indexed."""
        for shard in np.unique(np.searchsorted(self._starts, self._rows, "right") - 1):
            self._shards[shard].check()

    def _locate(self, index: int) -> tuple[Shard, int]:
        """Returns the shard of an example, and the index of its sample there."""
        row = int(self._rows[range(len(self))[index]])
        shard = bisect.bisect_right(self._starts, row) - 1
        return self._shards[shard], row - self._starts[shard]


def _order_splits(
    hashes: np.ndarray, counts: Mapping[str, int], labels: LabelArrays
) -> dict[str, np.ndarray]:
    """Orders the samples of each split by the hash of their names.

    If there is only a training split, a tenth of every class is held out as "validation".

    Args:
        hashes: Hash of each sample, one split after the other.
        counts: Number of samples of each split.
        labels: Labels of each sample.

    Returns:
        Indices of the samples of each split.
    """
    rows_of = {}
    start = 0
    for name, count in counts.items():
        rows_of[name] = start + np.argsort(hashes[start : start + count], kind="stable")
        start += count
    if list(rows_of) != [TRAIN]:
        return rows_of
    return hold_out(rows_of[TRAIN], labels)


def _find_classes(
    labels: Sequence[Label], folder: Path, description: str
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Finds the classes of all labels.

    Returns:
        Name of each class, and its index by the name in labels, which may be an integer.

    Raises:
        UserError: An integer is not the index of a class.
    """
    found = set(itertools.chain.from_iterable(map(_list_classes, labels)))
    if not all(map(_INTEGER.fullmatch, found)):
        names = sort_class_names(found)
        return names, {name: label for label, name in enumerate(names)}
    largest = max(map(int, found))
    path = folder / _CLASS_NAMES_FILE
    if path.is_file():
        names = tuple(path.read_text("utf-8", "replace").splitlines())
        fix = f"Complete {display_path(path)}."
    else:
        names = tuple(map(str, range(min(largest + 1, _MAX_CLASSES))))
        fix = f"Name another field by {WEB_DATASET}PATH@FIELD."
    if largest >= len(names) or len(set(names)) < len(names):
        raise UserError(
            f"labels of {description} must be less than the number of different class names, "
            f"{len(set(names)):,}, got {largest:,}. {fix}"
        )
    return names, {str(label): label for label in range(len(names))}


def _list_classes(label: Label) -> tuple[str, ...]:
    return (label,) if isinstance(label, str) else label or ()


def _index_labels(labels: Sequence[Label], index_of: Mapping[str, int]) -> LabelArrays:
    """Converts labels to indices of classes; one that is missing or not a class is -1."""
    indices = []
    for label in labels:
        found = sorted(index_of.get(name, NO_LABEL) for name in _list_classes(label))
        indices.append([NO_LABEL] if label is None or NO_LABEL in found else found)
    values = np.array(list(itertools.chain(*indices)), np.int64)
    is_multi_label = any(isinstance(label, tuple) for label in labels)
    return LabelArrays(values, np.cumsum(list(map(len, indices))) if is_multi_label else None)


def _missing_labels_error(shard: Shard, field: str, description: str) -> UserError:
    """Makes an error that lists what the samples have instead of images with labels."""
    place = f"the field {field!r}" if field else 'KEY.cls or the field "label" or "cls"'
    return UserError(
        f"{description} must contain images such as KEY.jpg with a class, or a list of different "
        f"classes, in {place} of KEY.json, got, in {display_path(shard.path.name)}: "
        f"{describe_files(shard.path)}. Name another field by {WEB_DATASET}PATH@FIELD."
    )


def _split_field(path: str) -> tuple[str, str]:
    """Splits PATH@FIELD, unless the @ belongs to the path; the field is empty without an @."""
    if path.endswith(".tar") or os.path.lexists(os.path.expanduser(path)):
        return path, ""
    return split_label(path)


def _find_shards(location: str, description: str) -> tuple[Path, dict[str, list[str]]]:
    """Finds the shards of a folder or pattern.

    Returns:
        Absolute folder, and the paths of the shards of each split, relative to it.

    Raises:
        UserError: There are no shards, some do not exist, or the split of some is unknown.
    """
    path = os.path.abspath(os.path.expanduser(location))
    if os.path.isdir(path) and location:
        folder = Path(path)
        # Hidden files and folders are skipped.
        names = [name for part in ("*.tar", "*/*.tar") for name in glob.glob(part, root_dir=path)]
        if not names:
            raise UserError(
                f"{description} must contain .tar files, not compressed, or folders of them, got "
                f"none. For a folder of images, write {FOLDER}{location}."
            )
        if (folder / _INFO_FILE).is_file():
            return folder, _read_info(folder, names, description)
    else:
        paths = _expand_pattern(path, location, description)
        folder = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))
        names = [os.path.relpath(path, folder) for path in paths]
    found: dict[str, list[str]] = {}
    unknown: list[str] = []
    for name in sorted(set(names)):
        split = _infer_split(folder / name)
        (found.setdefault(split, []) if split else unknown).append(name)
    if unknown and found:
        raise UserError(
            f"shards of {description} must all have the name of a split, or none of them, got "
            f"{abbreviate(map(display_path, unknown))} next to "
            f"{abbreviate(display_path(names[0]) for names in found.values())}. Rename them, for "
            "example to train-0000.tar, or name the shards by a pattern."
        )
    if not found:
        return folder, {TRAIN: unknown}
    return folder, {split: found[split] for split in standardize_splits(found, description)}


def _infer_split(path: Path) -> str | None:
    """Returns the split that is named last in the name of a shard, or that of its folder."""
    words = re.split(r"[^0-9A-Za-z]+", path.stem)
    splits = [split for word in words if (split := standard_split(word))]
    return splits[-1] if splits else standard_split(path.parent.name)


def _expand_pattern(pattern: str, location: str, description: str) -> list[str]:
    """Expands a pattern to existing files.

    Args:
        pattern: Absolute path, with braces or wildcards.
        location: The same as the user wrote it.
        description: Dataset, for messages.

    Raises:
        UserError: A part of the pattern matches no file.
    """
    if os.path.isfile(pattern):
        return [pattern]
    paths, missing = [], []
    for path in expand_braces(pattern):
        # Names may contain the characters of wildcards.
        found = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
        files = list(filter(os.path.isfile, found))
        paths += files
        if not files:
            missing.append(path)
    if missing == [pattern] and not glob.has_magic(pattern):
        raise UserError(
            f"{description} must be a local folder of .tar files or a pattern of existing ones, "
            f"but {location!r} does not exist. Check the path."
        )
    if missing:
        raise UserError(
            f"{description} must be a local folder of .tar files or a pattern of existing ones, "
            f"but {location!r} matches no file for {len(missing):,} of "
            f"{len(missing) + len(paths):,} paths: {abbreviate(map(display_path, missing))}. Write "
            f"{WEB_DATASET}PATH, for example {WEB_DATASET}/data/imagenet or "
            f"'{WEB_DATASET}/data/train-{{0000..1023}}.tar'."
        )
    return paths


def expand_braces(pattern: str) -> list[str]:
    """Expands {00..11} and {a,b} as shells and the webdataset library do; sorted.

    Raises:
        UserError: The pattern expands to too many paths.
    """
    pending, paths = [pattern], set[str]()
    num_paths = num_characters = 0
    while pending:
        path = pending.pop()
        match = _BRACES.search(path)
        if match is None:
            paths.add(path)
            continue
        values: Iterable[str]
        if match["first"]:
            first, last = sorted((match["first"], match["last"]), key=int)
            numbers = range(int(first), int(last) + 1)
            count = len(numbers)
            values = (f"{number:0{len(first)}d}" for number in numbers)
        else:
            values = match["alternatives"].split(",")
            count = len(values)
        # Paths that follow from several alternatives count each time.
        num_paths += count
        num_characters += count * len(path)
        if num_paths > _MAX_PATHS or num_characters > _MAX_CHARACTERS:
            raise UserError(
                f"pattern of shards must expand to at most {_MAX_PATHS:,} paths with "
                f"{_MAX_CHARACTERS:,} characters, got {pattern!r}. Name fewer shards."
            )
        before, after = path[: match.start()], path[match.end() :]
        pending += [before + value + after for value in values]
    return sorted(paths)


def _read_info(folder: Path, names: list[str], description: str) -> dict[str, list[str]]:
    """Reads timm's list of the shards of each split.

    Args:
        folder: Folder of the dataset.
        names: Shards in the folder.
        description: Dataset, for messages.

    Raises:
        UserError: The file is damaged, or shards are missing or not listed.
    """
    path = folder / _INFO_FILE
    try:
        splits = parse_json(path.read_bytes())["splits"]
        listed = {name: list(map(str, info["filenames"])) for name, info in splits.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{display_path(path)} must list the shards of each split in JSON, as timm's datasets "
            f"do ({type(error).__name__}: {error}). Fix it, or remove it to infer the splits from "
            "the names of the shards."
        ) from error
    expected = set(itertools.chain(*listed.values()))
    if different := sorted(expected ^ set(names)):
        raise UserError(
            f"{description} must have the {len(expected):,} shards that its {_INFO_FILE} lists, "
            f"got {len(names):,}; missing or not listed: {abbreviate(map(display_path, different))}"
            ". Download them, or select shards by a pattern."
        )
    originals = standardize_splits(listed, description)
    return {split: listed[original] for split, original in originals.items()}
