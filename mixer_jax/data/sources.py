"""Where examples come from: a random-access list of encoded images and labels, with its classes."""

import contextlib
import dataclasses
import importlib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import cv2
import numpy as np

from mixer_jax.errors import UserError

SYNTHETIC = "synthetic"
# Builders of our own; importing one registers it with TFDS.
_OWN_BUILDERS = {"digits": "mixer_jax.data.builders.digits"}


class Example(TypedDict):
    """An image as its file's bytes, and the index of its class."""

    image: bytes
    label: int


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set.

    Attributes:
        name: data set and split, for people.
        examples: random access to every example; the order never changes.
        class_names: a name for each class.
    """

    name: str
    examples: Sequence[Example]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.examples)


def open_source(
    name: str, split: str, data_dir: str = "", *, num_classes: int = 0, num_examples: int = 0
) -> Source:
    """Opens one split of a data set.

    Args:
        name: a data set of TFDS with images and one label each, "digits", or "synthetic".
        split: in TFDS syntax, e.g. "train[:99%]". Synthetic data take any name.
        data_dir: where TFDS keeps its data sets; empty: TFDS's default.
        num_classes: of synthetic data, 0: 1000; real ones bring their own.
        num_examples: likewise, 0: 1024.

    Raises:
        UserError: the data set or split does not exist, or is not prepared; says how to do it.
    """
    if name == SYNTHETIC:
        return synthetic_source(split, num_classes or 1000, num_examples or 1024)
    builder = _tfds_builder(name, data_dir)
    if not _is_readable(builder):
        if builder.info.splits or not _own_module(name):
            raise UserError(_how_to_prepare(name, builder))
        _prepare(name, builder)
        builder = _tfds_builder(name, data_dir)
    return _tfds_source(builder, name, split)


class _SyntheticExamples(Sequence[Example]):
    """Noise with labels: a few encoded images used over and over."""

    def __init__(self, split: str, num_classes: int, num_examples: int, image_size: int):
        self._num_classes, self._num_examples = num_classes, num_examples
        self._seed = list(split.encode())
        rng = np.random.default_rng(self._seed)
        # Coarse noise compresses like a photograph, so decoding costs what it costs with real ones.
        coarse = rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
        sizes = (image_size, image_size)
        images = (cv2.resize(image, sizes, interpolation=cv2.INTER_CUBIC) for image in coarse)
        self._encoded = [cv2.imencode(".jpg", image)[1].tobytes() for image in images]

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]  # Raises the IndexError that ends an iteration.
        label = np.random.default_rng([*self._seed, index]).integers(self._num_classes)
        return Example(image=self._encoded[index % len(self._encoded)], label=int(label))


def synthetic_source(
    split: str, num_classes: int, num_examples: int, image_size: int = 256
) -> Source:
    """Returns noise images with random labels, the same for the same split; needs no disk.

    Args:
        split: any text; another split has other images and labels.
        num_classes: labels lie in [0, num_classes).
        num_examples: length of the source.
        image_size: side of the square images, pixels.
    """
    examples = _SyntheticExamples(split, num_classes, num_examples, image_size)
    return Source(f"{SYNTHETIC} {split}", examples, tuple(map(str, range(num_classes))))


class _TfdsExamples(Sequence[Example]):
    """Examples of a TFDS data source, in our form."""

    def __init__(self, data: Sequence[dict[str, Any]]):
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        example = self._data[range(len(self))[index]]
        return Example(image=example["image"], label=int(example["label"]))


def _own_module(name: str) -> str | None:
    """Returns the module of our own builder, if the data set has one."""
    return _OWN_BUILDERS.get(re.split("[/:]", name)[0])


def _tfds_builder(name: str, data_dir: str) -> Any:
    """Returns the TFDS builder `name`, from code or from prepared files."""
    import tensorflow_datasets as tfds

    if module := _own_module(name):
        importlib.import_module(module)
    where = str(Path(data_dir).expanduser()) if data_dir and "://" not in data_dir else data_dir
    searched = where or tfds.core.constants.DATA_DIR
    try:
        builder = tfds.builder(name, data_dir=where or None)
        if module and not builder.info.splits:
            # Ours must be told to write the format that can be read by index; of prepared data
            # TFDS reads the format from the files.
            builder = tfds.builder(name, data_dir=where or None, file_format="array_record")
        return builder
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(
            f"data set {name!r} is not prepared in {searched}, and TFDS has no recipe for it; put "
            f"it at {searched}/{name} in TFDS's array_record format, or set "
            f"--config.dataset.data_dir to where it lies, or run without data by "
            f"--config.dataset.name={SYNTHETIC}"
        ) from error
    except (ValueError, AssertionError) as error:
        reason = " ".join(str(error).split()).partition(" Here are ")[0]
        if "BuilderConfig" in reason:
            reason += f" It has {', '.join(tfds.builder_cls(name.split('/')[0]).builder_configs)}."
        raise UserError(f"data set {name!r} cannot be opened from {searched}: {reason}") from error


def _is_readable(builder: Any) -> bool:
    """Says whether the data set is prepared in the format that can be read by index."""
    import tensorflow_datasets as tfds

    if not builder.info.splits:
        return False
    return builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD


def _prepare(name: str, builder: Any) -> None:
    """Writes one of our own small data sets, in seconds and without TFDS's progress bars."""
    import tensorflow_datasets as tfds

    print(f"writing data set {builder.info.full_name} to {builder.data_path}", file=sys.stderr)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except FileExistsError:
        pass  # Another process, on this host or another, wrote the same and was done first.
    except OSError as error:
        raise UserError(
            f"data set {name!r} cannot be written to {builder.data_path}: {error}; set "
            "--config.dataset.data_dir to a folder that can be written"
        ) from error


def _how_to_prepare(name: str, builder: Any) -> str:
    root = builder.data_dir.removesuffix(str(builder.info.full_name)).rstrip("/")
    found = f"is not prepared in {builder.data_path.parent}"
    if builder.info.splits:
        found = (
            f"is prepared as {builder.info.file_format.value} in {builder.data_path}, which has no "
            "random access"
        )
        # TFDS refuses to write a second format beside the first.
        root = f"{root}/array_record"
    # Not `tfds build`: it does not start without Apache Beam, which asks for older libraries.
    code = (
        "import tensorflow_datasets as tfds; "
        f"tfds.builder({name!r}, file_format='array_record', data_dir={root!r})"
        ".download_and_prepare()"
    )
    command = f'python -c "{code}"'
    return (
        f"data set {name!r} {found}; prepare it with: {command} (manual downloads go to "
        f"{root}/downloads/manual) and set --config.dataset.data_dir={root}, or run without data "
        f"by --config.dataset.name={SYNTHETIC}"
    )


def _tfds_source(builder: Any, name: str, split: str) -> Source:
    import tensorflow_datasets as tfds

    features = builder.info.features
    kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    if any(k not in features or not isinstance(features[k], kinds[k]) for k in kinds):
        raise UserError(
            f"data set {name!r} has features {', '.join(features)}; needed are an image and a label"
        )
    try:
        skip = {"image": tfds.decode.SkipDecoding()}
        data = builder.as_data_source(split=split, decoders=skip)
        examples = _TfdsExamples(data)
    except ValueError as error:
        known = ", ".join(builder.info.splits)
        raise UserError(
            f"split {split!r} of data set {name!r} does not exist or is empty; it has {known} "
            '(and slices such as "train[:99%]")'
        ) from error
    if examples[0]["label"] < 0:
        raise UserError(f"split {split!r} of data set {name!r} hides its labels; name another")
    return Source(f"{name} {split}", examples, tuple(features["label"].names))
