"""TFDS datasets, including those of the builders in `mixer_jax.data.builders`."""

import contextlib
import errno
import importlib
import io
import json
import os
import re
import shlex
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mixer_jax.data.decode import BadImageError
from mixer_jax.data.names import PATH_PREFIXES, SYNTHETIC
from mixer_jax.data.preparation import (
    INFO_FILE,
    check_manual_download,
    convert_to_array_record,
    download_and_prepare,
    format_manual_instructions,
    has_random_access,
    is_prepared,
    preparation_lock,
    use_array_record,
)
from mixer_jax.data.source import Example, Examples, Source
from mixer_jax.data.tfds_labels import (
    FeatureSelection,
    LabelSpec,
    bare_dataset_name,
    get_label_spec,
    image_fixup,
    parse_dataset_name,
)
from mixer_jax.errors import (
    DatasetNotPreparedError,
    MissingFileError,
    RunError,
    UserError,
    disk_failure,
    install_hint,
    suggest,
    summarize_error,
)
from mixer_jax.files import raise_open_file_limit

# Builders of mixer_jax; importing the module registers the builder with TFDS.
_BUILDER_MODULES = {
    "digits": "mixer_jax.data.builders.digits",
    "imagenet21k": "mixer_jax.data.builders.imagenet21k",
}
# Datasets so small that opening them prepares them.
_PREPARED_ON_OPEN = {"digits"}

_FILE_NAME = "file_name"
_BAD_LABEL = "label is hidden or not a class"
# Parts of messages of the reader of array_record: of a wrong checksum, and of one in the index of a
# file, such as that of a truncated file, without which none of its records can be read.
_WRONG_CHECKSUM, _DAMAGED_FILE = "Corrupted", "Failed to read Riegeli"
_OPEN_FILES_HINT = " Raise the limit on open files (ulimit -n)."


class _TfdsExamples(Examples):
    """Examples of a TFDS data source.

    Only the required features are decoded: many datasets have further images, masks or texts. An
    example is bad if its record is damaged, or if its label is hidden or not a class. Reading one
    raises RunError if its file is missing, incomplete or cannot be read.
    """

    def __init__(
        self,
        records: Any,
        features: Any,
        label: LabelSpec,
        name: str,
        split: str,
        full_name: str,
    ):
        import tensorflow_datasets as tfds

        self._identity = {
            "dataset": full_name,
            "label": parse_dataset_name(name)[1] or "",
            "split": split,
        }
        self._records, self._label, self._source_name = records, label, f"{name} {split}"
        file_name: FeatureSelection = {_FILE_NAME: ()} if _FILE_NAME in features else {}
        selection = file_name | label.features
        self._label_features = _select_features(features, selection)
        self._features = _select_features(features, {"image": ()} | selection)
        self._decoders = {"image": tfds.decode.SkipDecoding()}
        self._fix_image = image_fixup(name)

    def __len__(self) -> int:
        return len(self._records)

    def fingerprint(self) -> dict[str, str]:
        """Returns name, version, label and split of the dataset."""
        return dict(self._identity)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        example = self._features.deserialize_example_np(
            self._read_record(index), decoders=self._decoders
        )
        labels = self._extract_labels(example, index)
        image = self._fix_image(example["image"]) if self._fix_image else example["image"]
        return Example(image=image, labels=labels, name=self._name(example, index))

    def read_labels(self, index: int) -> tuple[int, ...]:
        """Reads the labels of one example; its record contains the image, which is not parsed."""
        record = self._read_record(index)
        return self._extract_labels(self._label_features.deserialize_example_np(record), index)

    def _read_record(self, index: int) -> bytes:
        name = f"{self._source_name}, example {index}"
        # The reader finds no records in some truncated files.
        reason = "the file is incomplete"
        try:
            if record := self._records[index]:
                return record
        except RuntimeError as error:
            reason = summarize_error(error)
            # Of all errors of the reader, only a wrong checksum can concern a single record.
            if str(error).startswith(_WRONG_CHECKSUM) and _DAMAGED_FILE not in str(error):
                raise BadImageError("damaged record", reason, name) from None
        hint = _OPEN_FILES_HINT if os.strerror(errno.EMFILE) in reason else ""
        error_type = MissingFileError if os.strerror(errno.ENOENT) in reason else RunError
        raise error_type(f"{name} cannot be read from {self._file_of(index)}: {reason}.{hint}")

    def check_files(self) -> None:
        """Reads the first record, which may be damaged."""
        with contextlib.suppress(BadImageError):
            self._read_record(0)

    def _file_of(self, index: int) -> str:
        """Finds the file that contains an example."""
        split = self._records.dataset_info.splits[self._records.split]
        for part in split.file_instructions:
            if index < part.take:
                return part.filename
            index -= part.take
        raise IndexError(index)

    def _extract_labels(self, example: dict[str, Any], index: int) -> tuple[int, ...]:
        labels = self._label.extract(example)
        for label in labels:
            # Training would learn that such an example has none of the classes.
            if not 0 <= label < len(self._label.class_names):
                name = self._name(example, index)
                raise BadImageError(_BAD_LABEL, f"{label}", name)
        return labels

    def _name(self, example: dict[str, Any], index: int) -> str:
        file_name = example.get(_FILE_NAME, b"").decode()
        suffix = f": {file_name}" if file_name else f", example {index}"
        return f"{self._source_name}{suffix}"


