"""Manifests: tables of image files with labels, as CSV or JSONL."""

import array
import csv
import dataclasses
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np

from mixer_jax.data.image_files import display_path
from mixer_jax.data.labeled_files import LabeledFiles
from mixer_jax.data.names import MANIFEST, split_label
from mixer_jax.data.source import LabelArrays, Source, normalize_names, sort_class_names
from mixer_jax.data.splits import (
    SPELLINGS,
    TRAIN,
    VALIDATION,
    hash_paths,
    hold_out,
    parse_split,
    standard_split,
    substitution_notes,
)
from mixer_jax.errors import UserError, abbreviate

_PATH, _LABEL, _LABELS, _SPLIT = "path", "label", "labels", "split"
_CSV, _JSONL = (".csv",), (".jsonl", ".ndjson")
# Between the labels of one image in CSV.
_SEPARATOR = "|"
_SPLITS = tuple(SPELLINGS)


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
    table = _Table(path)
    class_names, labels = _index_classes(table)
    rows_of, is_held_out = _divide_rows(table, labels)
    notes = list(table.notes)
    if not is_held_out:
        notes += substitution_notes(split, rows_of, display_path(table.file))
    sizes = {name: len(rows) for name, rows in rows_of.items()}
    slices = parse_split(split, sizes, table.description)
    rows = np.concatenate([rows_of[name][start:stop] for name, start, stop in slices])
    if not len(rows):
        raise UserError(f"split {split!r} of {table.description} contains no images.")
    examples = _select(table, rows, labels)
    notes += _check_files(table, examples)
    return Source(
        f"{MANIFEST}{path} {split}", examples, class_names, table.multi_label, notes=tuple(notes)
    )


def list_manifest_splits(path: str) -> tuple[str, ...]:
    """Lists the splits of a manifest; "validation" may be held out from the training split.

    Args:
        path: Local file, optionally with @ and the column of the label.

    Raises:
        UserError: The file does not exist or is not well-formed.
    """
    table = _Table(path)
    rows_of, _ = _divide_rows(table, _index_classes(table)[1])
    return tuple(name for name, rows in rows_of.items() if len(rows))


def _find_file(path: str) -> tuple[Path, str]:
    """Returns the absolute path of a manifest, and the column of the label or ""."""
    if path and "://" not in path:
        # The name of a file may contain an @.
        for name, label in ((path, ""), split_label(path)):
            file = Path(name).expanduser()
            if file.is_file():
                return file.absolute(), label
    path, _ = split_label(path)
    if not path or "://" in path:
        reason = "is not a local path"
    else:
        reason = "is not a file" if Path(path).expanduser().exists() else "does not exist"
    raise UserError(
        f"dataset '{MANIFEST}{path}' must be a local CSV or JSONL file, but {path!r} {reason}. "
        f"Write {MANIFEST}FILE, where FILE has the columns {_PATH} and {_LABEL}."
    )


