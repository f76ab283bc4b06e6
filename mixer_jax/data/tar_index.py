"""Index of tar shards, by which single images are read without unpacking.

The index is built once from the headers of the archives and stored next to them. Names in archives
identify their members, and are never used as paths.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import sys
import tarfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mixer_jax.data.decode import BadImageError
from mixer_jax.data.image_files import MAX_BYTES, display_path, has_image_suffix
from mixer_jax.data.splits import hash_paths
from mixer_jax.errors import MissingFileError, RunError, UserError, abbreviate, read_error
from mixer_jax.files import atomic_write, file_lock, parse_json

# Class, or classes, of an image; None if they are missing.
Label = str | tuple[str, ...] | None

# Changes with the content of the file or with the rules by which members become samples.
_VERSION = 3
_FILE_NAME = "mixer_jax_index"
_CACHE = Path("~/.cache/mixer_jax/tar_indexes")
# Position and size of an image in its shard, in bytes; hash of its name; position of the end of its
# name in `Shard.names`; CRC-32 of the header before it; index of its label in `TarIndex.labels`.
_SAMPLE = np.dtype(
    [
        *(("offset", "<i8"), ("size", "<i8"), ("hash", "<u8")),
        *(("name_end", "<i4"), ("header_crc", "<u4"), ("label", "<i4")),
    ]
)
_BLOCK = 512
# Members of other files lie between the headers: the default, which is a megabyte on some network
# file systems, would read much of the images.
_BUFFER_SIZE = 8192
_MAX_LABEL_BYTES = 2**20
# Key and extension, as in the webdataset library: the extension starts at the first dot.
_MEMBER = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<extension>[^/]*)", re.DOTALL)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_LFS_POINTER = b"version https://git-lfs"


@dataclasses.dataclass(frozen=True)
class Shard:
    """Index of one shard.

    Attributes:
        path: Path of the archive.
        size: Size of the archive, in bytes.
        mtime_ns: Time of its last change, in nanoseconds.
        num_skipped: Number of samples with a label but without an image.
        samples: Samples with an image, in the order of the archive; _SAMPLE (num_samples,).
        names: Names of the images in the archive, one after the other.
    """

    path: Path
    size: int
    mtime_ns: int
    num_skipped: int
    samples: np.ndarray
    names: bytes

    def name(self, row: int) -> str:
        """Returns the path of the shard and the name of an image in it."""
        start = self.samples["name_end"][row - 1] if row else 0
        name = os.fsdecode(self.names[start : self.samples["name_end"][row]])
        return display_path(f"{self.path}/{name}")

    def read(self, row: int) -> bytes:
        """Reads an image, and the header before it, by which a replaced shard is noticed.

        The time of the last change would not do: hosts may have copies of their own.

        Raises:
            BadImageError: It cannot be read, or is larger than any image that may be decoded.
            MissingFileError: The shard does not exist.
            RunError: The shard has changed since it was indexed.
        """
        offset, size, header_crc = (
            int(self.samples[field][row]) for field in ("offset", "size", "header_crc")
        )
        if size > MAX_BYTES:
            raise BadImageError("file too large", f"{size:,} bytes", self.name(row))
        try:
            # Opened anew for every image, as the files of a folder are: nothing is shared by
            # threads. A larger buffer would read more than the image.
            with self.path.open("rb", buffering=_BLOCK) as file:
                file.seek(offset - _BLOCK)
                header, image = file.read(_BLOCK), file.read(size)
        except FileNotFoundError:
            raise self._missing_error() from None
        except OSError as error:
            raise BadImageError("cannot be read", error.strerror or "", self.name(row)) from None
        if len(image) < size or zlib.crc32(header) != header_crc:
            raise self._changed_error()
        return image

    def is_current(self) -> bool:
        """Returns whether the archive has the size and time that it had when it was indexed."""
        try:
            status = self.path.stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns)

    def check(self) -> None:
        """Checks that the archive exists on this host, with the size that it was indexed with.

        Raises:
            MissingFileError: It does not exist.
            RunError: It has another size or cannot be read.
        """
        try:
            size = self.path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing_error() from None
        except OSError as error:
            raise RunError(
                f"{display_path(self.path)} cannot be read: {error.strerror}."
            ) from error
        if size != self.size:
            raise self._changed_error()

    def _changed_error(self) -> RunError:
        return RunError(
            f"shard {display_path(self.path)} must not change during a run, and must be the same "
            "on all hosts, but differs from when it was indexed. Restart the run, which indexes it "
            "again."
        )

    def _missing_error(self) -> MissingFileError:
        return MissingFileError(f"shard {display_path(self.path)} does not exist.")


@dataclasses.dataclass(frozen=True)
class TarIndex:
    """Index of many shards.

    Attributes:
        shards: Index of each shard by its path relative to the folder of the index.
        labels: Distinct labels of all shards.
    """

    shards: dict[str, Shard]
    labels: list[Label]


def index_shards(folder: Path, names: Iterable[str], field: str = "") -> tuple[TarIndex, list[str]]:
    """Indexes shards; those that are in the stored index and have not changed are not read.

    The index is stored in `folder`, or in the user's cache if the folder cannot be written. It may
    contain more shards than requested.

    Args:
        folder: Absolute folder of the shards or of their folders.
        names: Path of each shard, relative to `folder`.
        field: Field of the JSON files that contains the label; empty: the .cls file, or the field
            "label" or "cls".

    Returns:
        The index, and lines for the user.

    Raises:
        UserError: A shard cannot be read, is compressed, damaged or truncated, or has two files of
            the same name.
    """
    names = list(names)
    file_name = f"{_FILE_NAME}{field and '@'}{field}.npz"
    digest = hashlib.blake2b(os.fsencode(folder), digest_size=8).hexdigest()
    files = [place / file_name for place in (folder, _CACHE.expanduser() / digest)]
    for file in files:
        index = _load(file, folder)
        if index.shards.keys() >= set(names):
            return index, []
        try:
            with file_lock(file.with_name(f".{file.name}.lock"), wait=True):
                # Another process may have built the index in the meantime.
                index = _load(file, folder)
                try:
                    _add_shards(index, folder, names, field)
                finally:
                    # Also if a shard is damaged, or on Ctrl-C: the others need not be read again.
                    _save(file, index)
                return index, []
        except OSError:
            continue
    index = TarIndex({}, [])
    _add_shards(index, folder, names, field)
    places = " nor ".join(display_path(file.parent) for file in files)
    return index, [f"the index is built at every start, since neither {places} can be written"]


def _load(file: Path, folder: Path) -> TarIndex:
    """Reads the shards of an index that have not changed."""
    index = TarIndex({}, [])
    try:
        # NumPy does not close a damaged file that it opens.
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            metadata = json.loads(stored["metadata"].tobytes())
            if metadata["version"] != _VERSION:
                return index
            samples, names = stored["samples"], stored["names"].tobytes()
        index.labels.extend(map(parse_label, metadata["labels"]))
        start = names_start = 0
        for name, size, mtime_ns, num_skipped, stop, names_stop in metadata["shards"]:
            parts = samples[start:stop], names[names_start:names_stop]
            start, names_start = stop, names_stop
            shard = Shard(folder / name, size, mtime_ns, num_skipped, *parts)
            _check_samples(shard, len(index.labels))
            if shard.is_current():
                index.shards[name] = shard
    # There is no index, or it is damaged in any way.
    except Exception:
        return TarIndex({}, [])
    return index


def _check_samples(shard: Shard, num_labels: int) -> None:
    """Raises ValueError if an index that was read is not one that `_save` writes."""
    samples, ends = shard.samples, shard.samples["name_end"]
    is_valid = (
        samples.dtype == _SAMPLE
        and isinstance(shard.num_skipped, int)
        and shard.num_skipped >= 0
        and samples["offset"].min(initial=_BLOCK) >= _BLOCK
        and samples["size"].min(initial=0) >= 0
        and np.diff(ends, prepend=0).min(initial=0) >= 0
        and ends.max(initial=0) == len(shard.names)
        and samples["label"].min(initial=0) >= 0
        and samples["label"].max(initial=-1) < num_labels
    )
    if not is_valid:
        raise ValueError(f"the index of {display_path(shard.path)} is damaged")


def _save(file: Path, index: TarIndex) -> None:
    """Writes an index."""
    if not index.shards:
        return
    shards = index.shards.values()
    stops = itertools.accumulate(len(shard.samples) for shard in shards)
    names_stops = itertools.accumulate(len(shard.names) for shard in shards)
    rows = [
        (name, shard.size, shard.mtime_ns, shard.num_skipped, stop, names_stop)
        for (name, shard), stop, names_stop in zip(
            index.shards.items(), stops, names_stops, strict=True
        )
    ]
    metadata = json.dumps({"version": _VERSION, "labels": index.labels, "shards": rows})
    buffer = io.BytesIO()
    np.savez(
        buffer,
        metadata=np.frombuffer(metadata.encode(), np.uint8),
        samples=np.concatenate([shard.samples for shard in shards]),
        names=np.frombuffer(b"".join(shard.names for shard in shards), np.uint8),
    )
    atomic_write(file, buffer.getvalue())


def _add_shards(index: TarIndex, folder: Path, names: list[str], field: str) -> None:
    """Scans the shards that are not in the index, and adds them.

    Raises:
        UserError, RunError: Some shards cannot be used; the others are added nevertheless.
    """
    names = [name for name in names if name not in index.shards]
    if not names:
        return
    count = f"{len(names):,} {'shard' if len(names) == 1 else 'shards'}"
    print(f"indexing {count} in {display_path(folder)}", file=sys.stderr, flush=True)
    label_ids = {label: number for number, label in enumerate(index.labels)}
    errors = {}
    # Threads, because network file systems take milliseconds to read a header.
    with ThreadPoolExecutor() as pool:
        scans = pool.map(lambda name: _try_scan(folder / name, field), names)
        for name, scan in zip(names, scans, strict=True):
            if isinstance(scan, UserError | RunError):
                errors[name] = scan
                continue
            shard, labels = scan
            for label in dict.fromkeys(labels):
                if label not in label_ids:
                    label_ids[label] = len(index.labels)
                    index.labels.append(label)
            shard.samples["label"] = [label_ids[label] for label in labels]
            index.shards[name] = shard
    if errors:
        first, *others = errors
        rest = abbreviate(map(display_path, others))
        error = errors[first]
        raise type(error)(f"{error}{rest and f' Not usable either: {rest}.'}")


def _try_scan(path: Path, field: str) -> tuple[Shard, list[Label]] | UserError | RunError:
    """Scans a shard, or returns the error."""
    try:
        return _scan_shard(path, field)
    except OSError as error:
        return read_error(f"shard {display_path(path)} cannot be read", error)
    except UserError as error:
        return error


def _scan_shard(path: Path, field: str) -> tuple[Shard, list[Label]]:
    """Finds the samples of a shard.

    Members of a sample need not follow each other: archives that are not sorted, for example with
    all images first, have the same samples.

    Returns:
        Index of the shard, without indices of labels; and the label of each sample.
    """
    names = set[str]()
    # Name, offset, size and CRC-32 of the header of the image, and label, by key.
    images: dict[str, tuple[str, int, int, int]] = {}
    labels: dict[str, Label] = {}
    with path.open("rb", buffering=_BUFFER_SIZE) as file:
        status = os.fstat(file.fileno())
        for info in _iter_members(file, path):
            name = info.name.removeprefix("./")
            match = _MEMBER.fullmatch(name)
            if match is None:
                continue
            if name in names:
                raise UserError(
                    f"shard {display_path(path)} must have one file of each name, got two of "
                    f"{display_path(name)!r}. Write the shard again."
                )
            names.add(name)
            key, extension = match["key"], match["extension"].lower()
            if extension == "cls" and not field:
                labels[key] = parse_label(_read_start(file, info).decode("utf-8", "replace"))
            elif extension == "json" and key not in labels:
                fields = _read_fields(file, info)
                value = fields.get(field) if field else fields.get("label", fields.get("cls"))
                labels[key] = parse_label(value)
            elif "." not in extension and has_image_suffix(name):
                file.seek(info.offset_data - _BLOCK)
                image = (name, info.offset_data, info.size, zlib.crc32(file.read(_BLOCK)))
                # If a sample has several images, the first one by name: jpg before png.
                images[key] = min(image, images.get(key, image))
    encoded = [os.fsencode(name) for name, *_ in images.values()]
    samples = np.zeros(len(images), _SAMPLE)
    for position, column in enumerate(("offset", "size", "header_crc"), 1):
        samples[column] = [image[position] for image in images.values()]
    samples["hash"] = hash_paths(name for name, *_ in images.values())
    samples["name_end"] = list(itertools.accumulate(map(len, encoded)))
    num_skipped = len(labels.keys() - images.keys())
    shard = Shard(path, status.st_size, status.st_mtime_ns, num_skipped, samples, b"".join(encoded))
    return shard, [labels.get(key) for key in images]


def _iter_members(file: BinaryIO, path: Path) -> Iterator[tarfile.TarInfo]:
    """Yields the regular files of an archive.

    Raises:
        UserError: It is not a tar archive, is compressed, damaged or truncated.
    """
    size = os.fstat(file.fileno()).st_size
    offset = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
            # Headers with a negative size would be read forever.
            while (info := archive.next()) and info.size >= 0:
                # The archive would keep all members in memory.
                archive.members.clear()  # type: ignore[attr-defined]
                if info.isreg() and not info.issparse():
                    yield info
                offset = min(archive.offset, size)
    # Headers can claim sizes that do not fit in memory.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError):
        pass
    # The archive ends at a block of zeros. The standard library ends at the end of the file and at
    # damaged headers, too.
    file.seek(offset)
    block = file.read(_BLOCK)
    if block == bytes(_BLOCK):
        return
    problem = f"is damaged or incomplete at byte {offset:,} of {size:,}"
    fix = "Download or write it again, or name the other shards by a pattern."
    if block.startswith(_COMPRESSED) and not offset:
        problem, fix = "is compressed", "Unpack it, for example by gunzip."
    elif block.startswith(_LFS_POINTER) and not offset:
        problem, fix = "is a Git LFS pointer", "Run `git lfs pull`."
    raise UserError(
        f"shard {display_path(path)} must be a complete tar archive, but {problem}. {fix}"
    )


def _read_start(file: BinaryIO, info: tarfile.TarInfo) -> bytes:
    """Reads a file of an archive, except for what no label has."""
    file.seek(info.offset_data)
    return file.read(min(info.size, _MAX_LABEL_BYTES))


def _read_fields(file: BinaryIO, info: tarfile.TarInfo) -> dict[str, Any]:
    """Reads the JSON file of a sample; empty if it is not an object."""
    try:
        fields = parse_json(_read_start(file, info))
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def parse_label(value: Any) -> Label:
    """Converts a label to the name of its class, or names of its classes.

    Args:
        value: Text, integer, or list of either. Some libraries write integers with a decimal point
            if others of the column are missing.

    Returns:
        None if the value is not a label, or is a list that repeats a class, such as a vector of
        zeros and ones.
    """
    if isinstance(value, list):
        names = [parse_label(item) for item in value]
        classes = tuple(name for name in names if isinstance(name, str))
        return classes if len(set(classes)) == len(value) else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    text = unicodedata.normalize("NFC", " ".join(str(value).split()))
    return text if text.isprintable() and text else None


def describe_files(path: Path) -> str:
    """Lists some files of a shard, and the fields of the first JSON file, for messages."""
    with path.open("rb", buffering=_BUFFER_SIZE) as file:
        members = list(itertools.islice(_iter_members(file, path), 10))
        text = abbreviate(repr(display_path(info.name)) for info in members)
        for info in members:
            if info.name.endswith(".json"):
                fields = abbreviate(_read_fields(file, info), 20)
                return f"{text}; {display_path(info.name)!r} has the fields {fields or 'none'}"
    return text or "none"
