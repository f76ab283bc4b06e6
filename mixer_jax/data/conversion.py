"""Conversion of any dataset to a TFDS dataset in array_record, without TensorFlow.

The examples keep their order and the bytes of their image files, so that a run on the converted
dataset has the same batches, bit by bit, as a run on the original. Only images that cannot be
decoded are left out. The result depends on nothing but the examples: the same input has the same
files, byte by byte.
"""

import contextlib
import csv
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mixer_jax.data.decode import BadImageError
from mixer_jax.data.image_files import display_path
from mixer_jax.data.names import SYNTHETIC, split_label
from mixer_jax.data.preparation import (
    FORMAT,
    UNDECODABLE,
    find_decoding_error,
    map_in_order,
    preparation_lock,
)
from mixer_jax.data.registry import list_splits, open_dataset
from mixer_jax.data.source import Example, Source, relabel
from mixer_jax.data.tfds import dataset_names, find_builder, resolve_data_dir
from mixer_jax.errors import UserError, abbreviate, disk_failure

_VERSION = "1.0.0"
# Shards of TFDS have at most this size. More files would exceed the limit on open files.
_SHARD_BYTES = 2**30
# As TFDS writes array_record: every record can be read on its own.
_WRITER_OPTIONS = "group_size:1"
_DATASET_NAME = re.compile(r"[a-z][a-z0-9_]*")
_MAX_LISTED_CLASSES = 20


class ConvertedSplit(NamedTuple):
    """Counts of one split.

    Attributes:
        examples_per_class: Number of examples of each class, int64 (num_classes,).
        num_skipped: Number of images that cannot be decoded.
    """

    examples_per_class: np.ndarray
    num_skipped: int


class Conversion(NamedTuple):
    """Converted dataset.

    Attributes:
        builder: TFDS builder of the result, ready to be read.
        splits: Counts of each split, by name.
        class_names: Name of each class.
        notes: Lines for the user about what was skipped when the original was opened.
    """

    builder: Any
    splits: Mapping[str, ConvertedSplit]
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


def convert_dataset(dataset: str, name: str, data_dir: str = "") -> Conversion:
    """Writes all splits of a dataset as a TFDS dataset with random access.

    The result has the features `image`, `label` and `file_name`. Every image is decoded once;
    those that cannot be are left out and listed in `undecodable.tsv`. Memory use is constant. An
    interrupted conversion leaves nothing behind that could be mistaken for a dataset.

    Args:
        dataset: Dataset with a prefix, e.g. "folder:PATH"; optionally with @ and a label.
        name: Name of the result.
        data_dir: Directory of the TFDS datasets; empty: TFDS's default.

    Raises:
        UserError: The dataset cannot be opened, a split has no readable images, the name is not
            valid or is taken, the names of classes cannot be stored, or the folder cannot be
            written.
        WriteFailureError: The disk is full or failing.
    """
    data_dir = resolve_data_dir(data_dir)
    _check_name(name)
    folder = Path(data_dir, name, _VERSION)
    _check_is_free(folder.parent)
    sources = {split: open_dataset(dataset, split, data_dir) for split in list_splits(dataset)}
    class_names = _merge_class_names(dataset, list(sources.values()))
    sources = {split: relabel(source, class_names) for split, source in sources.items()}
    try:
        with preparation_lock(folder, f"{name}/{_VERSION}"):
            # Another process may just have written it.
            _check_is_free(folder.parent)
            with _temporary_folder(folder) as temp:
                splits = _write_dataset(dataset, name, sources, temp)
                temp.replace(folder)
    except (OSError, RuntimeError) as error:
        problem = f"dataset {name!r} cannot be written to {folder.parent}"
        if failure := disk_failure(problem, error):
            raise failure from error
        # The writer of array_record raises RuntimeError.
        if not isinstance(error, OSError):
            raise
        raise UserError(f"{problem}: {str(error).rstrip('.')}.") from error
    notes = tuple(dict.fromkeys(note for source in sources.values() for note in source.notes))
    return Conversion(find_builder(name, data_dir), splits, class_names, notes)


