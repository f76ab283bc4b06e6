"""Splits of datasets that are not TFDS's: names, slices, order, and examples that are held out."""

import functools
import hashlib
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from mixer_jax.data.source import LabelArrays
from mixer_jax.errors import UserError, suggest

TRAIN, VALIDATION, TEST = "train", "validation", "test"
# Names of splits, in the data and in split specs, in any capitalization.
SPELLINGS = {
    TRAIN: (TRAIN, "training", "train_set", "training_set", "trainset"),
    VALIDATION: (VALIDATION, "valid", "val", "dev", "validation_set", "val_set", "valset"),
    TEST: (TEST, "testing", "test_set", "testset"),
}
_SPLIT_OF = {name: split for split, names in SPELLINGS.items() for name in names}
# Fraction of every class that is held out if the data has no split for it.
_HELD_OUT_FRACTION = 0.1


class SplitSlice(NamedTuple):
    """Range of examples of one split.

    Attributes:
        split: Name of the split.
        start: Index of the first example.
        stop: Index after the last example.
    """

    split: str
    start: int
    stop: int


@functools.lru_cache
def standard_split(name: str) -> str | None:
    """Returns "train", "validation" or "test" for any common spelling; None for other names."""
    return _SPLIT_OF.get(re.sub(r"[-\s]", "_", name.casefold()))


def standardize_splits(names: Iterable[str], description: str) -> dict[str, str]:
    """Maps train, validation, test and other splits of the data to their names in the data.

    Args:
        names: Names of the splits in the data; those without another common spelling stay.
        description: Dataset, for messages, e.g. "folder '/data'".

    Raises:
        UserError: Two names are spellings of the same split.
    """
    found: dict[str, str] = {}
    for name in names:
        split = standard_split(name) or name
        if split in found:
            raise UserError(
                f"splits of {description} must have different names, got {found[split]!r} and "
                f"{name!r} for {split}. Merge or rename them."
            )
        found[split] = name
    return {name: found[name] for name in dict.fromkeys([*SPELLINGS, *found]) if name in found}


def parse_split(spec: str, sizes: Mapping[str, int], description: str) -> list[SplitSlice]:
    """Parses a split in TFDS syntax.

    Other common spellings of train, validation and test are accepted. If the data has only one of
    validation and test, it can be called by either name.

    Args:
        spec: Split in TFDS syntax, e.g. "train", "train[:99%]", "validation", "train+validation".
        sizes: Number of examples of each split; train, validation and test by these names.
        description: Dataset, for messages, e.g. "folder '/data'".

    Raises:
        UserError: The syntax is wrong, or a split or range does not exist.
    """
    from tensorflow_datasets.core.splits import AbstractSplit

    infos = {
        name: SimpleNamespace(num_examples=size, shard_lengths=[size])
        for name, size in sizes.items()
    }
    try:
        parts = list(AbstractSplit.from_spec(_resolve_names(spec, sizes)).to_absolute(infos))
    except ValueError as error:
        hint = suggest(spec, sizes) if spec.isidentifier() else ""
        raise UserError(
            f"split of {description} must be one of {', '.join(sizes)}, or slices such as "
            f'"train[:99%]", got {spec!r}.{hint}'
        ) from error
    slices = [(part.splitname, slice(part.from_, part.to)) for part in parts]
    return [SplitSlice(name, *part.indices(sizes[name])[:2]) for name, part in slices]


def select_rows(
    spec: str, rows_of: Mapping[str, np.ndarray], description: str
) -> tuple[np.ndarray, set[str]]:
    """Selects the rows of a split in TFDS syntax.

    Args:
        spec: Split, as for `parse_split`.
        rows_of: Rows of each split of the data.
        description: Dataset, for messages.

    Returns:
        The rows, and the splits of the data that they belong to.

    Raises:
        UserError: The syntax is wrong, a split or range does not exist, or it is empty.
    """
    slices = parse_split(spec, {name: len(rows) for name, rows in rows_of.items()}, description)
    rows = np.concatenate([rows_of[name][start:stop] for name, start, stop in slices])
    if not len(rows):
        raise UserError(f"split {spec!r} of {description} contains no images.")
    return rows, {name for name, _, _ in slices}


def substitution_notes(spec: str, splits: Collection[str], place: str) -> list[str]:
    """Returns a note if `spec` names validation or test, and the other one is used for it.

    Args:
        spec: Split in TFDS syntax.
        splits: Names of the splits in the data.
        place: Path or name of the dataset, for the note.
    """
    if _resolve_names(spec, splits) == _resolve_names(spec, (VALIDATION, TEST)):
        return []
    (held_out,) = _list_held_out(splits)
    return [f"{place} has one held-out split, {held_out}, which is used for {spec!r}"]


def hash_order(paths: Iterable[str]) -> np.ndarray:
    """Returns the indices that sort paths or keys by a hash, so that slices contain all classes.

    The order depends on the paths alone, not on how a system stores accented letters.
    """
    return np.argsort(hash_paths(paths), kind="stable")


def hash_paths(paths: Iterable[str]) -> np.ndarray:
    """Computes a hash of each path or key in Unicode normal form NFC; uint64 (num_paths,)."""
    return np.fromiter(map(_hash_path, paths), np.uint64)


def _hash_path(path: str) -> int:
    encoded = os.fsencode(unicodedata.normalize("NFC", path))
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big")


def hold_out(rows: np.ndarray, labels: LabelArrays) -> dict[str, np.ndarray]:
    """Divides examples into training and validation data, a tenth of every class.

    The first examples of every class are held out; classes with one example stay in training.
    Examples without a label are a class of their own. Multi-label data has no common
    stratification: a tenth of all examples is held out.

    Args:
        rows: Indices into `labels`, ordered by a hash, int (num_examples,).
        labels: Labels of the examples.

    Returns:
        Rows of "train" and "validation", both in the order of `rows`.
    """
    # Counts of classes start at 0, and NO_LABEL is -1.
    is_multi_label = labels.ends is not None
    classes = np.zeros(len(rows), np.int64) if is_multi_label else labels.values[rows] + 1
    counts = np.bincount(classes, minlength=1)
    quotas = np.where(counts > 1, np.maximum(1, np.rint(_HELD_OUT_FRACTION * counts)), 0)
    by_class = np.argsort(classes, kind="stable")
    starts = np.cumsum(counts) - counts
    ranks = np.empty(len(rows), np.int64)
    ranks[by_class] = np.arange(len(rows)) - np.repeat(starts, counts)
    is_held_out = ranks < quotas[classes]
    return {TRAIN: rows[~is_held_out], VALIDATION: rows[is_held_out]}


def _list_held_out(splits: Collection[str]) -> list[str]:
    return [name for name in splits if name in (VALIDATION, TEST)]


def _resolve_names(spec: str, splits: Collection[str]) -> str:
    """Replaces other names of splits in a spec; if one split is held out, it has all names."""
    held_out = _list_held_out(splits)

    def resolve(match: re.Match[str]) -> str:
        if match[0] in splits:
            return match[0]
        split = _SPLIT_OF.get(match[0].casefold(), match[0])
        return held_out[0] if split in (VALIDATION, TEST) and len(held_out) == 1 else split

    return re.sub(r"[^\W\d]\w*", resolve, spec)