class _Table:
    """Rows of a manifest, in compact arrays: a manifest may have millions.

    Attributes:
        file: Absolute path of the manifest.
        root: Folder of the manifest.
        description: Name of the manifest, for messages.
        digests: Hash of each row's path.
        splits: Index into `_SPLITS` of each row.
        labels: Indices into `classes` of all rows, one row after the other.
        label_ends: Index into `labels` after the last label of each row.
        classes: Index of each class by name, in the order of the rows.
        multi_label: Whether a row may have any number of labels.
        notes: Lines for the user about what is not used.
    """

    def __init__(self, path: str):
        """Reads a manifest.

        Args:
            path: Local file, optionally with @ and the column of the label.

        Raises:
            UserError: The file cannot be read, or a column or row is not well-formed.
        """
        file, label = _find_file(path)
        self.root, self.description = file.parent, f"manifest {str(file)!r}"
        self.file, self._root_prefix = file, os.path.join(file.parent, "")
        self._paths, self._ends, self._lines = bytearray(), array.array("q"), array.array("q")
        self.splits, self.labels = array.array("b"), array.array("i")
        self.label_ends = array.array("q")
        self.classes: dict[str, int] = {}
        self.multi_label = False
        self.notes: list[str] = []
        # Indices of classes and splits by their spellings in the file.
        self._known_labels: dict[str | int, int] = {}
        self._known_splits: dict[str | None, int] = {None: _SPLITS.index(TRAIN)}
        self._read(label)
        self.digests = hash_paths(self._paths_in_order())
        self._check_no_duplicates()

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, row: int) -> str:
        """Returns the path of one row: relative to the folder of the manifest, or absolute."""
        start = self._ends[row - 1] if row else 0
        return os.fsdecode(bytes(self._paths[start : self._ends[row]]))

    def _paths_in_order(self) -> Iterator[str]:
        """Yields the path of every row."""
        return map(self.path, range(len(self)))

    def _read(self, label: str) -> None:
        """Reads the file; `label` is the column of the label, or "" for `label` or `labels`."""
        suffix = self.file.suffix.lower()
        if suffix not in _CSV + _JSONL:
            self._fail(f"have the suffix {' or '.join(_CSV + _JSONL)}", suffix or "none")
        try:
            with self.file.open(encoding="utf-8-sig", newline="") as file:
                (self._read_csv if suffix in _CSV else self._read_jsonl)(file, label)
        except UnicodeDecodeError:
            self._fail("be UTF-8", "another encoding", self._find_undecodable_line())
        except OSError as error:
            raise UserError(f"{self.description} cannot be read: {error.strerror}.") from error
        if not len(self):
            self._fail("have a row for each image", "none")

    def _check_no_duplicates(self) -> None:
        """Checks that no two rows have the same path."""
        order = np.argsort(self.digests, kind="stable")
        digests = self.digests[order]
        is_repeated = digests[1:] == digests[:-1]
        if not is_repeated.any():
            return
        first = np.flatnonzero(is_repeated)[0]
        rows = order[first : first + 2].tolist()
        lines = " and ".join(str(self._lines[row]) for row in rows)
        fix = (
            "Remove all but one row of each."
            if self.multi_label
            else f"Remove all but one row of each; several labels belong in a column {_LABELS}."
        )
        self._fail(
            "list every image once",
            f"{int(is_repeated.sum()):,} repeated, for example {self.path(rows[0])!r} in lines "
            f"{lines}",
            fix=fix,
        )

    def _read_csv(self, file: Any, label: str) -> None:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            indices = self._find_columns([name.strip() for name in header], label)
            path_index, label_index, split_index = indices
            for row in reader:
                if not row:
                    continue
                line = reader.line_num
                if len(row) != len(header):
                    self._fail(f"have {len(header)} cells in each row", f"{len(row)}", line)
                labels: Sequence[Any] = (row[label_index].strip(),)
                if self.multi_label:
                    labels = row[label_index].split(_SEPARATOR) if labels[0] else ()
                split = None if split_index is None else row[split_index]
                self._add(line, row[path_index], labels, split)
        except csv.Error as error:
            self._fail("be CSV", str(error), reader.line_num)

    def _read_jsonl(self, file: Any, label_column: str) -> None:
        columns: list[str] = []
        path_key = label_key = ""
        split_key: str | None = None
        for line, text in enumerate(file, 1):
            if text.isspace():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "deep nesting"
                self._fail("have one JSON object per line", f"invalid JSON ({reason})", line)
            if not isinstance(row, dict):
                self._fail("have one JSON object per line", f"{type(row).__name__}", line)
            if not columns:
                columns = list(row)
                path_index, label_index, split_index = self._find_columns(
                    columns, label_column, row
                )
                path_key, label_key = columns[path_index], columns[label_index]
                split_key = None if split_index is None else columns[split_index]
            try:
                path, labels = row[path_key], row[label_key]
                split = None if split_key is None else row[split_key]
            except KeyError as error:
                self._fail(f"have {error} in each line", f"{', '.join(row) or 'none'}", line)
            if self.multi_label != isinstance(labels, list):
                rule = "lists of labels" if self.multi_label else "one label, not a list,"
                self._fail(f"have {rule} in each line", repr(labels), line)
            for key, value in ((path_key, path), (split_key, split)):
                if key is not None and not isinstance(value, str):
                    self._fail(f"have text as {key}", repr(value), line)
            labels = labels if self.multi_label else [labels]
            for label in labels:
                # Booleans are integers in Python.
                if type(label) not in (str, int):
                    self._fail("have labels that are text or integers", repr(label), line)
            self._add(line, path, labels, split)

    def _find_columns(
        self, columns: list[str], label: str, first_row: dict[str, Any] | None = None
    ) -> tuple[int, int, int | None]:
        """Finds the columns of path, label and split; sets `multi_label`.

        Args:
            columns: Names of the columns.
            label: Requested column of the label, or "".
            first_row: First row of a JSONL file.
        """
        folded = [column.casefold() for column in columns]
        names = ", ".join(columns) or "none"
        candidates = [label.casefold()] if label else [_LABEL, _LABELS]
        found = [name for name in candidates if name in folded]
        if _PATH not in folded or not found:
            self._fail(
                f"have the columns {_PATH} and {label or f'{_LABEL} or {_LABELS}'}",
                names,
                1,
                f"Rename the columns, or choose the label by {MANIFEST}FILE@COLUMN.",
            )
        if len(found) > 1:
            self._fail(
                f"have one of the columns {_LABEL} and {_LABELS}",
                names,
                1,
                f"Choose by {MANIFEST}{self.file}@{_LABEL} or @{_LABELS}.",
            )
        used = [_PATH, *found, _SPLIT]
        repeated = [name for name in used if folded.count(name) > 1]
        if repeated:
            self._fail("have columns with different names", names, 1)
        path_index, label_index = folded.index(_PATH), folded.index(found[0])
        split_index = folded.index(_SPLIT) if _SPLIT in folded else None
        self.multi_label = found[0] == _LABELS
        if first_row is not None:
            self.multi_label = isinstance(first_row[columns[label_index]], list)
        ignored = [name for name in columns if name.casefold() not in used]
        if ignored:
            self.notes.append(
                f"{display_path(self.file)}: ignored columns {abbreviate(map(repr, ignored))}"
            )
        return path_index, label_index, split_index

    def _add(self, line: int, path: str, labels: Sequence[Any], split: str | None) -> None:
        """Adds a row; `split` is None for a manifest without a column of splits."""
        if not path or "://" in path or "\0" in path:
            self._fail("have paths of local files", repr(path), line)
        if path.startswith(self._root_prefix):
            path = path[len(self._root_prefix) :]
        if "./" in path or "//" in path:
            path = str(PurePosixPath(path))
        try:
            self._paths += os.fsencode(path)
        except UnicodeEncodeError:
            self._fail("have paths of local files", repr(path), line)
        self._ends.append(len(self._paths))
        self._lines.append(line)
        try:
            indices = [self._known_labels[label] for label in labels]
        except KeyError:
            indices = [self._index_label(label, line) for label in labels]
        self.labels.extend(dict.fromkeys(indices) if self.multi_label else indices)
        self.label_ends.append(len(self.labels))
        code = self._known_splits.get(split)
        self.splits.append(self._index_split(split, line) if code is None else code)

    def _index_label(self, label: Any, line: int) -> int:
        """Returns the index of a class, which may be new."""
        (name,) = normalize_names([str(label).strip()])
        if not name:
            self._fail("have labels that are not empty", repr(label), line)
        if any(unicodedata.category(character) == "Cs" for character in name):
            self._fail("have labels that are valid Unicode", repr(label), line)
        index = self.classes.setdefault(name, len(self.classes))
        self._known_labels[label] = index
        return index

    def _index_split(self, split: str | None, line: int) -> int:
        name = standard_split((split or "").strip())
        if name is None:
            self._fail(f"have {', '.join(_SPLITS)} in column {_SPLIT}", repr(split), line)
        self._known_splits[split] = code = _SPLITS.index(name)
        return code

    def _find_undecodable_line(self) -> int:
        with self.file.open("rb") as file:
            for line, text in enumerate(file, 1):
                try:
                    text.decode()
                except UnicodeDecodeError:
                    return line
        return 1

    def _fail(self, rule: str, got: str, line: int | None = None, fix: str = "") -> NoReturn:
        place = "" if line is None else f" in line {line:,}"
        raise UserError(
            f"{self.description} must {rule}, got {got}{place}.{fix and f' {fix}'}"
        ) from None