def _check_name(name: str) -> None:
    if not _DATASET_NAME.fullmatch(name):
        fixed = re.sub(r"\W+", "_", name.lower(), flags=re.ASCII).strip("_")
        hint = f" For example: {fixed}." if _DATASET_NAME.fullmatch(fixed) else ""
        raise UserError(
            "--name must be made of lowercase letters, digits and underscores and start with a "
            f"letter, got {name!r}.{hint}"
        )
    if name in (SYNTHETIC, *dataset_names()):
        raise UserError(
            f"--name must not be that of a dataset of TFDS or mixer_jax, got {name!r}. For "
            f"example: my_{name}."
        )


def _check_is_free(folder: Path) -> None:
    """Checks that nothing but temporary files is in the folder of a dataset."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if any(not name.startswith((".", "incomplete.")) for name in names):
        raise UserError(
            f"--name must be new, got {folder.name!r}, which exists in {folder.parent}. Choose "
            f"another one, or remove {folder}."
        )


def _merge_class_names(dataset: str, sources: list[Source]) -> tuple[str, ...]:
    """Merges the classes of all splits, those of the first split first."""
    names = tuple(dict.fromkeys(name for source in sources for name in source.class_names))
    # TFDS stores the names in a text file, one per line, and strips them when it reads them. Line
    # breaks in names have been escaped.
    unstorable = [name for name in names if not name or name.strip() != name]
    if unstorable:
        raise UserError(
            f"names of classes of {dataset} must not be empty, nor have spaces at their ends, got "
            f"{abbreviate(map(repr, unstorable))}. Rename them."
        )
    return names


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder with TFDS's prefix of temporary folders, which the next run removes."""
    temp = folder.with_name(f"incomplete.{uuid.uuid4().hex[:8]}_{folder.name}")
    try:
        temp.mkdir()
        yield temp
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _write_dataset(
    dataset: str, name: str, sources: Mapping[str, Source], folder: Path
) -> dict[str, ConvertedSplit]:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity
    from tensorflow_datasets.core.naming import ShardedFileTemplate

    first = next(iter(sources.values()))
    multi_label = any(source.multi_label for source in sources.values())
    label = tfds.features.ClassLabel(names=list(first.class_names))
    info = tfds.core.DatasetInfo(
        builder=DatasetIdentity(name, tfds.core.Version(_VERSION), str(folder), __name__),
        description=f"Converted by mixer_jax from {dataset}.",
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(),
                "label": tfds.features.Sequence(label) if multi_label else label,
                "file_name": tfds.features.Text(),
            }
        ),
        supervised_keys=("image", "label"),
    )
    info.set_file_format(FORMAT)
    prefixes = _name_prefixes(dataset)
    counts, infos = {}, []
    with tqdm(
        total=sum(map(len, sources.values())), desc="converting", unit=" examples", mininterval=1
    ) as bar:
        for split, source in sources.items():
            writer = _ShardWriter(folder / f"{name}-{split}.{FORMAT}", info.features)
            counts[split] = _write_split(source, prefixes, multi_label, writer, folder, bar)
            writer.finish()
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=writer.shard_lengths,
                    num_bytes=writer.num_bytes,
                    filename_template=ShardedFileTemplate(
                        data_dir=folder, dataset_name=name, split=split, filetype_suffix=FORMAT
                    ),
                )
            )
    info.set_splits(tfds.core.splits.SplitDict(infos))
    info.write_to_directory(folder)
    return counts


def _name_prefixes(dataset: str) -> tuple[str, str]:
    """Returns the starts of the names of examples that depend on where the dataset is."""
    name, _ = split_label(dataset)
    path = os.path.abspath(os.path.expanduser(name.partition(":")[2]))
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    return f"{display_path(folder)}/", f"{name} "


