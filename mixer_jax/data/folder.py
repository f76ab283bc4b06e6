"""Image folders: user datasets with one directory per class."""

import collections
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from mixer_jax.data.image_files import (
    display_path,
    has_image_suffix,
    is_ignored,
    walk_images,
)
from mixer_jax.data.labeled_files import LabeledFiles
from mixer_jax.data.source import LabelArrays, Source, normalize_names
from mixer_jax.data.splits import (
    SPELLINGS,
    TEST,
    TRAIN,
    VALIDATION,
    hash_order,
    hold_out,
    parse_split,
    standard_split,
    substitution_notes,
)
from mixer_jax.errors import UserError, abbreviate, read_error

# Path of an image relative to the root, and the index of its class.
_LabeledFile = tuple[str, int]


class _Split(NamedTuple):
    """Files of one split.

    Attributes:
        directory: Directory relative to the root; the root itself is ".".
        files: Images ordered by a hash of their paths.
        skipped: Number of other files of each class, by suffix.
    """

    directory: str
    files: list[_LabeledFile]
    skipped: dict[int, Counter[str]]


def open_folder(path: str, split: str) -> Source:
    """Opens one split of an image folder.

    The folder contains `train/` and one or two of `validation/` and `test/`, each with one
    directory per class. Other common spellings, such as `valid/` and `Test/`, are accepted. If it
    contains only `train/`, or directly the class directories, a tenth of every class is held out as
    "validation", selected by a hash of the paths. If only one split is held out, it can be called
    by either name. Examples are ordered by the hash of their paths, so that slices of a split
    contain all classes. Files without the suffix of an image format are skipped and counted in the
    notes of the source; hidden files and directories, and those of the system, are ignored.

    Args:
        path: Local folder.
        split: Split in TFDS syntax, e.g. "train", "train[:99%]", "validation", "train+validation".

    Raises:
        UserError: The folder, split or a class does not exist, a class or the split has no images,
            or the folder has directories that are neither splits nor classes.
    """
    root = _resolve_root(path)
    directories = _find_splits(root)
    parent = root / directories.get(TRAIN, "")
    classes = _class_directories(parent)
    _check_class_directories(parent, classes)
    labels = {name: label for label, name in enumerate(classes)}
    train_directory = directories.pop(TRAIN, ".")
    listed = {TRAIN: _list_files(root, train_directory, labels)}
    listed |= {name: _list_files(root, path, labels) for name, path in directories.items()}
    _check_no_class_is_empty(parent, tuple(classes), listed[TRAIN])
    # Splits that can be requested, and the directory of each.
    splits = listed if directories else _hold_out(listed[TRAIN])
    sizes = {name: len(part.files) for name, part in splits.items()}
    slices = parse_split(split, sizes, f"folder {str(root)!r}")
    files = [file for name, start, stop in slices for file in splits[name].files[start:stop]]
    used = {splits[name].directory: splits[name] for name, _, _ in slices}
    notes = [note for part in used.values() for note in _notes(root, part)]
    if not files:
        raise UserError(
            f"split {split!r} of folder {str(root)!r} contains no images."
            + "".join(f" {note}." for note in notes)
        )
    if len(classes) == 1:
        notes += _notes_on_one_class(parent, *classes.items())
    if directories:
        notes += substitution_notes(split, tuple(directories), display_path(root))
    labels_of_files = LabelArrays(np.array([label for _, label in files], np.int32))
    return Source(
        f"folder:{path} {split}",
        LabeledFiles(root, [path for path, _ in files], labels_of_files),
        tuple(classes),
        notes=tuple(notes),
    )


def list_folder_splits(path: str) -> tuple[str, ...]:
    """Lists the splits of an image folder, of which some may be held out from the training split.

    Raises:
        UserError: The folder does not exist, or has directories that are neither splits nor
            classes.
    """
    directories = _find_splits(_resolve_root(path))
    held_out = [split for split in directories if split != TRAIN]
    return TRAIN, *(held_out or [VALIDATION])


