"""Feature files: names, labels and activations of many images, as npz or Parquet.

A file is assembled from parts, one of which is in memory at a time.
"""

import json
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Shaped

from mixer_jax.errors import RunError
from mixer_jax.files import atomic_target, parse_json

# Names of arrays in a part, next to those of layers.
_NAMES, _LABELS, _BAD = "names", "labels", "bad_images"
# A constant, so that files of equal contents are equal.
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


class Part(NamedTuple):
    """Activations of consecutive images.

    Attributes:
        names: Name of each image.
        labels: Class index of each image, or bool (n, classes) if there can be several; None:
            unknown.
        layers: Activations by name.
        bad_images: Name and reason of each image that was left out.
    """

    names: list[str]
    labels: Shaped[np.ndarray, "n ..."] | None
    layers: dict[str, Float32[np.ndarray, "n ..."]]
    bad_images: list[tuple[str, str]]


def write_part(path: Path, part: Part) -> None:
    """Writes a part; a crash leaves either all of it or nothing.

    Raises:
        OSError: The file cannot be written.
    """
    arrays: dict[str, Any] = {
        _NAMES: np.array(part.names, np.str_),
        _BAD: np.array(json.dumps(part.bad_images)),
    }
    if part.labels is not None:
        arrays[_LABELS] = part.labels
    # Some names of layers would be read as paths or arguments.
    arrays |= {f"layer {name}": array for name, array in part.layers.items()}
    with atomic_target(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


class Parts:
    """Parts of a feature file, of which one array is read at a time."""

    def __init__(self, paths: Sequence[Path]):
        """Reads the number of images of each part.

        Raises:
            RunError: A part is damaged.
        """
        self._paths = paths
        self.sizes = [len(self._read_names(path)) for path in paths]

    @property
    def num_images(self) -> int:
        """Number of images in all parts."""
        return sum(self.sizes)

    def names(self) -> Iterator[np.ndarray]:
        """Yields the names of images in each part."""
        return map(self._read_names, self._paths)

    def labels(self) -> Iterator[np.ndarray]:
        """Yields the labels in each part."""
        return (self._read(path, _LABELS) for path in self._paths)

    def layer(self, name: str) -> Iterator[np.ndarray]:
        """Yields a layer's activations in each part."""
        return (self._read(path, f"layer {name}") for path in self._paths)

    def bad_images(self) -> list[tuple[str, str]]:
        """Returns name and reason of every image that was left out."""
        found = []
        for path in self._paths:
            try:
                for name, reason in parse_json(str(self._read(path, _BAD))):
                    found.append((str(name), str(reason)))
            except (ValueError, TypeError) as error:
                raise _damaged(path) from error
        return found

    def _read(self, path: Path, name: str) -> np.ndarray:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                array = arrays[name]
                if not isinstance(array, np.ndarray):
                    raise ValueError("not an array")
                if array.dtype.kind == "U" and array.size:
                    characters = array.reshape(-1).view(f"{array.dtype.byteorder}u4")
                    if characters.max() > sys.maxunicode:
                        raise ValueError("not text")
                return array
        except OSError:
            raise
        except Exception as error:  # NumPy raises errors of many types.
            raise _damaged(path) from error

    def _read_names(self, path: Path) -> np.ndarray:
        names = self._read(path, _NAMES)
        if names.ndim != 1:
            raise _damaged(path)
        return names


def _damaged(path: Path) -> RunError:
    return RunError(f"{path} is damaged. Delete it and rerun the same command to compute it again.")


class Contents(NamedTuple):
    """Contents of a feature file besides the arrays of its parts.

    Attributes:
        layers: Shape of each layer's activations, without the axis of images.
        class_names: Names of the classes; empty if the images have no labels.
        multi_label: Whether an image may have any number of labels.
        metadata: Description of the model and the data, as plain data.
    """

    layers: dict[str, tuple[int, ...]]
    class_names: tuple[str, ...]
    multi_label: bool
    metadata: dict[str, Any]


def write_npz(path: Path, parts: Parts, contents: Contents) -> None:
    """Writes an npz file of uncompressed arrays.

    These are `names`, `labels` and `class_names` if there are labels, one array per layer, and
    `metadata` as JSON.
    """
    n = parts.num_images
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        width = max((names.dtype.itemsize for names in parts.names()), default=4)
        _write_member(archive, "names", f"<U{width // 4}", (n,), parts.names())
        if contents.class_names:
            if contents.multi_label:
                shape = (n, len(contents.class_names))
                _write_member(archive, "labels", "|b1", shape, parts.labels())
            else:
                _write_member(archive, "labels", "<i8", (n,), parts.labels())
            _write_array(archive, "class_names", np.array(contents.class_names))
        for name, image_shape in contents.layers.items():
            _write_member(archive, name, "<f4", (n, *image_shape), parts.layer(name))
        _write_array(archive, "metadata", np.array(json.dumps(contents.metadata)))


def _write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    _write_member(archive, name, array.dtype.str, array.shape, iter([array]))


def _write_member(
    archive: zipfile.ZipFile,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    chunks: Iterator[np.ndarray],
) -> None:
    """Writes the concatenation of arrays as one array, in the format of `np.save`."""
    info = zipfile.ZipInfo(f"{name}.npy", _ZIP_DATE)
    info.external_attr = 0o644 << 16
    with archive.open(info, "w", force_zip64=True) as file:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(chunk.astype(dtype, copy=False).tobytes())


def write_parquet(path: Path, parts: Parts, contents: Contents) -> None:
    """Writes a Parquet file with one row per image and one row group per part.

    Columns are `name`, `label` and `class_name` if there are labels (lists if there can be
    several), and one per layer: lists of fixed size, flattened in row-major order. The schema's
    metadata has the shapes.
    """
    # Imported here: few commands need it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = contents.metadata | {
        "class_names": contents.class_names,
        "shapes": contents.layers,
    }
    writer = None
    try:
        labels = parts.labels() if contents.class_names else iter([None] * len(parts.sizes))
        layers = [parts.layer(name) for name in contents.layers]
        for names, part_labels, *arrays in zip(parts.names(), labels, *layers, strict=True):
            columns: dict[str, Any] = {"name": pa.array(names.tolist(), pa.string())}
            if part_labels is not None:
                columns |= _label_columns(part_labels, contents)
            for name, array in zip(contents.layers, arrays, strict=True):
                size = int(np.prod(contents.layers[name]))
                values = pa.array(array.reshape(-1))
                columns[name] = pa.FixedSizeListArray.from_arrays(values, size)
            table = pa.table(columns)
            if writer is None:
                schema = table.schema.with_metadata({"mixer_jax": json.dumps(metadata)})
                # Floating-point numbers are not worth a dictionary.
                writer = pq.ParquetWriter(path, schema, use_dictionary=False)
            if len(names):
                writer.write_table(table.cast(writer.schema), row_group_size=len(names))
    finally:
        if writer is not None:
            writer.close()


def _label_columns(labels: np.ndarray, contents: Contents) -> dict[str, Any]:
    import pyarrow as pa

    names = contents.class_names
    if not contents.multi_label:
        return {
            "label": pa.array(labels, pa.int64()),
            "class_name": pa.array([names[label] for label in labels], pa.string()),
        }
    lists = [np.flatnonzero(row).tolist() for row in labels]
    return {
        "label": pa.array(lists, pa.list_(pa.int64())),
        "class_name": pa.array([[names[k] for k in row] for row in lists], pa.list_(pa.string())),
    }


WRITERS: dict[str, Callable[[Path, Parts, Contents], None]] = {
    ".npz": write_npz,
    ".parquet": write_parquet,
}