def _index_classes(table: _Table) -> tuple[tuple[str, ...], LabelArrays]:
    """Sorts the classes.

    Returns:
        Name of each class, and the labels of all rows.

    Raises:
        UserError: A class occurs in other splits than the training split alone.
    """
    names, splits = list(table.classes), np.asarray(table.splits)
    values = np.asarray(table.labels)
    labels = LabelArrays(values, np.asarray(table.label_ends) if table.multi_label else None)
    train = _SPLITS.index(TRAIN)
    if train in splits:
        is_known = np.zeros(len(names), bool)
        is_known[values[splits[labels.owners] == train]] = True
        unknown = [name for name, known in zip(names, is_known, strict=True) if not known]
        if unknown:
            raise UserError(
                f"{table.description} must have classes of its {TRAIN} split in other splits, got "
                f"{abbreviate(map(repr, sorted(unknown)))}, which {TRAIN} lacks. Add such rows to "
                f"{TRAIN}, or remove them."
            )
    class_names = sort_class_names(names)
    index_of = {name: index for index, name in enumerate(class_names)}
    remap = np.array([index_of[name] for name in names], np.int32)
    return class_names, dataclasses.replace(labels, values=remap[values])


def _divide_rows(table: _Table, labels: LabelArrays) -> tuple[dict[str, np.ndarray], bool]:
    """Divides the rows into splits, ordered by a hash of their paths.

    Args:
        table: Manifest.
        labels: Labels of all rows.

    Returns:
        Rows of each split, and whether those of "validation" are held out from the training split.
    """
    order = np.argsort(table.digests, kind="stable")
    splits = np.asarray(table.splits)[order]
    rows_of = {name: order[splits == code] for code, name in enumerate(_SPLITS) if code in splits}
    is_held_out = set(rows_of) == {TRAIN}
    if is_held_out:
        rows = rows_of[TRAIN]
        # Several labels per image have no common stratification.
        classes = np.zeros(len(rows), np.int64) if table.multi_label else labels.values[rows]
        train, validation = hold_out(classes)
        rows_of = {TRAIN: rows[train], VALIDATION: rows[validation]}
    return rows_of, is_held_out


class _ManifestFiles(LabeledFiles):
    """Files whose labels, unlike those of folders, do not follow from their paths."""

    def fingerprint(self) -> dict[str, str]:
        """Computes digests of names and sizes of the files, and one of the labels."""
        return super().fingerprint() | {"labels": self.labels.digest()}


# Runtime type checkers would read examples if these functions declared LabeledFiles, a sequence.
def _select(table: _Table, rows: np.ndarray, labels: LabelArrays) -> Any:
    """Makes the examples of some rows, in their order."""
    return _ManifestFiles(table.root, map(table.path, rows.tolist()), labels.select(rows))


def _check_files(table: _Table, examples: Any) -> list[str]:
    """Returns a note on files that do not exist.

    Raises:
        UserError: No file exists.
    """
    is_missing = examples.file_sizes() < 0
    count = int(is_missing.sum())
    if not count:
        return []
    example = examples.path_name(int(np.flatnonzero(is_missing)[0]))
    if count == len(examples):
        raise UserError(
            f"{table.description} must list images that exist, relative to its folder or by "
            f"absolute paths, got none; for example, {example} is missing."
        )
    missing = f"missing {count:,} of {len(examples):,} images"
    return [f"{display_path(table.file)}: {missing}, for example {example}"]
