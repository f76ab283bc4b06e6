"""Manifests: tables of image files with labels, as CSV or JSONL."""

import csv
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from mixer_jax.data.image_files import display_path
from mixer_jax.data.labeled_files import LabeledFiles
from mixer_jax.data.names import MANIFEST, split_label
from mixer_jax.data.source import LabelArrays, Source, normalize_names, sort_class_names
from mixer_jax.data.splits import (
    SPELLINGS,
    TRAIN,
    hash_paths,
    hold_out,
    select_rows,
    standard_split,
    substitution_notes,
)
from mixer_jax.errors import UserError, abbreviate, read_error
from mixer_jax.files import parse_json

_PATH, _LABEL, _LABELS, _SPLIT = "path", "label", "labels", "split"
# Between the labels of one image in CSV.
_SEPARATOR = "|"
# Number of the line and cells by column of each row.
_Rows = Iterator[tuple[int, dict[str, Any]]]


def open_manifest(path: str, split: str) -> Source:
    """Opens one split of a manifest.

    A manifest is a CSV file with a header, or a JSONL file with one object per line, in UTF-8. Its
    columns are `path`, relative to the folder of the manifest or absolute; `label`, or `labels` for
    any number of labels per image (in CSV separated by "|", in JSONL a list); and optionally
    `split`: train, validation or test, or another common spelling of one.

    Classes are sorted by name, or by value if all of them are integers. As for folders, a tenth of
    every class is held out as "validation" if no row has another split than train, and examples are
    ordered by a hash of their paths, so that slices of a split contain all classes. A file that
    does not exist is a bad image; the number of such files is in the notes of the source.

    Args:
        path: Local file, optionally with @ and the column of the label.
        split: Split in TFDS syntax, e.g. "train", "train[:99%]", "validation", "train+validation".

    Raises:
        UserError: The file, split or a column does not exist; a row is not well-formed; an image is
            listed twice; a class has no row in the training split; or no image exists.
    """
    table = _read_table(path)
    rows, _ = select_rows(split, table.splits, table.description)
    examples: Any = _ManifestFiles(
        table.file.parent, (table.paths[row] for row in rows.tolist()), table.labels.select(rows)
    )
    place = display_path(table.file)
    notes = [
        f"{place}: {note}" for note in (*table.notes, *_notes_on_missing_files(table, examples))
    ]
    notes += [] if table.is_held_out else substitution_notes(split, table.splits, place)
    multi_label = table.labels.ends is not None
    return Source(
        f"{MANIFEST}{path} {split}", examples, table.class_names, multi_label, notes=tuple(notes)
    )


def list_manifest_splits(path: str) -> tuple[str, ...]:
    """Lists the splits of a manifest; "validation" may be held out from the training split.

    Args:
        path: Local file, optionally with @ and the column of the label.

    Raises:
        UserError: The file does not exist or is not well-formed.
    """
    return tuple(name for name, rows in _read_table(path).splits.items() if len(rows))


class _ManifestFiles(LabeledFiles):
    """Files whose labels, unlike those of folders, do not follow from their paths."""

    def fingerprint(self) -> dict[str, str]:
        """Computes digests of names and sizes of the files, and one of the labels."""
        return super().fingerprint() | {"labels": self.labels.digest()}


class _Table(NamedTuple):
    """Rows of a manifest.

    Attributes:
        file: Absolute path of the manifest.
        description: Name of the manifest, for messages.
        paths: Path of each row's image: relative to the folder of the manifest, or absolute.
        labels: Labels of all rows, as indices into `class_names`.
        class_names: Name of each class.
        splits: Rows of each split, ordered by a hash of their paths.
        is_held_out: Whether "validation" is held out from the training split.
        notes: Lines for the user about columns that are not used.
    """

    file: Path
    description: str
    paths: list[str]
    labels: LabelArrays
    class_names: tuple[str, ...]
    splits: dict[str, np.ndarray]
    is_held_out: bool
    notes: list[str]


class _InvalidRowError(Exception):
    """A row is not well-formed; the arguments are the line, the rule and the value."""


def _find_file(path: str) -> tuple[Path, str]:
    """Returns the absolute path of a manifest, and the column of the label or ""."""
    # The name of a file may contain an @.
    for name, label in ((path, ""), split_label(path)):
        file = Path(name).expanduser()
        if file.is_file():
            return file.absolute(), label
    raise UserError(
        f"dataset '{MANIFEST}{path}' must be a local CSV or JSONL file that exists, got {name!r}. "
        f"Write {MANIFEST}FILE, where FILE has the columns {_PATH} and {_LABEL}."
    )