def _resolve_root(path: str) -> Path:
    root = Path(path).expanduser()
    if not path or "://" in path or not root.is_dir():
        if not path or "://" in path:
            reason = "is not a local path"
        else:
            reason = "is not a directory" if root.exists() else "does not exist"
        raise UserError(
            f"dataset 'folder:{path}' must be a local folder, but {path!r} {reason}. Write "
            "folder:PATH, where PATH contains one directory of images per class, or train/ and "
            "validation/, each with such directories."
        )
    return root.absolute()


def _find_splits(root: Path) -> dict[str, str]:
    """Returns the directory of each split; empty if the folder contains classes.

    Raises:
        UserError: Next to the training split, a directory is not a split, or two are the same one.
    """
    found = collections.defaultdict[str, list[str]](list)
    others: list[str] = []
    for name in _subdirectories(root):
        split = standard_split(name)
        (others if split is None else found[split]).append(name)
    # A class may be called "train" as well; its directory contains images and no directories.
    if not any(_subdirectories(root / name) for name in found[TRAIN]):
        return {}
    train = found[TRAIN][0]
    rule = f"folder {str(root)!r} must contain, next to {train!r}, only splits"
    if others:
        raise UserError(
            f"{rule}, got {abbreviate(map(repr, others))}. Rename it to {VALIDATION} or {TEST}, "
            "or move it away."
        )
    for split, names in found.items():
        if len(names) > 1:
            raise UserError(
                f"{rule}, one directory for each, got {' and '.join(map(repr, names))} for "
                f"{split}. Merge or rename them."
            )
    return {split: found[split][0] for split in SPELLINGS if found[split]}


def _class_directories(folder: Path) -> dict[str, str]:
    """Returns the directory of each class, sorted by the name of the class.

    Raises:
        UserError: Two directories have the same name after normalization.
    """
    directories: dict[str, str] = {}
    for directory in _subdirectories(folder):
        (name,) = normalize_names([display_path(directory)])
        if name in directories:
            both = " and ".join(map(_describe_name, (directories[name], directory)))
            raise UserError(
                f"directories of {str(folder)!r} must have different names, got two spellings of "
                f"{name!r}: {both}. Merge or rename them."
            )
        directories[name] = directory
    return dict(sorted(directories.items()))


def _describe_name(name: str) -> str:
    """Formats a name so that other spellings of the same letters look different."""
    forms = [form for form in ("NFC", "NFD") if unicodedata.is_normalized(form, name)]
    return f"{name!a} (Unicode form {' and '.join(forms) or 'neither NFC nor NFD'})"


def _check_class_directories(folder: Path, classes: dict[str, str]) -> None:
    if not classes:
        raise UserError(
            f"folder {str(folder)!r} must contain directories, one per class, got none."
            + "".join(f" {note}." for note in _notes_on_loose_images(folder))
        )
    if all(standard_split(name) for name in classes):
        raise UserError(
            f"folder {str(folder)!r} must contain {TRAIN} with one directory per class, got "
            f"{', '.join(classes)}. Rename the training split to {TRAIN}, and others to "
            f"{VALIDATION} or {TEST}."
        )
    nested = [folder / directory for directory in classes.values()]
    if all(_has_train_split(path) for path in nested):
        raise UserError(
            f"folder {str(folder)!r} must contain one directory per class, got directories that "
            f"contain a {TRAIN} split: {abbreviate(classes)}. Use folder:"
            f"{display_path(nested[0])}."
        )


def _has_train_split(folder: Path) -> bool:
    return any(
        standard_split(name) == TRAIN and bool(_subdirectories(folder / name))
        for name in _subdirectories(folder)
    )


