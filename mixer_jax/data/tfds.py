"""Data sets of TFDS, and our own builders for it."""

import contextlib
import importlib
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixer_jax.data.folder import FOLDER
from mixer_jax.data.preparation import (
    check_manual_download,
    choose_format,
    convert_to_array_record,
    download_and_prepare,
    has_random_access,
    is_prepared,
    needs_manual_download,
    preparation_lock,
)
from mixer_jax.data.source import Example, Source
from mixer_jax.data.synthetic import SYNTHETIC
from mixer_jax.data.tfds_labels import (
    LabelSpec,
    Needed,
    bare_dataset_name,
    get_label_spec,
    image_fixup,
    parse_dataset_name,
)
from mixer_jax.errors import DatasetNotPreparedError, UserError, suggest

# Builders of our own; importing one registers it with TFDS.
_OWN_BUILDERS = {
    "digits": "mixer_jax.data.builders.digits",
    "imagenet21k": "mixer_jax.data.builders.imagenet21k",
}
# So small that opening one writes it.
_WRITTEN_WHEN_OPENED = {"digits"}

_FILE_NAME = "file_name"


class _TfdsExamples(Sequence[Example]):
    """Examples of a TFDS data source, in our form.

    Only what is needed of them is decoded: many sets have further images, masks or texts.
    """

    def __init__(
        self, records: Sequence[Any], features: Any, label: LabelSpec, name: str, split: str
    ):
        import tensorflow_datasets as tfds

        self._records, self._label, self._place = records, label, f"{name} {split}"
        file_name: Needed = {_FILE_NAME: ()} if _FILE_NAME in features else {}
        self._features = _some_features(features, {"image": (), **file_name, **label.needed})
        self._decoders = {"image": tfds.decode.SkipDecoding()}
        self._visible = image_fixup(name)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        example = self._features.deserialize_example_np(
            self._records[index], decoders=self._decoders
        )
        file = example.get(_FILE_NAME, b"")
        name = f"{self._place}: {file.decode()}" if file else f"{self._place}, example {index}"
        image = self._visible(example["image"]) if self._visible else example["image"]
        return Example(image=image, labels=self._label.read(example), name=name)


def _some_features(features: Any, needed: Needed) -> Any:
    """Returns those features of a data set, in TFDS's form.

    TFDS's own `PartialDecoding` would import TensorFlow.
    """
    import tensorflow_datasets as tfds

    chosen = {}
    for name, parts in needed.items():
        kind = features[name]
        if parts:
            kind = tfds.features.Sequence({part: kind.feature[part] for part in parts})
        chosen[name] = kind
    return tfds.features.FeaturesDict(chosen)


def open_tfds(name: str, split: str, data_dir: str = "") -> Source:
    """Opens one split of a data set of TFDS; writes our own small ones if they are missing.

    Args:
        name: in TFDS syntax, e.g. "cifar10", "digits/low", "imagenet2012:5.1.0"; the label may
            follow after an @, e.g. "cifar100@coarse_label".
        split: in TFDS syntax, e.g. "train[:99%]".
        data_dir: where TFDS keeps its data sets; empty: TFDS's default.

    Raises:
        UserError: the data set or split does not exist, or is not prepared; says how to do it.
    """
    dataset, _ = parse_dataset_name(name)
    builder = find_builder(dataset, data_dir)
    # Before anyone spends hours on preparing it.
    get_label_spec(name, builder.info.features)
    if not has_random_access(builder):
        if is_prepared(builder) or bare_dataset_name(name) not in _WRITTEN_WHEN_OPENED:
            raise _not_prepared(dataset, builder)
        _write_quickly(dataset, builder)
        builder = find_builder(dataset, data_dir)
    return _tfds_source(builder, name, split)


def prepare_tfds(name: str, data_dir: str = "", manual_dir: str = "") -> tuple[Any, bool]:
    """Prepares a data set in the format with random access, or converts it, unless it is there.

    Args:
        name: in TFDS syntax, or of one of our own; a label after an @ must exist, and changes
            nothing.
        data_dir: where TFDS keeps its data sets; empty: TFDS's default.
        manual_dir: where the user's downloads lie; empty: downloads/manual in `data_dir`.

    Returns:
        The TFDS builder of the data set, ready to be read, and whether it has been all along.

    Raises:
        UserError: there is no such data set or label, or it needs no preparation, or it cannot be
            prepared for a reason that the user can remove.
        RunFailedError: the data set's own code fails.
    """
    if name == SYNTHETIC or name.startswith(FOLDER):
        raise UserError(f"data set {name!r} needs no preparation; train on it as it is")
    if "://" in data_dir:
        raise UserError(
            f"--data_dir={data_dir} is no local folder; prepare in one and copy it there"
        )
    data_dir = data_dir and os.path.abspath(os.path.expanduser(data_dir))
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
        with preparation_lock(builder):
            # Looked up anew, since another program may just have prepared it.
            builder = find_builder(dataset, data_dir)
            if not is_prepared(builder):
                download_and_prepare(builder, check_manual_download(builder, manual_dir))
            elif not has_random_access(builder):
                convert_to_array_record(builder)
    except OSError as error:
        raise UserError(f"data set {dataset!r} cannot be written: {error}") from error
    return find_builder(dataset, data_dir), False