def _read_table(path: str) -> _Table:
    """Reads a manifest.

    Raises:
        UserError: The file cannot be read, or is not well-formed.
    """
    file, label = _find_file(path)
    description, suffix = f"manifest {str(file)!r}", file.suffix.lower()
    if suffix not in _READERS:
        raise UserError(
            f"{description} must have the suffix {' or '.join(_READERS)}, got {suffix or 'none'}."
        )
    prefix = os.path.join(file.parent, "")
    paths: list[str] = []
    labels: list[list[str]] = []
    splits: list[str] = []
    columns: list[str] = []
    multi_label = False
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            for line, row in _READERS[suffix](stream):
                if not columns:
                    columns, label = list(row), _find_label_column(row, label)
                    multi_label = isinstance(row[label], list)
                for name in (_PATH, label, _SPLIT):
                    if (name in row) != (name in columns):
                        rule = f"have the columns {', '.join(columns)} in each row"
                        raise _InvalidRowError(line, rule, ", ".join(row) or "no columns")
                paths.append(_normalize_path(line, row[_PATH], prefix))
                labels.append(_read_labels(line, row[label], multi_label))
                splits.append(_read_split(line, row.get(_SPLIT, TRAIN)))
    except _InvalidRowError as error:
        line, rule, got = error.args
        raise UserError(f"{description} must {rule}, got {got} in line {line:,}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{description} must be UTF-8, got another encoding.") from error
    except OSError as error:
        raise read_error(f"{description} cannot be read", error) from error
    if not paths:
        raise UserError(
            f"{description} must have a row for each image below the columns {_PATH} and {_LABEL}, "
            "got none."
        )
    class_names = sort_class_names({name for names in labels for name in names})
    _check_classes(description, class_names, labels, splits)
    index_of = {name: index for index, name in enumerate(class_names)}
    values = np.array([index_of[name] for names in labels for name in names], np.int32)
    ends = np.cumsum(list(map(len, labels))) if multi_label else None
    label_arrays = LabelArrays(values, ends)
    rows_of, is_held_out = _divide_rows(description, paths, splits, label_arrays)
    ignored = [repr(name) for name in columns if name not in (_PATH, label, _SPLIT)]
    notes = [f"ignored columns {abbreviate(ignored)}"] if ignored else []
    return _Table(file, description, paths, label_arrays, class_names, rows_of, is_held_out, notes)


def _read_csv(stream: Iterable[str]) -> _Rows:
    """Yields the rows of a CSV file; several labels are a list."""
    reader = csv.reader(stream, strict=True)
    try:
        columns = [name.strip() for name in next(reader, [])]
        if len(set(columns)) < len(columns):
            raise _InvalidRowError(1, "have columns with different names", ", ".join(columns))
        for cells in filter(None, reader):
            if len(cells) != len(columns):
                rule = f"have {len(columns)} cells in each row"
                raise _InvalidRowError(reader.line_num, rule, str(len(cells)))
            row: dict[str, Any] = dict(zip(columns, cells, strict=True))
            if _LABELS in row:
                row[_LABELS] = row[_LABELS].split(_SEPARATOR) if row[_LABELS].strip() else []
            yield reader.line_num, row
    except csv.Error as error:
        raise _InvalidRowError(reader.line_num, "be CSV", str(error)) from error


def _read_jsonl(stream: Iterable[str]) -> _Rows:
    """Yields the objects of a JSONL file."""
    for line, text in enumerate(stream, 1):
        if text.isspace():
            continue
        try:
            row = parse_json(text)
        except ValueError as error:
            raise _InvalidRowError(line, "have one JSON object per line", "invalid JSON") from error
        if not isinstance(row, dict):
            raise _InvalidRowError(line, "have one JSON object per line", type(row).__name__)
        yield line, row


_READERS: Mapping[str, Callable[[Any], _Rows]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
}