def _write_split(
    source: Source,
    prefixes: tuple[str, ...],
    multi_label: bool,
    writer: "_ShardWriter",
    folder: Path,
    bar: Any,
) -> ConvertedSplit:
    examples_per_class = np.zeros(source.num_classes, np.int64)
    num_skipped = 0

    def read(index: int) -> tuple[Example | None, str, str]:
        """Reads and decodes an example; returns it, its name and the error."""
        try:
            example = source.examples[index]
        except BadImageError as error:
            return None, error.name or f"example {index}", error.description
        return example, example["name"], find_decoding_error(example["image"])

    for example, path, error in map_in_order(read, range(len(source))):
        bar.update()
        for prefix in prefixes:
            path = path.removeprefix(prefix)
        if example is None or error:
            num_skipped += 1
            with open(folder / UNDECODABLE, "a", newline="", encoding="utf-8") as file:
                csv.writer(file, delimiter="\t", lineterminator="\n").writerow([path, error])
            continue
        labels = list(example["labels"])
        examples_per_class[labels] += 1
        writer.write(
            {
                "image": example["image"],
                "label": labels if multi_label else labels[0],
                "file_name": path,
            }
        )
    if num_skipped == len(source):
        raise UserError(
            f"{source.name} must contain a readable image, got {num_skipped:,} that cannot be "
            f"decoded, for example {path} ({error})."
        )
    return ConvertedSplit(examples_per_class, num_skipped)


class _ShardWriter:
    """Writer of one split, which starts another shard when one is full."""

    def __init__(self, prefix: Path, features: Any):
        """Prepares the first shard.

        Args:
            prefix: Path of the shards up to their numbers.
            features: TFDS features of the examples.
        """
        from tensorflow_datasets.core.example_serializer import ExampleSerializer

        self._prefix, self._features = prefix, features
        self._serializer = ExampleSerializer(features.get_serialized_info())
        self._writer: Any = None
        self._shard_bytes = 0
        self.num_bytes = 0
        self.shard_lengths: list[int] = []

    def write(self, example: dict[str, Any]) -> None:
        """Appends an example.

        Raises:
            RuntimeError: The file cannot be written.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        if self._writer is None or self._shard_bytes >= _SHARD_BYTES:
            self._close_shard()
            path = self._temporary_path(len(self.shard_lengths))
            self._writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
            self._shard_bytes = 0
            self.shard_lengths.append(0)
        record = self._serializer.serialize_example(self._features.encode_example(example))
        self._writer.write(record)
        self.shard_lengths[-1] += 1
        self._shard_bytes += len(record)
        self.num_bytes += len(record)

    def finish(self) -> None:
        """Closes the last shard and names all of them, now that their number is known."""
        self._close_shard()
        num_shards = len(self.shard_lengths)
        for index in range(num_shards):
            name = f"{self._prefix.name}-{index:05d}-of-{num_shards:05d}"
            self._temporary_path(index).replace(self._prefix.with_name(name))

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _temporary_path(self, index: int) -> Path:
        return self._prefix.with_name(f"{self._prefix.name}-{index:05d}")


def format_counts(conversion: Conversion) -> str:
    """Formats the number of examples of each class, or the extremes of many classes."""
    names, splits = conversion.class_names, conversion.splits
    if len(names) <= _MAX_LISTED_CLASSES:
        rows = [
            (name, [split.examples_per_class[label] for split in splits.values()])
            for label, name in enumerate(names)
        ]
    else:
        rows = [
            (text, [extreme(split.examples_per_class) for split in splits.values()])
            for text, extreme in (("smallest class", np.min), ("largest class", np.max))
        ]
    rows.append(("skipped", [split.num_skipped for split in splits.values()]))
    width = max(len("class"), *(len(name) for name, _ in rows))
    lines = [f"{'class':<{width}}" + "".join(f" {split:>12}" for split in splits)]
    for name, counts in rows:
        lines.append(f"{name:<{width}}" + "".join(f" {count:>12,}" for count in counts))
    return "\n".join(lines)