def _select_features(features: Any, selection: FeatureSelection) -> Any:
    """Selects features of a dataset; TFDS's `PartialDecoding` would import TensorFlow."""
    import tensorflow_datasets as tfds

    selected = {}
    for name, parts in selection.items():
        feature = features[name]
        if parts:
            feature = tfds.features.Sequence({part: feature.feature[part] for part in parts})
        selected[name] = feature
    return tfds.features.FeaturesDict(selected)


def open_tfds(name: str, split: str, data_dir: str = "") -> Source:
    """Opens one split of a TFDS dataset; prepares `digits` if it is missing.

    Args:
        name: Dataset in TFDS syntax, e.g. "cifar10", "digits/low", "imagenet2012:5.1.0",
            optionally with @ and a label, e.g. "cifar100@coarse_label".
        split: Split in TFDS syntax, e.g. "train[:99%]".
        data_dir: Directory of the TFDS datasets; empty: TFDS's default.

    Raises:
        UserError: The dataset or split does not exist, or is not prepared. The message says how to
            prepare it.
    """
    dataset, _ = parse_dataset_name(name)
    builder = find_builder(dataset, data_dir, for_training=True)
    # Checked first, because preparing the dataset may take hours.
    get_label_spec(name, builder.info.features)
    if not has_random_access(builder):
        if is_prepared(builder) or bare_dataset_name(name) not in _PREPARED_ON_OPEN:
            raise _not_prepared_error(dataset, builder)
        _prepare_small_dataset(dataset, builder)
        builder = find_builder(dataset, data_dir)
    return _make_source(builder, name, split)


def prepare_tfds(name: str, data_dir: str = "", manual_dir: str = "") -> tuple[Any, bool]:
    """Prepares a dataset with random access, or converts it, unless it is already prepared.

    Args:
        name: Dataset in TFDS syntax; a label after an @ must exist and is otherwise ignored.
        data_dir: Directory of the TFDS datasets; empty: TFDS's default.
        manual_dir: Directory of manual downloads; empty: downloads/manual in `data_dir`.

    Returns:
        The dataset's TFDS builder, ready to be read, and whether it was already prepared.

    Raises:
        UserError: The dataset or label does not exist, needs no preparation, or cannot be prepared
            for a reason that the user can fix.
        WriteFailureError: The disk is full or failing.
        RunError: The code of the dataset's builder fails.
    """
    if name == SYNTHETIC or name.startswith(PATH_PREFIXES):
        raise UserError(f"dataset {name!r} does not need preparation. Train on it directly.")
    if data_dir:
        data_dir = resolve_data_dir(data_dir)
    raise_open_file_limit()
    dataset, label = parse_dataset_name(name)
    builder = find_builder(dataset, data_dir)
    if label is not None:
        get_label_spec(name, builder.info.features)
    if has_random_access(builder):
        return builder, True
    if not is_prepared(builder):
        # Before anything is written.
        check_manual_download(builder, manual_dir)
    try:
        with _lock(builder):
            # Looked up again, since another process may just have prepared it.
            builder = find_builder(dataset, data_dir)
            if not is_prepared(builder):
                download_and_prepare(builder, check_manual_download(builder, manual_dir))
            elif not has_random_access(builder):
                convert_to_array_record(builder)
    except OSError as error:
        problem = f"dataset {dataset!r} cannot be written"
        raise disk_failure(problem, error) or UserError(f"{problem}: {error}.") from error
    return find_builder(dataset, data_dir), False


def _lock(builder: Any, *, wait: bool = False) -> AbstractContextManager[None]:
    return preparation_lock(Path(builder.data_path), builder.info.full_name, wait=wait)


def resolve_data_dir(data_dir: str) -> str:
    """Makes the local directory of the TFDS datasets absolute; empty: TFDS's default.

    Raises:
        UserError: It is a URL.
    """
    if "://" in data_dir:
        raise UserError(
            f"--data_dir must be a local folder, got {data_dir}. Prepare in a local folder and "
            "copy it there."
        )
    if not data_dir:
        import tensorflow_datasets as tfds

        data_dir = tfds.core.constants.DATA_DIR
    return os.path.abspath(os.path.expanduser(data_dir))


