"""Datasets that the library `datasets` reads: local folders, and names on the Hugging Face Hub."""

import bisect
import contextlib
import hashlib
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixer_jax.data.decode import BadImageError
from mixer_jax.data.image_files import read_image
from mixer_jax.data.names import HUGGING_FACE, split_label
from mixer_jax.data.source import (
    DIGEST,
    Example,
    Examples,
    LabelArrays,
    Source,
    normalize_names,
    sort_class_names,
)
from mixer_jax.data.splits import (
    TEST,
    TRAIN,
    VALIDATION,
    hash_order,
    hold_out,
    parse_split,
    standardize_splits,
    substitution_notes,
)
from mixer_jax.errors import UserError, abbreviate, summarize_error

# Columns that are chosen if types do not tell them apart; the first one that exists.
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels", "cls")
# Files of the folders that `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write.
_SAVED = (("dataset_info.json", "state.json"), ("dataset_dict.json",))
# File that lists the configs of a dataset.
_CARD = "README.md"
# Label that is missing, hidden or not a class.
_NO_LABEL = -1
_BAD_LABEL = "label is missing or not a class"


def open_hugging_face(name: str, split: str) -> Source:
    """Opens one split of a dataset that the library `datasets` reads.

    Encoded images are read by index from memory-mapped Arrow files; `datasets` converts Parquet to
    Arrow once, in its cache. Code that a dataset contains is never executed.

    The image is the only column of images, or one with a common name. The label is the column
    "label", "labels" or "cls", or else the only one of type ClassLabel. Its values are classes,
    texts or integers, or lists of these for any number of labels per image. The classes of a
    ClassLabel have its order; others are sorted by name, or by value if all are integers.

    Rows have the order of the dataset, as slices in `datasets` do. If there is neither "validation"
    nor "test", a tenth of every class of "train" is held out as "validation", selected by a hash of
    the number of the row.

    Args:
        name: Folder written by `save_to_disk`, or with Parquet or Arrow files in the layout of the
            Hub; or name on the Hub, NAMESPACE/NAME. Optionally with /CONFIG, and with @ and the
            column of the label.
        split: Split in TFDS syntax, e.g. "train", "train[:99%]", "validation", "train+validation".

    Raises:
        UserError: `datasets` is not installed; the dataset, split or a column does not exist or
            cannot be read; or the split has no labels, or classes that "train" lacks.
    """
    data = _HuggingFaceData(name)
    splits, is_held_out = data.divide()
    notes = [] if is_held_out else substitution_notes(split, splits, data.name)
    sizes = {key: len(rows) for key, rows in splits.items()}
    slices = parse_split(split, sizes, data.description)
    rows = np.concatenate([splits[key][start:stop] for key, start, stop in slices])
    if not len(rows):
        raise UserError(f"split {split!r} of {data.description} contains no images.")
    labels = data.labels.select(rows)
    data.check_labels(split, {key for key, _, _ in slices}, labels)
    if any(key == TRAIN for key, _, _ in slices):
        notes += data.notes_on_classes(split, labels)
    examples = _HuggingFaceExamples(data.name, data.images, rows, labels, data.root)
    return Source(
        f"{HUGGING_FACE}{name} {split}",
        examples,
        data.class_names,
        labels.ends is not None,
        notes=tuple(notes),
    )


def list_hugging_face_splits(name: str) -> tuple[str, ...]:
    """Lists the splits of a dataset; "validation" may be held out from the training split.

    Args:
        name: As for `open_hugging_face`.

    Raises:
        UserError: The dataset does not exist or cannot be read.
    """
    splits, _ = _HuggingFaceData(name).divide()
    return tuple(split for split, rows in splits.items() if len(rows))