def _find_label_column(row: Mapping[str, Any], requested: str) -> str:
    """Finds the column of the label in the first row."""
    found = [name for name in ([requested] if requested else [_LABEL, _LABELS]) if name in row]
    if _PATH not in row or len(found) != 1:
        rule = f"{_PATH} and {requested or f'one of {_LABEL} and {_LABELS}'}"
        raise _InvalidRowError(
            1,
            f"have the columns {rule} (or another label, by {MANIFEST}FILE@COLUMN)",
            ", ".join(row),
        )
    return found[0]


def _normalize_path(line: int, path: Any, prefix: str) -> str:
    """Checks a path; one below the folder of the manifest is relative, as in a folder."""
    try:
        is_valid = path and "://" not in path and b"\0" not in os.fsencode(path)
    except (TypeError, UnicodeEncodeError):
        is_valid = False
    if not is_valid:
        raise _InvalidRowError(line, "have the path of a local file in each row", repr(path))
    path = path.removeprefix(prefix)
    return str(PurePosixPath(path)) if "./" in path or "//" in path else path


def _read_labels(line: int, cell: Any, multi_label: bool) -> list[str]:
    """Returns the names of the classes of a row, without repetitions."""
    if isinstance(cell, list) != multi_label:
        rule = "a list of labels" if multi_label else "one label, not a list,"
        raise _InvalidRowError(line, f"have {rule} in each row", repr(cell))
    names = []
    for label in cell if multi_label else [cell]:
        # Booleans are integers in Python.
        if type(label) not in (str, int) or not (name := _class_name(label)):
            raise _InvalidRowError(line, "have labels that are text or integers", ascii(label))
        names.append(name)
    return list(dict.fromkeys(names))


@functools.lru_cache(maxsize=2**16)
def _class_name(label: str | int) -> str:
    """Normalizes a label; returns "" if it is empty or not valid Unicode."""
    (name,) = normalize_names([str(label).strip()])
    return "" if any("\ud800" <= letter <= "\udfff" for letter in name) else name


def _read_split(line: int, cell: Any) -> str:
    split = standard_split(cell.strip()) if isinstance(cell, str) else None
    if split is None:
        rule = f"have {', '.join(SPELLINGS)} in column {_SPLIT}"
        raise _InvalidRowError(line, rule, repr(cell))
    return split


def _check_classes(
    description: str, class_names: Iterable[str], labels: list[list[str]], splits: list[str]
) -> None:
    """Checks that the training split, if there is one, has every class."""
    if TRAIN not in splits:
        return
    known = {
        name
        for names, split in zip(labels, splits, strict=True)
        if split == TRAIN
        for name in names
    }
    unknown = [repr(name) for name in class_names if name not in known]
    if unknown:
        raise UserError(
            f"{description} must have all classes in its {TRAIN} split, got {abbreviate(unknown)} "
            f"in others. Add such rows to {TRAIN}, or remove them."
        )


def _divide_rows(
    description: str, paths: list[str], splits: list[str], labels: LabelArrays
) -> tuple[dict[str, np.ndarray], bool]:
    """Divides the rows into splits, ordered by a hash of their paths.

    Returns:
        Rows of each split, and whether those of "validation" are held out from the training split.

    Raises:
        UserError: Two rows have the same path.
    """
    digests = hash_paths(paths)
    order = np.argsort(digests, kind="stable")
    repeated = order[1:][np.diff(digests[order]) == 0]
    if len(repeated):
        raise UserError(
            f"{description} must list every image once, got {len(repeated):,} repeated, for "
            f"example {paths[repeated[0]]!r}. Remove all but one row of each; several labels "
            f"belong in one row, in a column {_LABELS}."
        )
    split_of = np.array(splits)[order]
    rows_of = {name: order[split_of == name] for name in SPELLINGS if name in splits}
    is_held_out = set(rows_of) == {TRAIN}
    if is_held_out:
        rows_of = hold_out(order, labels)
    return rows_of, is_held_out


def _notes_on_missing_files(table: _Table, examples: Any) -> Iterator[str]:
    """Yields a note on files that do not exist.

    Raises:
        UserError: No file exists.
    """
    is_missing = examples.file_sizes() < 0
    count = int(is_missing.sum())
    if not count:
        return
    example = examples.path_name(int(np.flatnonzero(is_missing)[0]))
    if count == len(examples):
        raise UserError(
            f"{table.description} must list images that exist, relative to its folder or by "
            f"absolute paths, got none; for example, {example} is missing."
        )
    yield f"missing {count:,} of {len(examples):,} images, for example {example}"