def _check_no_class_is_empty(parent: Path, class_names: Sequence[str], train: _Split) -> None:
    counts = np.bincount([label for _, label in train.files], minlength=len(class_names))
    empty = [
        f"{name!r} ({_format_skipped(train.skipped[label]) or 'empty'})"
        for label, name in enumerate(class_names)
        if not counts[label]
    ]
    if empty:
        raise UserError(
            f"folder {str(parent)!r} must have images of each of its {len(class_names):,} classes, "
            f"got none of {abbreviate(empty)}. Add JPEG or PNG files, or remove the directories."
        )


def _subdirectories(folder: Path) -> list[str]:
    try:
        return sorted(
            entry.name
            for entry in os.scandir(folder)
            if not is_ignored(entry.name) and _is_directory(entry)
        )
    except OSError as error:
        _raise_unreadable(error)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # For example a link to itself.
        return False


def _list_files(root: Path, directory: str, labels: dict[str, int]) -> _Split:
    """Lists the images of all classes in `root`/`directory`, ordered by a hash of their paths."""
    classes = _class_directories(root / directory)
    unknown = [name for name in classes if name not in labels]
    if unknown:
        raise UserError(
            f"directories of {str(root / directory)!r} must be classes of {TRAIN}/, got "
            f"{abbreviate(map(repr, unknown))}."
        )
    files: list[_LabeledFile] = []
    skipped: dict[int, Counter[str]] = {}
    for name, class_directory in classes.items():
        names: list[str] = []
        folder = root / directory / class_directory
        images = walk_images(folder, on_error=_raise_unreadable, on_skip=names.append)
        files += [(path.relative_to(root).as_posix(), labels[name]) for path in images]
        skipped[labels[name]] = Counter(Path(name).suffix.lower() for name in names)
    order = hash_order(path for path, _ in files)
    return _Split(directory, [files[index] for index in order.tolist()], skipped)


def _raise_unreadable(error: OSError) -> NoReturn:
    raise read_error(f"folder {str(error.filename)!r} cannot be read", error) from error


def _hold_out(split: _Split) -> dict[str, _Split]:
    """Holds out a tenth of every class."""
    labels = LabelArrays(np.array([label for _, label in split.files], np.int64))
    return {
        name: split._replace(files=[split.files[row] for row in rows.tolist()])
        for name, rows in hold_out(np.arange(len(labels)), labels).items()
    }


def _notes(root: Path, split: _Split) -> Iterator[str]:
    """Yields lines about files of a split that are not used."""
    folder = root / split.directory
    skipped = _format_skipped(sum(split.skipped.values(), Counter()))
    if skipped:
        yield f"{display_path(folder)}: skipped {skipped}"
    yield from _notes_on_loose_images(folder)


def _notes_on_loose_images(folder: Path) -> Iterator[str]:
    count = sum(
        has_image_suffix(entry.name) and not is_ignored(entry.name) and os.path.isfile(entry.path)
        for entry in os.scandir(folder)
    )
    if count:
        images = "1 image that is" if count == 1 else f"{count:,} images that are"
        yield f"{display_path(folder)}: skipped {images} not in the directory of a class"


def _notes_on_one_class(parent: Path, item: tuple[str, str]) -> Iterator[str]:
    name, directory = item
    inner = _subdirectories(parent / directory)
    if inner:
        yield (
            f"{display_path(parent)} has one class, {name!r}, whose directory contains "
            f"{abbreviate(map(display_path, inner))}. If these are the classes, use folder:"
            f"{display_path(parent / directory)}"
        )


def _format_skipped(suffixes: Counter[str]) -> str:
    """Formats the number of files that are not images, and the number of each suffix."""
    total = suffixes.total()
    if not total:
        return ""
    counts = (
        f"{count:,} {display_path(suffix) or 'without suffix'}"
        for suffix, count in suffixes.most_common()
    )
    files = "file" if total == 1 else "files"
    return f"{total:,} {files} without the suffix of an image: {abbreviate(counts)}"
