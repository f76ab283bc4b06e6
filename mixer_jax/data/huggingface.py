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
    BAD_LABEL,
    DIGEST,
    NO_LABEL,
    Example,
    Examples,
    LabelArrays,
    Source,
    absent_class_notes,
    normalize_names,
    sort_class_names,
)
from mixer_jax.data.splits import (
    TEST,
    TRAIN,
    VALIDATION,
    hash_order,
    hold_out,
    select_rows,
    standardize_splits,
    substitution_notes,
)
from mixer_jax.errors import UserError, abbreviate, missing_library_error, summarize_error

# Columns that are chosen if types do not tell them apart; the first one that exists.
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels", "cls")
# Type of a label in Arrow; that of a ClassLabel is int64.
_LABEL_TYPE = re.compile(r"u?int\d+|(large_)?string|string_view")
# Files of the folders that `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write.
_SAVED = ("state.json", "dataset_dict.json")
# File that lists the configs of a dataset.
_CARD = "README.md"


def open_hugging_face(name: str, split: str) -> Source:
    """Opens one split of a dataset that the library `datasets` reads.

    Encoded images are read by index from memory-mapped Arrow files; `datasets` converts Parquet to
    Arrow once, in its cache. Code that a dataset contains is never executed.

    The image is the only column of images, or one with a common name. The label is the column
    "label", "labels" or "cls", or else the only one of type ClassLabel. Its values are classes,
    texts or integers, or lists of these for any number of labels per image. The classes of a
    ClassLabel have its order; others are those of the training split, sorted by name, or by value
    if all are integers. A row without an image or a label of these classes is a bad image.

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
            cannot be read; or the split has no labels.
    """
    data = _open(name)
    rows, used = select_rows(split, data.splits, data.description)
    labels = data.labels.select(rows)
    place = f"{data.name} {split}"
    notes = [] if data.is_held_out else substitution_notes(split, data.splits, data.name)
    if num_missing := int((labels.values == NO_LABEL).sum()):
        if num_missing == len(labels.values):
            raise UserError(
                f"split {split!r} of {data.description} must have labels, got none that is a class "
                f"of {TRAIN}. Use another split, or choose a column by {data.name}@COLUMN."
            )
        notes.append(f"{place}: {num_missing:,} labels are missing or not classes of {TRAIN}")
    if TRAIN in used:
        notes += absent_class_notes(data.class_names, labels, place)
    return Source(
        f"{HUGGING_FACE}{name} {split}",
        _HuggingFaceExamples(data.name, data.images, rows, labels, data.root),
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
    return tuple(split for split, rows in _open(name).splits.items() if len(rows))


class _Dataset(NamedTuple):
    """Images and labels of all splits, one split after the other.

    Attributes:
        name: Name of the dataset, without a label.
        description: The same, for messages.
        root: Local folder of the dataset; the working directory for one of the Hub.
        images: Dataset with the column of images alone, by the name of the split in the data.
        class_names: Name of each class.
        labels: Labels of all rows, as indices into `class_names`, or `NO_LABEL`.
        splits: Rows of each split.
        is_held_out: Whether "validation" is held out from the training split.
    """

    name: str
    description: str
    root: Path
    images: dict[str, Any]
    class_names: tuple[str, ...]
    labels: LabelArrays
    splits: dict[str, np.ndarray]
    is_held_out: bool


def _open(name: str) -> _Dataset:
    """Opens all splits of a dataset; see `open_hugging_face`."""
    path, label = (name, "") if Path(name).expanduser().is_dir() else split_label(name)
    name = f"{HUGGING_FACE}{path}"
    description = f"dataset {name!r}"
    loaded = _load(path, description)
    names = standardize_splits(loaded, description)
    if not names:
        raise UserError(f"{description} must have a split, got none. Save it again.")
    features = loaded[next(iter(names.values()))].features
    image = _find_image_column(features, description)
    label = _find_label_column(features, label, name)
    names = {split: key for split, key in names.items() if image in loaded[key].features}
    # Without decoding: the format "arrow" yields what is stored.
    tables = {split: loaded[key].with_format("arrow") for split, key in names.items()}
    ends = np.cumsum([len(table) for table in tables.values()])
    splits = {
        split: np.arange(end - len(table), end)
        for (split, table), end in zip(tables.items(), ends, strict=True)
    }
    class_names, labels = _load_labels(list(tables.values()), label)
    is_held_out = TRAIN in splits and not {VALIDATION, TEST} & set(splits)
    if is_held_out:
        rows = splits[TRAIN]
        order = hash_order(str(row) for row in range(len(rows)))
        # Rows keep the order of the dataset.
        splits |= {key: np.sort(part) for key, part in hold_out(rows[order], labels).items()}
    folder = Path(path).expanduser()
    return _Dataset(
        name,
        description,
        folder.absolute() if folder.is_dir() else Path.cwd(),
        {names[split]: table.select_columns([image]) for split, table in tables.items()},
        class_names,
        labels,
        splits,
        is_held_out,
    )


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
        if NO_LABEL in labels:
            raise BadImageError(BAD_LABEL, "", name)
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


def _load(path: str, description: str) -> dict[str, Any]:
    """Loads all splits of a dataset, memory-mapped.

    Args:
        path: Local folder, or name on the Hub; optionally with /CONFIG.
        description: Dataset, for messages.

    Raises:
        UserError: The library is not installed, or the dataset does not exist, cannot be read or
            reached, or has several configs.
    """
    try:
        import datasets

        # A folder called "datasets" can be imported as well.
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise missing_library_error(
            description, "the library datasets", '"mixer-jax[datasets]"'
        ) from error
    folder = Path(path).expanduser()
    parts = path.split("/")
    place = description
    if path and folder.is_dir():
        arguments = [str(folder.absolute())]
    elif "/" in path and (folder.parent / _CARD).is_file() and not folder.exists():
        arguments = [str(folder.parent.absolute()), folder.name]
    elif all(parts) and len(parts) <= 3 and not folder.exists() and path[0] not in ".~":
        arguments = ["/".join(parts[:2]), *parts[2:]]
        place = f"{description} is not a local folder, and"
    else:
        raise UserError(
            f"{description} must be a local folder that exists, or NAMESPACE/NAME on the Hugging "
            f"Face Hub, got {path!r}. Write {HUGGING_FACE}PATH, where PATH contains Parquet or "
            "Arrow files."
        )
    is_saved = any((folder / file).is_file() for file in _SAVED)
    try:
        with _silence(datasets):
            loaded = (load_from_disk if is_saved else load_dataset)(*arguments)
    except Exception as error:
        # Its functions raise exceptions of many types, also those of Arrow and of HTTP libraries.
        # Some wrap another one, which has the reason.
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetsError) else None
        # Examples of Python code do not help here.
        reason = summarize_error(cause or error).partition(" Example of usage")[0]
        fix = f" Write {HUGGING_FACE}{path}/CONFIG." if "Config name is missing" in reason else ""
        if isinstance(error, ConnectionError):
            fix = (
                " Check the name and the network connection; without a network, only datasets in "
                "the cache can be read."
            )
        raise UserError(f"{place} cannot be read: {reason}.{fix}") from error
    if isinstance(loaded, datasets.Dataset):
        # A slice that was saved is named like "train[:10%]".
        return {str(loaded.split or TRAIN).partition("[")[0]: loaded}
    return dict(loaded)


