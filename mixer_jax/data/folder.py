"""A user's own folder of images, one directory a class."""

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
# What people also call them.
_LIKE_SPLITS = {_TRAIN, *_HELD_OUT, "training", "valid", "testing"}
# Of a folder without a split of its own, held out of every class.
_HELD_OUT_SHARE = 0.1


def open_folder(path: str, split: str) -> Source:
    """Opens one split of a folder of images.

    The folder holds `train/` and one or two of `validation/` (or `val/`) and `test/`, and each of
    these a directory for every class. Where there is only `train/`, or the folder holds the
    directories of the classes itself, a tenth of every class is held out as "validation": the same
    images each time, chosen by a hash of their paths. Where only one split is held out, all of its
    three names mean it. Examples are in an order that mixes the classes, so that slices do, too.
    Files whose names do not end like an image's are passed over.

    Args:
        path: of the folder, on this host.
        split: in TFDS syntax, e.g. "train", "train[:99%]", "validation", "train+validation".

    Raises:
        UserError: there is no such folder, split or class, or no image in it.
    """
    root = Path(path).expanduser()
    if not path or "://" in path or not root.is_dir():
        raise UserError(
            f"data set 'folder:{path}' is no folder of this machine; write folder:PATH, where PATH "
            "holds train/ and validation/, each with a directory of images for every class"
        )
    root = root.absolute()
    directories = _subdirectories(root)
    # A class may be called "train", too; then it holds images and no directories.
    is_split = _TRAIN in directories and bool(_subdirectories(root / _TRAIN))
    classes_at = root / _TRAIN if is_split else root
    class_names = _subdirectories(classes_at)
    _check_classes(classes_at, class_names)
    held_out = [name for name in _HELD_OUT if is_split and name in directories]
    if held_out:
        splits = {name: _list_images(root, name, class_names) for name in (_TRAIN, *held_out)}
    else:
        inside = classes_at.relative_to(root).as_posix()
        splits = _hold_out(_list_images(root, inside, class_names))
        held_out = [_HELD_OUT[0]]
    meant = split
    if len(held_out) == 1:
        meant = re.sub(rf"\b({'|'.join(_HELD_OUT)})\b", held_out[0], split)
    files = [file for part in _slices(meant, splits, root) for file in part]
    if not files:
        raise UserError(f"split {split!r} of folder {str(root)!r} has no images")
    names = tuple(map(display_path, class_names))
    return Source(f"folder:{path} {split}", _FolderExamples(root, files), names)


# The path of an image below the root, and the index of its class.
_File = tuple[str, int]


class _FolderExamples(Sequence[Example]):
    """Examples that are files; their paths are kept in one block of memory, as they are many."""

    def __init__(self, root: Path, files: list[_File]):
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
            f"folder {str(folder)!r} has no directories; it needs one with images for every class"
        )
    if {name.casefold() for name in class_names} <= _LIKE_SPLITS:
        raise UserError(
            f"folder {str(folder)!r} has {', '.join(class_names)} and no {_TRAIN} with a directory "
            f"for every class in it; rename the one to train on {_TRAIN}, the others of "
            f"{', '.join(_HELD_OUT)}"
        )


def _subdirectories(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."
    )


def _list_images(root: Path, split: str, class_names: list[str]) -> list[_File]:
    """Returns the images of all classes below `root`/`split`, ordered by a hash of their paths."""
    extra = sorted(set(_subdirectories(root / split)) - set(class_names))
    if extra:
        raise UserError(
            f"folder {str(root / split)!r} has a directory {extra[0]!r}, which is no class: "
            f"{_TRAIN}/ has none of that name"
        )
    files = []
    for label, name in enumerate(class_names):
        folder = root / split / name
        if folder.is_dir():
            images = walk_images(folder, on_error=_refuse)
            files += [(path.relative_to(root).as_posix(), label) for path in images]
    return sorted(files, key=_hash)


def _hash(file: _File) -> bytes:
    return hashlib.blake2b(os.fsencode(file[0]), digest_size=8).digest()


def _refuse(error: OSError) -> NoReturn:
    reason = error.strerror
    raise UserError(f"folder {str(error.filename)!r} cannot be read: {reason}") from error


def _hold_out(files: list[_File]) -> dict[str, list[_File]]:
    """Splits every class, where it has two images or more, by the order of the files."""
    counts = np.bincount([label for _, label in files], minlength=1)
    quotas = [max(1, round(_HELD_OUT_SHARE * count)) if count > 1 else 0 for count in counts]
    splits: dict[str, list[_File]] = {_TRAIN: [], _HELD_OUT[0]: []}
    for file in files:
        held_out = quotas[file[1]] > 0
        quotas[file[1]] -= held_out
        splits[_HELD_OUT[0] if held_out else _TRAIN].append(file)
    return splits


def _slices(split: str, splits: dict[str, list[_File]], root: Path) -> Iterator[list[_File]]:
    """Yields the parts of splits that TFDS's syntax names."""
    from tensorflow_datasets.core.splits import AbstractSplit

    sizes = {
        name: SimpleNamespace(num_examples=len(files), shard_lengths=[len(files)])
        for name, files in splits.items()
    }
    try:
        for part in AbstractSplit.from_spec(split).to_absolute(sizes):
            yield splits[part.splitname][part.from_ : part.to]
    except ValueError as error:
        raise UserError(
            f"split {split!r} of folder {str(root)!r} does not exist; it has "
            f'{", ".join(splits)} (and slices such as "train[:99%]")'
        ) from error