def find_builder(name: str, data_dir: str, *, for_training: bool = False) -> Any:
    """Finds the TFDS builder of a dataset, from code or from prepared files.

    Args:
        name: Dataset in TFDS syntax, without a label.
        data_dir: Directory of the TFDS datasets; empty: TFDS's default.
        for_training: Whether messages also suggest configuration keys.

    Raises:
        UserError: No such dataset exists.
    """
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    bare_name = bare_dataset_name(name)
    if module := _BUILDER_MODULES.get(bare_name):
        importlib.import_module(module)
    local = data_dir and "://" not in data_dir
    expanded = str(Path(data_dir).expanduser()) if local else data_dir
    searched = expanded or tfds.core.constants.DATA_DIR
    try:
        builder = tfds.builder(name, data_dir=expanded or None)
        use_array_record(builder)
        return builder
    except tfds.core.registered.DatasetNotFoundError as error:
        _check_not_a_folder(name)
        hint = suggest(bare_name, dataset_names())
        if for_training:
            hint += (
                f" Put it into {searched}/{name} in TFDS's array_record format, set "
                "--config.dataset.data_dir to the directory that contains it, or run without data "
                f"by --config.dataset.name={SYNTHETIC}."
            )
        raise UserError(
            f"dataset {name!r} is neither prepared in {searched} nor known to TFDS.{hint}"
        ) from error
    except (ParseError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"dataset {name!r} in {searched} must have valid metadata ({summarize_error(error)}). "
            "Prepare the dataset again in another --data_dir."
        ) from error
    except (ValueError, AssertionError, ImportError) as error:
        _check_not_a_folder(name)
        reason = re.split(" Here are | The builder name string ", " ".join(str(error).split()))[0]
        if "BuilderConfig" in reason:
            configs = tfds.builder_cls(name.split("/")[0]).builder_configs
            reason += f" Available configs: {', '.join(configs)}."
        names = dataset_names()
        hint = install_hint(reason) or ("" if bare_name in names else suggest(bare_name, names))
        raise UserError(
            f"dataset {name!r} cannot be opened from {searched}: {reason.rstrip('.')}.{hint}"
        ) from error


def _check_not_a_folder(name: str) -> None:
    if name and Path(name).expanduser().is_dir():
        raise UserError(
            f"dataset {name!r} must be the name of a dataset, got a local folder. If it contains "
            f"images, write folder:{name}."
        )


def dataset_names() -> list[str]:
    """Lists the names of the datasets of mixer_jax and TFDS."""
    import tensorflow_datasets as tfds

    return [*_BUILDER_MODULES, *tfds.list_builders(with_community_datasets=False)]


def _prepare_small_dataset(name: str, builder: Any) -> None:
    """Prepares a small dataset in seconds, without TFDS's progress bars."""
    import tensorflow_datasets as tfds

    print(f"writing dataset {builder.info.full_name} to {builder.data_path}", file=sys.stderr)
    tfds.disable_progress_bar()
    try:
        # Other processes that open it wait for the lock, if the file system supports locks.
        with _lock(builder, wait=True), contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except FileExistsError:
        pass  # Another process, on this host or another one, wrote the same dataset first.
    except OSError as error:
        problem = f"dataset {name!r} cannot be written to {builder.data_path}"
        fix = "Set --config.dataset.data_dir to a writable folder."
        raise disk_failure(problem, error) or UserError(f"{problem}: {error}. {fix}") from error


def _not_prepared_error(name: str, builder: Any) -> DatasetNotPreparedError:
    root = str(builder.data_dir_root)
    status = f"is not prepared in {builder.data_path.parent}"
    if is_prepared(builder):
        status = (
            f"is prepared as {builder.info.file_format.value} in {builder.data_path}, a format "
            "without random access"
        )
    command = shlex.join(["python", "-m", "mixer_jax.prepare", name, f"--data_dir={root}"])
    hint = command
    if instructions := format_manual_instructions(builder):
        hint = f"download manually to {root}/downloads/manual: {instructions} Then run: {command}"
    return DatasetNotPreparedError(
        f"dataset {name!r} {status}. Prepare it by: {command} (manual downloads belong in "
        f"{root}/downloads/manual) and set --config.dataset.data_dir={shlex.quote(root)}, or run "
        f"without data by --config.dataset.name={SYNTHETIC}.",
        hint,
    )


def _make_source(builder: Any, name: str, split: str) -> Source:
    import tensorflow_datasets as tfds

    # Processes that load images inherit the limit.
    raise_open_file_limit()
    label = get_label_spec(name, builder.info.features)
    if not builder.info.splits:
        raise UserError(
            f"dataset {name!r} must have splits, got none in {builder.data_path / INFO_FILE}. "
            "Prepare the dataset again in another --data_dir."
        )
    try:
        raw_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
        records = builder.as_data_source(split=split, deserialize_method=raw_bytes)
    except ValueError as error:
        raise UserError(
            f"split of dataset {name!r} must be one of {', '.join(builder.info.splits)}, or "
            f'slices such as "train[:99%]", and not empty, got {split!r}.'
        ) from error
    examples = _TfdsExamples(
        records, builder.info.features, label, name, split, builder.info.full_name
    )
    try:
        examples.read_labels(0)
    except BadImageError as error:
        if error.reason == _BAD_LABEL:
            raise UserError(
                f"labels of split {split!r} of dataset {name!r} must not be hidden. Use another "
                "split."
            ) from error
    return Source(f"{name} {split}", examples, label.class_names, label.multi_label)