@contextlib.contextmanager
def _silence(datasets: Any) -> Iterator[None]:
    """Hides what `datasets` prints, except for bars in a terminal, which go to standard error."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    hides_bars = not sys.stderr.isatty() and not datasets.utils.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    if hides_bars:
        datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if hides_bars:
            datasets.enable_progress_bars()


def _find_image_column(features: Mapping[str, Any], description: str) -> str:
    """Finds the column of images: by type, or else by name."""
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    # Parquet files that other programs wrote have bytes, or the bytes and paths of images.
    named = [
        name
        for name in _IMAGE_COLUMNS
        if name in (images or features) and _may_be_image(features[name])
    ]
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
    # The type of decoded images is that of PIL.
    return getattr(feature, "dtype", "") in ("binary", "large_binary", "PIL.Image.Image")


def _find_label_column(features: Mapping[str, Any], requested: str, name: str) -> str:
    """Finds the column of the label: the requested one, or by name, or the only ClassLabel."""
    import datasets

    choices = [
        key
        for key, feature in features.items()
        if _LABEL_TYPE.fullmatch(getattr(_item(feature), "dtype", ""))
    ]
    classes = [key for key in choices if isinstance(_item(features[key]), datasets.ClassLabel)]
    if requested:
        found = [key for key in choices if key == requested]
    else:
        found = [key for key in _LABEL_COLUMNS if key in choices] or classes * (len(classes) == 1)
    if not found:
        rule = f"the label {requested!r}" if requested else f"a column {_LABEL_COLUMNS[0]!r}"
        listed = ", ".join(f"{name}@{key}" for key in classes or choices)
        raise UserError(
            f"dataset {name!r} must have {rule} of classes, integers or texts, got "
            f"{_format_columns(features)}. "
            + (f"Choose one of {listed}." if listed else "Add a column of classes.")
        )
    return found[0]


def _item(feature: Any) -> Any:
    """Returns the feature of the items of a list, and other features as they are."""
    return getattr(feature, "feature", feature)


def _format_columns(features: Mapping[str, Any]) -> str:
    return abbreviate((f"{key} ({type(value).__name__})" for key, value in features.items()), 12)


def _load_labels(tables: list[Any], column: str) -> tuple[tuple[str, ...], LabelArrays]:
    """Loads the labels of all rows, one split after the other.

    Args:
        tables: Dataset of each split in the format "arrow".
        column: Column of the label. Labels are missing in a split that lacks it, or has another
            type or other classes there than the first split.

    Returns:
        Name of each class, and the labels as indices into these or `NO_LABEL`.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc

    feature = tables[0].features[column]
    item = _item(feature)
    kind = tables[0].data.schema.field(column).type
    chunks = []
    for table in tables:
        if table.features.get(column) == feature:
            chunks += table.select_columns([column])[:].column(0).cast(kind).chunks
        else:
            chunks.append(pa.nulls(len(table), kind))
    values = pa.chunked_array(chunks, kind)
    ends = None
    if item is not feature:
        values = values.cast(pa.list_(kind.value_type))
        # A list that is missing is not an empty list: it has one label, which is missing.
        values = pc.coalesce(values, pa.scalar([None], values.type))
        ends = np.cumsum(pc.list_value_length(values).to_numpy().astype(np.int64))
        values = pc.list_flatten(values)
    encoded = values.dictionary_encode().unify_dictionaries().combine_chunks()
    codes = pc.fill_null(encoded.indices, -1).to_numpy().astype(np.int64)
    spellings = encoded.dictionary.to_pylist()
    if isinstance(item, datasets.ClassLabel):
        class_names = normalize_names(map(str, item.names))
        indices = [value if 0 <= value < len(class_names) else NO_LABEL for value in spellings]
    else:
        names = normalize_names(str(value).strip() for value in spellings)
        # The labels of the first split, which is the training split if there is one.
        end = len(tables[0]) if ends is None else int(np.append(0, ends)[len(tables[0])])
        used = np.unique(codes[:end]).tolist()
        class_names = sort_class_names({names[code] for code in used if code >= 0} - {""})
        index_of = {name: index for index, name in enumerate(class_names)}
        indices = [index_of.get(name, NO_LABEL) for name in names]
    # The last one is that of missing labels, whose code is -1.
    return class_names, LabelArrays(np.array([*indices, NO_LABEL])[codes], ends)