class _HuggingFaceData:
    """Images and labels of all splits, one split after the other.

    Attributes:
        name: Name of the dataset, without a label.
        description: The same, for messages.
        root: Local folder of the dataset; the working directory for one of the Hub.
        images: Dataset with the column of images alone, by the name of the split in the data.
        class_names: Name of each class.
        labels: Labels of all rows.
    """

    def __init__(self, name: str):
        path, label = _find_label(name)
        self.name = f"{HUGGING_FACE}{path}"
        self.description = f"dataset {self.name!r}"
        datasets = _import_datasets(self.description)
        folder = Path(path).expanduser()
        self.root = folder.absolute() if path and folder.is_dir() else Path.cwd()
        loaded = _load(datasets, path, self.description)
        names = standardize_splits(loaded, self.description)
        features = loaded[next(iter(names.values()))].features
        image = _find_image_column(datasets, features, self.description)
        label = _find_label_column(datasets, features, label, self.name)
        names = {split: key for split, key in names.items() if image in loaded[key].features}
        # Without decoding: the format "arrow" yields what is stored.
        tables = {split: loaded[key].with_format("arrow") for split, key in names.items()}
        self.images = {
            names[split]: table.select_columns([image]) for split, table in tables.items()
        }
        columns = {
            split: _read_labels(datasets, table, label, features[label])
            for split, table in tables.items()
        }
        self.class_names = self._sort_classes(datasets, features[label], columns)
        self._unknown: dict[str, list[str]] = {}
        self._labels = {split: self._remap(split, column) for split, column in columns.items()}
        self.labels = _concatenate(list(self._labels.values()))

    def _sort_classes(
        self, datasets: Any, feature: Any, columns: Mapping[str, "_Column"]
    ) -> tuple[str, ...]:
        """Returns the names of the classes: those of the training split, if there is one."""
        if isinstance(_item(feature), datasets.ClassLabel):
            return normalize_names(_item(feature).names)
        used = [columns[TRAIN]] if TRAIN in columns else columns.values()
        return sort_class_names({name for column in used for name in column.names if name})

    def _remap(self, split: str, column: "_Column") -> LabelArrays:
        """Converts the labels of a split to indices into `class_names`."""
        index_of = {name: index for index, name in enumerate(self.class_names)}
        indices = [index_of.get(name, _NO_LABEL) for name in column.names]
        values = column.labels.values
        present = np.bincount(values[values >= 0], minlength=len(indices)) > 0
        self._unknown[split] = [
            name
            for name, index, is_present in zip(column.names, indices, present, strict=True)
            if name and index == _NO_LABEL and is_present
        ]
        # The last one is that of rows without a label.
        table = np.array([*indices, _NO_LABEL], np.int64)
        return LabelArrays(table[values], column.labels.ends)

    def divide(self) -> tuple[dict[str, np.ndarray], bool]:
        """Divides the rows into splits.

        Returns:
            Rows of each split, and whether those of "validation" are held out from the training
            split.
        """
        ends = np.cumsum([len(labels) for labels in self._labels.values()])
        splits = {
            split: np.arange(end - len(labels), end)
            for (split, labels), end in zip(self._labels.items(), ends, strict=True)
        }
        is_held_out = TRAIN in splits and not {VALIDATION, TEST} & set(splits)
        if is_held_out:
            rows, labels = splits[TRAIN], self._labels[TRAIN]
            # Several labels per image have no common stratification. One is added, as counts of
            # classes start at 0: rows without a label are a class of their own.
            classes = (
                np.zeros(len(rows), np.int64) if labels.ends is not None else labels.values + 1
            )
            order = hash_order(str(row) for row in range(len(rows)))
            train, validation = (np.sort(order[part]) for part in hold_out(classes[order]))
            splits |= {TRAIN: rows[train], VALIDATION: rows[validation]}
        return splits, is_held_out

    def check_labels(self, split: str, used: set[str], labels: LabelArrays) -> None:
        """Checks the labels of a split that is opened.

        Args:
            split: Split in TFDS syntax, for messages.
            used: Names of the splits of which it consists.
            labels: Its labels.

        Raises:
            UserError: All labels are missing, or some are of classes that "train" lacks.
        """
        if len(labels.values) and (labels.values == _NO_LABEL).all():
            raise UserError(
                f"labels of split {split!r} of {self.description} must not be hidden or missing. "
                f"Use another split, or choose a column by {self.name}@COLUMN."
            )
        unknown = {name for key in used for name in self._unknown.get(key, [])}
        if unknown:
            raise UserError(
                f"split {split!r} of {self.description} must have classes of {TRAIN}, got "
                f"{abbreviate(map(repr, sorted(unknown)))}. Remove such rows, or add some to "
                f"{TRAIN}."
            )

    def notes_on_classes(self, split: str, labels: LabelArrays) -> list[str]:
        """Returns notes on classes without examples in the training split, or in a slice of it.

        Args:
            split: Split in TFDS syntax.
            labels: Its labels.
        """
        total = len(self.class_names)
        has_examples, is_selected = (
            np.isin(np.arange(total), values)
            for values in (self._labels[TRAIN].values, labels.values)
        )
        notes = []
        if not has_examples.all():
            absent = np.flatnonzero(~has_examples).tolist()
            notes.append(
                f"{self.name}: {len(absent):,} of {total:,} classes have no examples in {TRAIN}: "
                f"{abbreviate(repr(self.class_names[label]) for label in absent)}"
            )
        if is_selected.sum() < has_examples.sum():
            notes.append(
                f"{self.name}: {split!r} has examples of only {is_selected.sum():,} of {total:,} "
                "classes; slices have the order of the dataset"
            )
        return notes