def data_dir_of(builder: Any) -> str:
    """Returns the data_dir in which the data set lies."""
    return str(builder.data_dir).removesuffix(str(builder.info.full_name)).rstrip("/")


def find_builder(name: str, data_dir: str) -> Any:
    """Returns the TFDS builder `name`, from code or from prepared files.

    Raises:
        UserError: there is no such data set.
    """
    import tensorflow_datasets as tfds

    if module := _OWN_BUILDERS.get(bare_dataset_name(name)):
        importlib.import_module(module)
    where = str(Path(data_dir).expanduser()) if data_dir and "://" not in data_dir else data_dir
    searched = where or tfds.core.constants.DATA_DIR
    try:
        builder = tfds.builder(name, data_dir=where or None)
        choose_format(builder)
        return builder
    except tfds.core.registered.DatasetNotFoundError as error:
        hint = suggest(bare_dataset_name(name), _known_names(), fallback=";")
        raise UserError(
            f"data set {name!r} is not prepared in {searched}, and TFDS has no recipe for it{hint} "
            f"put it at {searched}/{name} in TFDS's array_record format, or set "
            f"--config.dataset.data_dir to where it lies, or run without data by "
            f"--config.dataset.name={SYNTHETIC}"
        ) from error
    except (ValueError, AssertionError) as error:
        reason = re.split(" Here are | The builder name string ", " ".join(str(error).split()))[0]
        if "BuilderConfig" in reason:
            reason += f" It has {', '.join(tfds.builder_cls(name.split('/')[0]).builder_configs)}."
        base = bare_dataset_name(name)
        hint = "" if base in _known_names() else suggest(base, _known_names())
        raise UserError(
            f"data set {name!r} cannot be opened from {searched}: {reason}{hint}"
        ) from error


def _known_names() -> list[str]:
    import tensorflow_datasets as tfds

    return [*_OWN_BUILDERS, *tfds.list_builders(with_community_datasets=False)]


def _write_quickly(name: str, builder: Any) -> None:
    """Writes one of our own small data sets, in seconds and without TFDS's progress bars."""
    import tensorflow_datasets as tfds

    print(f"writing data set {builder.info.full_name} to {builder.data_path}", file=sys.stderr)
    tfds.disable_progress_bar()
    try:
        # Where locks work, other processes that open it wait, and then find it written.
        with preparation_lock(builder, wait=True), contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except FileExistsError:
        pass  # Another process, on this host or another, wrote the same and was done first.
    except OSError as error:
        raise UserError(
            f"data set {name!r} cannot be written to {builder.data_path}: {error}; set "
            "--config.dataset.data_dir to a folder that can be written"
        ) from error


def _not_prepared(name: str, builder: Any) -> DatasetNotPreparedError:
    root = data_dir_of(builder)
    found = f"is not prepared in {builder.data_path.parent}"
    if is_prepared(builder):
        found = (
            f"is prepared as {builder.info.file_format.value} in {builder.data_path}, which has no "
            "random access"
        )
    command = shlex.join(["python", "-m", "mixer_jax.prepare", name, f"--data_dir={root}"])
    advice = command
    if by_hand := needs_manual_download(builder):
        advice = f"download by hand, into {root}/downloads/manual: {by_hand} Then: {command}"
    return DatasetNotPreparedError(
        f"data set {name!r} {found}; prepare it with: {command} (manual downloads go to "
        f"{root}/downloads/manual) and set --config.dataset.data_dir={shlex.quote(root)}, or run "
        f"without data by --config.dataset.name={SYNTHETIC}",
        advice,
    )


def _tfds_source(builder: Any, name: str, split: str) -> Source:
    import tensorflow_datasets as tfds

    label = get_label_spec(name, builder.info.features)
    try:
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        records = builder.as_data_source(split=split, deserialize_method=raw)
    except ValueError as error:
        known = ", ".join(builder.info.splits)
        raise UserError(
            f"split {split!r} of data set {name!r} does not exist or is empty; it has {known} "
            '(and slices such as "train[:99%]")'
        ) from error
    examples = _TfdsExamples(records, builder.info.features, label, name, split)
    if min(examples[0]["labels"], default=0) < 0:
        raise UserError(f"split {split!r} of data set {name!r} hides its labels; name another")
    return Source(f"{name} {split}", examples, label.class_names, label.multi_label)
