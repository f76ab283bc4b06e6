"""Image folders: user datasets with one directory per class."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np

from mixer_jax.data.image_files import display_path, read_image, walk_images
from mixer_jax.data.source import Example, Source
from mixer_jax.errors import UserError

FOLDER = "folder:"

_TRAIN = "train"
_HELD_OUT = ("validation", "val", "test")
# Directories with these names, also spelled differently, are likely splits and not classes.
_SPLIT_LIKE = {_TRAIN, *_HELD_OUT, "training", "valid", "testing"}
# Fraction of every class that is held out if the folder has no split for it.
_HELD_OUT_FRACTION = 0.1

# Path of an image relative to the root, and the index of its class.
_LabeledFile = tuple[str, int]


def open_folder(path: str, split: str) -> Source:
    """Opens one split of an image folder.

    The folder contains `train/` and one or two of `validation/` (or `val/`) and `test/`, each with
    one directory per class. If it contains only `train/`, or directly the class directories, a
    tenth of every class is held out as "validation", selected by a hash of the paths. If only one
    split is held out, it can be called by any of the three names. Examples are ordered by the hash
    of their paths, so that slices of a split contain all classes. Files without the suffix of an
    image format are skipped.

    Args:
        path: Local folder.
        split: Split in TFDS syntax, e.g. "train", "train[:99%]", "validation", "train+validation".

    Raises:
        UserError: The folder, split or a class does not exist, or the split has no images.
    """
    root = Path(path).expanduser()
    if not path or "://" in path or not root.is_dir():
        raise UserError(
            f"dataset 'folder:{path}' must be a local folder. Write folder:PATH, where PATH "
            "contains train/ and validation/, each with one directory of images per class."
        )
    root = root.absolute()
    directories = _subdirectories(root)
    # A class may be called "train" as well; its directory contains images and no directories.
    has_splits = _TRAIN in directories and bool(_subdirectories(root / _TRAIN))
    class_parent = root / _TRAIN if has_splits else root
    class_names = _subdirectories(class_parent)
    _check_classes(class_parent, class_names)
    held_out = [name for name in _HELD_OUT if has_splits and name in directories]
    if held_out:
        splits = {name: _list_files(root, name, class_names) for name in (_TRAIN, *held_out)}
    else:
        relative = class_parent.relative_to(root).as_posix()
        splits = _hold_out(_list_files(root, relative, class_names))
        held_out = [_HELD_OUT[0]]
    spec = split
    if len(held_out) == 1:
        spec = re.sub(rf"\b({'|'.join(_HELD_OUT)})\b", held_out[0], split)
    files = [file for part in _slice_splits(spec, splits, root) for file in part]
    if not files:
        raise UserError(f"split {split!r} of folder {str(root)!r} contains no images.")
    names = tuple(map(display_path, class_names))
    return Source(f"folder:{path} {split}", _FolderExamples(root, files), names)


class _FolderExamples(Sequence[Example]):
    """Examples read from files; the paths are stored as one byte string to save memory."""

    def __init__(self, root: Path, files: list[_LabeledFile]):
        self._root = root
        paths = [os.fsencode(path) for path, _ in files]
        self._paths = b"".join(paths)
        self._ends = np.cumsum([len(path) for path in paths])
        self._labels = np.array([label for _, label in files], np.int32)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        path = self._root / os.fsdecode(self._paths[start : self._ends[index]])
        labels = (int(self._labels[index]),)
        return Example(image=read_image(path), labels=labels, name=display_path(path))


def _check_classes(folder: Path, class_names: list[str]) -> None:
    if not class_names:
        raise UserError(
            f"folder {str(folder)!r} must contain directories, one per class, got none."
        )
    if {name.casefold() for name in class_names} <= _SPLIT_LIKE:
        raise UserError(
            f"folder {str(folder)!r} must contain {_TRAIN} with one directory per class, got "
            f"{', '.join(class_names)}. Rename the training split to {_TRAIN}, and others to one "
            f"of {', '.join(_HELD_OUT)}."
        )


def _subdirectories(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."
    )


def _list_files(root: Path, split: str, class_names: list[str]) -> list[_LabeledFile]:
    """Lists the images of all classes in `root`/`split`, ordered by a hash of their paths."""
    unknown = sorted(set(_subdirectories(root / split)) - set(class_names))
    if unknown:
        raise UserError(
            f"directories of {str(root / split)!r} must be classes of {_TRAIN}/, got "
            f"{unknown[0]!r}."
        )
    files = []
    for label, name in enumerate(class_names):
        folder = root / split / name
        if folder.is_dir():
            images = walk_images(folder, on_error=_raise_unreadable)
            files += [(path.relative_to(root).as_posix(), label) for path in images]
    return sorted(files, key=_path_hash)


def _path_hash(file: _LabeledFile) -> bytes:
    return hashlib.blake2b(os.fsencode(file[0]), digest_size=8).digest()


def _raise_unreadable(error: OSError) -> NoReturn:
    reason = error.strerror
    raise UserError(f"folder {str(error.filename)!r} cannot be read: {reason}.") from error


def _hold_out(files: list[_LabeledFile]) -> dict[str, list[_LabeledFile]]:
    """Holds out the first files of every class; a class with one image stays in training."""
    counts = np.bincount([label for _, label in files], minlength=1)
    quotas = [max(1, round(_HELD_OUT_FRACTION * count)) if count > 1 else 0 for count in counts]
    splits: dict[str, list[_LabeledFile]] = {_TRAIN: [], _HELD_OUT[0]: []}
    for file in files:
        held_out = quotas[file[1]] > 0
        quotas[file[1]] -= held_out
        splits[_HELD_OUT[0] if held_out else _TRAIN].append(file)
    return splits


def _slice_splits(
    spec: str, splits: dict[str, list[_LabeledFile]], root: Path
) -> Iterator[list[_LabeledFile]]:
    """Yields the slices of `splits` selected by `spec`, a split in TFDS syntax."""
    from tensorflow_datasets.core.splits import AbstractSplit

    sizes = {
        name: SimpleNamespace(num_examples=len(files), shard_lengths=[len(files)])
        for name, files in splits.items()
    }
    try:
        for part in AbstractSplit.from_spec(spec).to_absolute(sizes):
            yield splits[part.splitname][part.from_ : part.to]
    except ValueError as error:
        raise UserError(
            f"split of folder {str(root)!r} must be one of {', '.join(splits)}, or slices such as "
            f'"train[:99%]", got {spec!r}.'
        ) from error