class _HuggingFaceExamples(Examples):
    """Rows of memory-mapped Arrow files.

    An example is bad if it has no image or label, or if it has a path that cannot be read.
    """

    def __init__(
        self,
        name: str,
        datasets_of_images: Mapping[str, Any],
        rows: np.ndarray,
        labels: LabelArrays,
        root: Path,
    ):
        """Stores the rows.

        Args:
            name: Name of the dataset, for messages.
            datasets_of_images: Dataset with one column, by the name of the split in the data.
            rows: Index of each example into the concatenation of the datasets.
            labels: Labels of each example.
            root: Folder of relative paths.
        """
        self._name, self._rows, self._labels, self._root = name, rows, labels, root
        self._datasets = dict(datasets_of_images)
        ends = np.cumsum([len(dataset) for dataset in self._datasets.values()]).tolist()
        self._starts = [0, *ends[:-1]]
        self._columns: list[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Arrow would copy the images; datasets are pickled as paths of memory-mapped files.
        return self.__dict__ | {"_columns": None}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        split, row = self._locate(index)
        image = self._image_columns()[split][row].as_py()
        encoded, path = image, None
        if isinstance(image, dict):
            encoded, path = image.get("bytes"), image.get("path")
        elif isinstance(image, str):
            encoded, path = None, image
        name = self._example_name(split, row, path)
        labels = self._read_labels(index, name)
        if encoded is None:
            if not path:
                raise BadImageError("has no image", "", name)
            if "://" in path or "\0" in path:
                raise BadImageError("cannot be read", "not a local path", name)
            encoded = read_image(self._root / path)
        return Example(image=encoded, labels=labels, name=name)

    def read_labels(self, index: int) -> tuple[int, ...]:
        """Returns the labels of one row; its image is not read."""
        index = range(len(self))[index]
        return self._read_labels(index, self._example_name(*self._locate(index), None))

    def fingerprint(self) -> dict[str, str]:
        """Computes a digest of the labels, and one of the sizes of the images."""
        import pyarrow as pa
        import pyarrow.compute as pc

        sizes = []
        for column in self._image_columns():
            for chunk in column.chunks:
                is_struct = pa.types.is_struct(chunk.type)
                encoded = chunk.field("bytes") if is_struct else chunk
                sizes.append(
                    pc.fill_null(pc.binary_length(encoded), 0).to_numpy(zero_copy_only=False)
                )
        selected = np.concatenate(sizes).astype("<i8")[self._rows]
        digest = hashlib.blake2b(selected.tobytes(), digest_size=8).hexdigest()
        # Images have no names of their own: their number stands for them.
        return {"labels": self._labels.digest(), "images": f"{DIGEST}{len(self)}-{digest}"}

    def _read_labels(self, index: int, name: str) -> tuple[int, ...]:
        labels = self._labels.read(index)
        if _NO_LABEL in labels:
            raise BadImageError(_BAD_LABEL, "", name)
        return labels

    def _locate(self, index: int) -> tuple[int, int]:
        """Returns the number of the split of an example, and its row there."""
        row = int(self._rows[index])
        split = bisect.bisect_right(self._starts, row) - 1
        return split, row - self._starts[split]

    def _example_name(self, split: int, row: int, path: str | None) -> str:
        name = f"{self._name} {list(self._datasets)[split]}, row {row}"
        return f"{name}: {path}" if path else name

    def _image_columns(self) -> list[Any]:
        """Returns the column of images of each split, a chunked array of Arrow."""
        if self._columns is None:
            self._columns = [dataset[:].column(0) for dataset in self._datasets.values()]
        return self._columns


def _import_datasets(description: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise _not_installed(description) from error
    # A folder called "datasets" can be imported as well.
    if not hasattr(datasets, "load_dataset"):
        raise _not_installed(description)
    return datasets


def _not_installed(description: str) -> UserError:
    return UserError(
        f"{description} needs the library datasets, which is not installed. Run "
        'pip install "mixer-jax[datasets]".'
    )


def _find_label(name: str) -> tuple[str, str]:
    """Splits a name into path and label, which is "" if none is given."""
    return (name, "") if Path(name).expanduser().is_dir() else split_label(name)


def _load(datasets: Any, path: str, description: str) -> dict[str, Any]:
    """Loads all splits of a dataset, memory-mapped.

    Args:
        datasets: The library.
        path: Local folder, or name on the Hub.
        description: Dataset, for messages.

    Raises:
        UserError: The dataset does not exist, cannot be read or reached, or has several configs.
    """
    folder = Path(path).expanduser()
    parts = path.split("/")
    problem = "cannot be read"
    if path and folder.is_dir():
        arguments = [str(folder.absolute())]
    elif "/" in path and (folder.parent / _CARD).is_file() and not folder.exists():
        arguments = [str(folder.parent.absolute()), folder.name]
    elif path and all(parts) and len(parts) <= 3 and not folder.exists() and path[0] not in ".~":
        arguments = ["/".join(parts[:2]), *parts[2:]]
        problem = "is not a local folder, and cannot be read from the Hub"
    else:
        reason = "is not a folder" if path and folder.exists() else "does not exist"
        raise UserError(
            f"{description} must be a local folder, or NAMESPACE/NAME on the Hugging Face Hub, but "
            f"{path!r} {reason}. Write {HUGGING_FACE}PATH, where PATH contains Parquet or Arrow "
            "files."
        )
    is_saved = any(all((folder / file).is_file() for file in files) for files in _SAVED)
    load = datasets.load_from_disk if is_saved else datasets.load_dataset
    try:
        with _silence(datasets):
            loaded = load(*arguments)
    except Exception as error:
        # Its functions raise exceptions of many types, also those of Arrow and of HTTP libraries.
        # Some wrap another one, which has the reason.
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetsError) else None
        # Examples of Python code do not help here.
        reason = summarize_error(cause or error).partition(" Example of usage")[0]
        hint = f" Write {HUGGING_FACE}{path}/CONFIG." if "Config name is missing" in reason else ""
        if isinstance(error, ConnectionError):
            hint = (
                " Check the name and the network connection; without a network, only datasets in "
                "the cache can be read."
            )
        raise UserError(f"{description} {problem}: {reason}.{hint}") from error
    if isinstance(loaded, datasets.Dataset):
        # A slice that was saved is named like "train[:10%]".
        name = re.match(r"\w+", str(loaded.split or ""))
        return {name[0] if name else TRAIN: loaded}
    return dict(loaded)


@contextlib.contextmanager
def _silence(datasets: Any) -> Iterator[None]:
    """Keeps messages that become one line of an error, and bars in files, out of the output."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    hides_bars = not sys.stderr.isatty() and not datasets.utils.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    if hides_bars:
        datasets.disable_progress_bars()
    try:
        # Standard output is reserved for the results of commands.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if hides_bars:
            datasets.enable_progress_bars()


def _find_image_column(datasets: Any, features: Mapping[str, Any], description: str) -> str:
    """Finds the column of images: by type, or else by name."""
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    # Parquet files that other programs wrote have bytes, or the bytes and paths of images.
    stored = images or [name for name, feature in features.items() if _may_be_image(feature)]
    named = [name for name in _IMAGE_COLUMNS if name in stored]
    found = images if len(images) == 1 else named[:1]
    if not found:
        raise UserError(
            f"{description} must have one column of images, or one that is called "
            f"{' or '.join(_IMAGE_COLUMNS[:2])}, got {_format_columns(features)}. Rename or remove "
            "columns."
        )
    return found[0]


def _may_be_image(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return getattr(feature, "dtype", "") in ("binary", "large_binary")


def _find_label_column(
    datasets: Any, features: Mapping[str, Any], requested: str, name: str
) -> str:
    """Finds the column of the label: the requested one, or by name, or else by type."""
    choices = [key for key, feature in features.items() if _is_label(datasets, feature)]
    classes = [key for key in choices if isinstance(_item(features[key]), datasets.ClassLabel)]
    if requested:
        found = [requested] if requested in choices else []
    else:
        found = [key for key in _LABEL_COLUMNS if key in choices][:1]
        found = found or (classes if len(classes) == 1 else [])
    if not found:
        rule = f"the label {requested!r}" if requested else f"a column {_LABEL_COLUMNS[0]!r}"
        listed = ", ".join(f"{name}@{key}" for key in classes or choices)
        raise UserError(
            f"dataset {name!r} must have {rule}, got {_format_columns(features)}. "
            + (f"Choose one of {listed}." if listed else "Add a column of classes.")
        )
    return found[0]


def _is_label(datasets: Any, feature: Any) -> bool:
    item = _item(feature)
    if isinstance(item, datasets.ClassLabel):
        return True
    is_value = isinstance(item, datasets.Value)
    return (
        is_value and re.fullmatch(r"u?int\d+|(large_)?string|string_view", item.dtype) is not None
    )


def _item(feature: Any) -> Any:
    """Returns the feature of the items of a list, and other features as they are."""
    return getattr(feature, "feature", feature)


def _format_columns(features: Mapping[str, Any]) -> str:
    def format_type(feature: Any) -> str:
        item = _item(feature)
        kind = type(item).__name__
        text = item.dtype if kind == "Value" else kind
        return text if item is feature else f"list of {text}"

    return abbreviate((f"{key} ({format_type(value)})" for key, value in features.items()), 12)


class _Column(NamedTuple):
    """Labels of a split.

    Attributes:
        labels: Labels of each row, as indices into `names`; `_NO_LABEL` if missing.
        names: Name of each class of this split; "" for a label that is empty.
    """

    labels: LabelArrays
    names: tuple[str, ...]


def _read_labels(datasets: Any, table: Any, column: str, feature: Any) -> _Column:
    """Reads the labels of all rows of a split; all are missing if it has no such column.

    Args:
        datasets: The library.
        table: Dataset in the format "arrow".
        column: Column of the label.
        feature: Its feature in the training split.
    """
    import pyarrow.compute as pc

    is_list = _item(feature) is not feature
    feature = table.features.get(column)
    if feature is None or (_item(feature) is not feature) != is_list:
        ends = np.arange(1, len(table) + 1) if is_list else None
        return _Column(LabelArrays(np.full(len(table), _NO_LABEL), ends), ())
    values = table.select_columns([column])[:].column(0)
    ends = None
    if is_list:
        is_missing = values.is_null().to_numpy()
        counts = pc.fill_null(pc.list_value_length(values), 0).to_numpy().astype(np.int64)
        ends = np.cumsum(counts)
        values = pc.list_flatten(values)
    if isinstance(_item(feature), datasets.ClassLabel):
        names = normalize_names(_item(feature).names)
        codes = pc.fill_null(values.cast("int64"), _NO_LABEL).to_numpy()
        codes = np.where((codes >= 0) & (codes < len(names)), codes, _NO_LABEL)
    else:
        encoded = values.dictionary_encode().unify_dictionaries().combine_chunks()
        names = normalize_names(str(name).strip() for name in encoded.dictionary.to_pylist())
        codes = pc.fill_null(encoded.indices, _NO_LABEL).to_numpy().astype(np.int64)
    if ends is not None and is_missing.any():
        # A list that is missing is not an empty list.
        codes = np.insert(codes, ends[is_missing], _NO_LABEL)
        ends = np.cumsum(counts + is_missing)
    return _Column(LabelArrays(codes, ends), names)


def _concatenate(labels: list[LabelArrays]) -> LabelArrays:
    values = np.concatenate([part.values for part in labels])
    if labels[0].ends is None:
        return LabelArrays(values)
    starts = np.cumsum([0, *(len(part.values) for part in labels)])
    ends = [part.ends + start for part, start in zip(labels, starts, strict=False)]
    return LabelArrays(values, np.concatenate(ends))
