"""Index of tar shards, by which single images are read without unpacking.

The index is built once from the headers of the archives and stored next to them. Names in archives
identify their members, and are never used as paths.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mixer_jax.data.decode import BadImageError
from mixer_jax.data.image_files import MAX_BYTES, display_path, has_image_suffix
from mixer_jax.data.splits import hash_paths
from mixer_jax.errors import MissingFileError, RunError, UserError
from mixer_jax.files import atomic_write, file_lock

# Changes with the content of the file or with the rules by which members become samples.
_VERSION = 1
_FILE_NAME = "mixer_jax_index"
_CACHE = Path("~/.cache/mixer_jax/tar_indexes")
_BLOCK = 512
# Members of other files lie between the headers: a larger buffer would read much of the images.
_BUFFER_SIZE = 8192
# Larger files of labels are not read.
_MAX_LABEL_BYTES = 2**20
# Extensions and fields that a message can list.
_MAX_LISTED = 20
_PREFERRED_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_LABEL_FIELDS = ("label", "cls")
# Key and extension, as in the webdataset library: the extension starts at the first dot.
_MEMBER = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<extension>[^/]*)", re.DOTALL)
# Metadata of the webdataset library.
_METADATA = re.compile(r"__[^/]*__($|/)")
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_COMPRESSED = re.compile(rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|\x04\x22\x4d\x18")
_LFS_POINTER = b"version https://git-lfs"
# Header of a regular file, or of its PAX attributes: name, size, checksum, type, and magic number.
# The standard library reads the others, such as those of long names.
_PLAIN_HEADER = re.compile(
    rb"(?P<name>[^\0]{1,100})\0*(?<=^.{100}).{24}(?P<size>[0-7]{11})[\0 ].{12}"
    rb"(?P<checksum>[0-7]{6})[\0 ]{2}(?P<type>[0x]).{100}ustar[\0 ].{82}\0",
    re.DOTALL,
)
# PAX attributes that change name, size or content; others, such as times, have no effect here.
_PAX_CHANGES = re.compile(rb"path=|size=|charset=|GNU\.")
# Fields of an index that are stored for each shard.
_SHARD_VALUES = (
    "size",
    "mtime_ns",
    "num_without_image",
    "num_not_regular",
    "extensions",
    "fields",
)


class Samples(NamedTuple):
    """Samples that have an image.

    Attributes:
        offsets: Position of each image in its shard, in bytes; int64 (num_samples,).
        sizes: Size of each image, in bytes; int64 (num_samples,).
        header_crcs: CRC-32 of the header before each image; uint32 (num_samples,).
        hashes: Hash of the name of each image; uint64 (num_samples,).
        label_ids: Index of each label among the distinct ones, or -1 for a label that is missing or
            not a class; int32 (num_samples,).
        name_lengths: Length of the name of each image, in bytes; int32 (num_samples,).
        names: Bytes of all names, one after the other; uint8 (sum of lengths,).
    """

    offsets: np.ndarray
    sizes: np.ndarray
    header_crcs: np.ndarray
    hashes: np.ndarray
    label_ids: np.ndarray
    name_lengths: np.ndarray
    names: np.ndarray

    def take(self, indices: np.ndarray) -> "Samples":
        """Selects samples by their indices, (n,)."""
        *arrays, names = self
        ends = np.cumsum(self.name_lengths, dtype=np.int64)[indices]
        starts = ends - self.name_lengths[indices]
        text = names.tobytes()
        parts = [text[i:j] for i, j in zip(starts.tolist(), ends.tolist(), strict=True)]
        selected = [array[indices] for array in arrays]
        return Samples._make([*selected, np.frombuffer(b"".join(parts), np.uint8)])


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Index of one shard.

    Attributes:
        samples: Samples in the order of the archive.
        labels: Distinct labels in JSON: numbers, names, or lists of either.
        size: Size of the shard, in bytes.
        mtime_ns: Time of its last change, in nanoseconds.
        num_without_image: Number of samples without an image, which are skipped.
        num_not_regular: Number of links, devices and sparse files, which are skipped.
        extensions: Number of files by extension, of the most frequent ones.
        fields: Fields of the first JSON file.
    """

    samples: Samples
    labels: tuple[str, ...]
    size: int
    mtime_ns: int
    num_without_image: int
    num_not_regular: int
    extensions: dict[str, int]
    fields: tuple[str, ...]


class _Member(NamedTuple):
    """Regular file in an archive.

    Attributes:
        name: Name in the archive.
        offset: Position of the content, in bytes.
        size: Size of the content, in bytes.
        header: Header before the content, (512,).
    """

    name: str
    offset: int
    size: int
    header: bytes


def index_shards(
    folder: Path, shards: Mapping[str, Path], field: str = ""
) -> tuple[dict[str, ShardIndex], list[str]]:
    """Indexes shards; those that are in the stored index and have not changed are not read.

    The index is stored in `folder`, or in the user's cache if it cannot be written.

    Args:
        folder: Folder of the shards or of their folders.
        shards: Path of each shard by its name, which is relative to `folder`.
        field: Field of the JSON files that contains the label; empty: the .cls file, or the field
            "label" or "cls".

    Returns:
        Index of each shard by name, and lines for the user.

    Raises:
        UserError: A shard cannot be read, is compressed, damaged or truncated, or has two files of
            the same name.
    """
    suffix = field if re.fullmatch(r"[\w.-]{0,64}", field) else _digest(field)
    name = f"{_FILE_NAME}{suffix and '@'}{suffix}.npz"
    files = [folder / name, _CACHE.expanduser() / _digest(str(folder)) / name]
    indexes: dict[str, ShardIndex] = {}
    for file in files:
        _add_current(shards, _load(file), indexes)
        if len(indexes) == len(shards):
            return {name: indexes[name] for name in shards}, []
    for file in files:
        lock = file.with_name(f".{file.name}.lock")
        with contextlib.suppress(OSError), file_lock(lock, wait=True):
            # Another process may have built the index in the meantime.
            stored = _load(file)
            _add_current(shards, stored, indexes)
            try:
                _scan_shards(shards, field, indexes)
            finally:
                # Also if another shard is damaged: the user replaces it and runs the command again.
                if indexes:
                    _save(file, _select_existing(stored | indexes, folder))
            return {name: indexes[name] for name in shards}, []
    _scan_shards(shards, field, indexes)
    places = " nor ".join(display_path(file.parent) for file in files)
    return indexes, [f"the index is built at every start, since neither {places} can be written"]


def read_member(path: Path, offset: int, size: int, header_crc: int, name: str) -> bytes:
    """Reads one image of a shard.

    The header before it is read as well, to notice that the shard was replaced.

    Args:
        path: Path of the shard.
        offset: Position of the image, in bytes.
        size: Size of the image, in bytes.
        header_crc: CRC-32 of the header before the image.
        name: Name of the image, for messages.

    Raises:
        BadImageError: The bytes cannot be read, or are more than those of any image that may be
            decoded.
        MissingFileError: The shard does not exist.
        RunError: The shard has changed.
    """
    if size > MAX_BYTES:
        raise BadImageError("file too large", f"{size:,} bytes", name)
    try:
        # Opened anew for every image, as the files of a folder are: nothing is shared by threads.
        with path.open("rb", buffering=0) as file:
            file.seek(offset - _BLOCK)
            data = _read_exactly(file, _BLOCK + size)
    except FileNotFoundError:
        raise MissingFileError(f"shard {display_path(path)} does not exist.") from None
    except OSError as error:
        raise BadImageError("cannot be read", error.strerror or "", name) from None
    if len(data) < _BLOCK + size or zlib.crc32(data[:_BLOCK]) != header_crc:
        raise RunError(
            f"shard {display_path(path)} has changed since it was indexed. Restart the run, or "
            f"delete the index, {_FILE_NAME}*.npz, if that does not help."
        )
    return data[_BLOCK:]


def _read_exactly(file: Any, size: int) -> bytes:
    """Reads a number of bytes, or all until the end; the system may return them in parts."""
    data = file.read(size)
    while 0 < len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


def _digest(text: str) -> str:
    return hashlib.blake2b(os.fsencode(text), digest_size=8).hexdigest()


def _add_current(
    shards: Mapping[str, Path], stored: Mapping[str, ShardIndex], indexes: dict[str, ShardIndex]
) -> None:
    """Adds stored indexes of shards whose size and time have not changed to `indexes`."""
    for name in shards.keys() & stored.keys() - indexes.keys():
        try:
            status = shards[name].stat()
        except OSError as error:
            raise _cannot_read(shards[name], error) from error
        if (stored[name].size, stored[name].mtime_ns) == (status.st_size, status.st_mtime_ns):
            indexes[name] = stored[name]


def _select_existing(indexes: dict[str, ShardIndex], folder: Path) -> dict[str, ShardIndex]:
    """Returns the shards that exist, among them those that another pattern selects."""
    return {name: index for name, index in indexes.items() if (folder / name).exists()}


def _cannot_read(path: Path, error: OSError) -> UserError:
    return UserError(f"shard {display_path(path)} cannot be read: {error.strerror}.")


def _scan_shards(shards: Mapping[str, Path], field: str, indexes: dict[str, ShardIndex]) -> None:
    """Indexes the shards that are not in `indexes`, and adds them.

    Raises:
        UserError: Some shard cannot be used; the others are added nevertheless.
    """
    shards = {name: path for name, path in shards.items() if name not in indexes}
    if not shards:
        return
    folder = os.path.commonpath([path.parent for path in shards.values()])
    count = f"{len(shards):,} {'shard' if len(shards) == 1 else 'shards'}"
    print(f"indexing {count} in {display_path(folder)}", file=sys.stderr, flush=True)
    errors = []
    # Threads, because network file systems take milliseconds to read a header.
    with ThreadPoolExecutor() as pool:
        futures = {name: pool.submit(_scan_shard, path, field) for name, path in shards.items()}
        try:
            for name, future in futures.items():
                try:
                    indexes[name] = future.result()
                except UserError as error:
                    errors.append(error)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if errors:
        others = f" {len(errors) - 1:,} other shards cannot be used either." if errors[1:] else ""
        raise UserError(f"{errors[0]}{others}")


def _scan_shard(path: Path, field: str) -> ShardIndex:
    """Indexes one shard.

    Raises:
        UserError: The shard cannot be used.
    """
    try:
        with path.open("rb", buffering=_BUFFER_SIZE) as file:
            before = os.fstat(file.fileno())
            scan = _Scan(path, field)
            for member in _iter_members(file, path, scan):
                scan.add(file, member)
            after = path.stat()
    except OSError as error:
        raise _cannot_read(path, error) from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(
            f"shard {display_path(path)} must not change while it is indexed. Start the command "
            "again when the shard is complete."
        )
    return scan.finish(after)


class _Scan:
    """Samples of one shard, collected member by member.

    Members of a sample need not follow each other: archives that are not sorted, for example with
    all images first, have the same samples.
    """

    def __init__(self, path: Path, field: str):
        self._path, self._field = path, field
        self.num_not_regular = 0
        self._images: dict[str, tuple[str, int, int, int]] = {}
        self._keys = set[str]()
        # Index of the label by key; the .cls file takes precedence over the .json file.
        self._from_cls: dict[str, int] = {}
        self._from_json: dict[str, int] = {}
        self._labels: dict[str, int] = {}
        self._extensions = collections.Counter[str]()
        self._fields: tuple[str, ...] = ()

    def add(self, file: BinaryIO, member: _Member) -> None:
        """Adds a file of a sample.

        Raises:
            UserError: The sample has another file of the same name.
        """
        name = member.name.removeprefix("./")
        match = _MEMBER.fullmatch(name)
        if match is None or _METADATA.match(name):
            return
        key, extension = match["key"], match["extension"].lower()
        self._keys.add(key)
        self._extensions[extension] += 1
        if extension == "cls" and not self._field:
            self._check_new(key not in self._from_cls, member)
            text = _read_label_file(file, member).decode("utf-8", "replace")
            self._from_cls[key] = self._label_id(text)
        elif extension == "json" and key not in self._from_cls:
            self._check_new(key not in self._from_json, member)
            self._from_json[key] = self._label_id(self._read_field(file, member))
        elif _is_image(extension):
            crc = zlib.crc32(member.header)
            image = (name, member.offset, member.size, crc)
            previous = self._images.get(key)
            if previous is None:
                self._images[key] = image
            else:
                # Of several images, the one that timm takes.
                self._check_new(previous[0].lower() != name.lower(), member)
                self._images[key] = min(previous, image, key=lambda image: _rank(image[0]))

    def finish(self, status: os.stat_result) -> ShardIndex:
        """Returns the index of the shard."""
        names = [os.fsencode(name) for name, *_ in self._images.values()]
        numbers = np.array([numbers for _, *numbers in self._images.values()], np.int64)
        offsets, sizes, header_crcs = numbers.reshape(-1, 3).T
        label_ids = [self._from_cls.get(key, self._from_json.get(key, -1)) for key in self._images]
        samples = Samples(
            offsets=offsets,
            sizes=sizes,
            header_crcs=header_crcs.astype(np.uint32),
            hashes=hash_paths(name for name, *_ in self._images.values()),
            label_ids=np.array(label_ids, np.int32),
            name_lengths=np.array([len(name) for name in names], np.int32),
            names=np.frombuffer(b"".join(names), np.uint8),
        )
        return ShardIndex(
            samples=samples,
            labels=tuple(self._labels),
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            num_without_image=len(self._keys) - len(self._images),
            num_not_regular=self.num_not_regular,
            extensions=dict(self._extensions.most_common(_MAX_LISTED)),
            fields=self._fields,
        )

    def _check_new(self, is_new: bool, member: _Member) -> None:
        if not is_new:
            raise UserError(
                f"shard {display_path(self._path)} must have one file of each name, got two of "
                f"{format_member(member.name)!r}. Write the shard again."
            )

    def _label_id(self, value: Any) -> int:
        label = canonical_label(value)
        return -1 if label is None else self._labels.setdefault(label, len(self._labels))

    def _read_field(self, file: BinaryIO, member: _Member) -> Any:
        try:
            fields = json.loads(_read_label_file(file, member))
        except (ValueError, RecursionError):
            return None
        if not isinstance(fields, dict):
            return None
        self._fields = self._fields or tuple(map(_replace_invalid, list(fields)[:_MAX_LISTED]))
        names = (self._field,) if self._field else _LABEL_FIELDS
        return next((fields[name] for name in names if name in fields), None)


def _read_label_file(file: BinaryIO, member: _Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size) if member.size <= _MAX_LABEL_BYTES else b""


@functools.lru_cache
def _is_image(extension: str) -> bool:
    """Returns whether files of an extension are images; "seg.png" is another file of the sample."""
    return "." not in extension and has_image_suffix(f"x.{extension}")


def _rank(name: str) -> int:
    extension = name.lower().rpartition(".")[-1]
    preferred = _PREFERRED_EXTENSIONS
    return preferred.index(extension) if extension in preferred else len(preferred)


def canonical_label(value: Any) -> str | None:
    """Converts a label to JSON; None if it is neither a class nor a list of classes.

    Integers may be written as text or, as some libraries do for columns with gaps, with a decimal
    point.
    """
    if isinstance(value, list):
        labels = [canonical_label(item) for item in value if not isinstance(item, list)]
        if len(labels) < len(value) or None in labels:
            return None
        return f"[{', '.join(label for label in labels if label)}]"
    if isinstance(value, float) and value.is_integer() and math.fabs(value) < 1e15:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    text = " ".join(unicodedata.normalize("NFC", _replace_invalid(str(value))).split())
    if _INTEGER.fullmatch(text):
        return str(int(text))
    return json.dumps(text) if text and isinstance(value, str) else None


def _replace_invalid(text: str) -> str:
    """Replaces halves of surrogate pairs, which JSON may contain, by escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def format_member(name: str) -> str:
    """Formats a name in an archive as printable text."""
    text = display_path(name)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _iter_members(file: BinaryIO, path: Path, scan: _Scan) -> Iterator[_Member]:
    """Yields the regular files of an archive, and counts other members.

    Raises:
        UserError: The file is not a tar archive, is compressed, damaged or truncated, or has
            further members after its end.
    """
    end = os.fstat(file.fileno()).st_size
    offset = 0
    while True:
        file.seek(offset)
        header = file.read(_BLOCK)
        if not header.strip(b"\0"):
            break
        start = offset
        plain = _parse_plain_header(header)
        if plain is not None and plain.is_pax:
            # Python writes attributes for every file whose time has a fraction.
            attributes = file.read(plain.size)
            file.seek(start + _BLOCK + _round_up(plain.size))
            following = file.read(_BLOCK)
            plain = _parse_plain_header(following)
            if plain is not None and not _PAX_CHANGES.search(attributes):
                start, header = file.tell() - _BLOCK, following
            else:
                plain = None
        if plain is not None and not plain.is_pax:
            member = _Member(plain.name, start + _BLOCK, plain.size, header)
            offset = member.offset + _round_up(plain.size)
        else:
            info, offset = _read_header(file, path, offset, header, end)
            if not info.isreg() or info.issparse():
                scan.num_not_regular += not info.isdir()
                continue
            file.seek(info.offset_data - _BLOCK)
            member = _Member(info.name, info.offset_data, info.size, file.read(_BLOCK))
        if member.offset + member.size > end:
            raise _truncated(path, end, member.name)
        yield member
    if not offset and not end:
        raise _not_usable(path, "is empty")
    if not header:
        # An archive that was cut off between two members looks like this, too.
        raise UserError(
            f"shard {display_path(path)} must end with the end marker of tar, but ends at byte "
            f"{end:,} without it. Download or write it again; or, if it is complete, run: head -c "
            f"{2 * _BLOCK} /dev/zero >> {shlex.quote(display_path(path))}"
        )
    if len(header) < _BLOCK:
        raise _truncated(path, end, "")
    while chunk := file.read(2**20):
        if chunk.strip(b"\0"):
            raise UserError(
                f"shard {display_path(path)} must be one archive, got further data after its end "
                f"at byte {offset:,}. Archives are joined by tar --concatenate."
            )


class _PlainHeader(NamedTuple):
    """Header of a regular file, or of PAX attributes of the file that follows."""

    name: str
    size: int
    is_pax: bool


def _parse_plain_header(header: bytes) -> _PlainHeader | None:
    """Parses the usual headers; returns None for all others.

    The standard library takes four times as long.
    """
    match = _PLAIN_HEADER.match(header)
    # The sum is computed as if the checksum itself were spaces.
    if match is None or int(match["checksum"], 8) != sum(header) - sum(header[148:156]) + 8 * 32:
        return None
    return _PlainHeader(os.fsdecode(match["name"]), int(match["size"], 8), match["type"] == b"x")


def _read_header(
    file: BinaryIO, path: Path, offset: int, header: bytes, end: int
) -> tuple[tarfile.TarInfo, int]:
    """Reads the header of any member with its extensions, and finds the next header."""
    file.seek(offset)
    try:
        # It stops at damaged headers as at the end.
        archive = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        info = archive.next()
    except (tarfile.TarError, ValueError, OverflowError, RecursionError):
        info = None
    if info is not None and info.size >= 0 and archive.offset > offset:
        return info, archive.offset
    if file.tell() >= end:
        raise _truncated(path, end, "")
    if offset:
        raise _not_usable(path, f"is damaged at byte {offset:,}")
    if _COMPRESSED.match(header):
        raise UserError(
            f"shard {display_path(path)} must not be compressed, since single images of compressed "
            "archives cannot be read. Unpack it, for example by gunzip."
        )
    if header.startswith(_LFS_POINTER):
        raise UserError(
            f"shard {display_path(path)} must be a tar archive, got a Git LFS pointer. Run "
            "`git lfs pull`."
        )
    raise _not_usable(path, "is not a tar archive")


def _round_up(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _truncated(path: Path, end: int, name: str) -> UserError:
    place = f" inside of {format_member(name)!r}" if name else " inside of a header"
    return _not_usable(path, f"ends at byte {end:,}{place}")


def _not_usable(path: Path, problem: str) -> UserError:
    return UserError(
        f"shard {display_path(path)} must be a complete tar archive, but {problem}. Download or "
        "write it again, or name the other shards by a pattern."
    )


def join_shards(indexes: Iterable[ShardIndex]) -> tuple[Samples, list[str], np.ndarray]:
    """Joins the samples of several shards.

    Returns:
        Samples in the order of the shards, their distinct labels in JSON, and the position of each
        sample's shard, int32 (num_samples,).
    """
    indexes = list(indexes)
    labels: dict[str, int] = {}
    ids_of: dict[int, np.ndarray] = {}
    parts = []
    for index in indexes:
        # All shards of one file have the same labels.
        if id(index.labels) not in ids_of:
            ids = [labels.setdefault(label, len(labels)) for label in index.labels]
            # The last entry is that of -1.
            ids_of[id(index.labels)] = np.array([*ids, -1], np.int32)
        label_ids = ids_of[id(index.labels)][index.samples.label_ids]
        parts.append(index.samples._replace(label_ids=label_ids))
    counts = [len(part.offsets) for part in parts]
    arrays = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    return Samples(*arrays), list(labels), np.repeat(np.arange(len(parts), dtype=np.int32), counts)


def _save(path: Path, indexes: Mapping[str, ShardIndex]) -> None:
    """Writes indexes to a file."""
    samples, labels, _ = join_shards(indexes.values())
    shards = []
    for name, index in indexes.items():
        values = {key: getattr(index, key) for key in _SHARD_VALUES}
        sizes = {"num_samples": len(index.samples.offsets), "num_bytes": len(index.samples.names)}
        shards.append({"name": name} | sizes | values)
    metadata = json.dumps({"version": _VERSION, "labels": labels, "shards": shards}).encode()
    buffer = io.BytesIO()
    np.savez(buffer, metadata=np.frombuffer(metadata, np.uint8), **samples._asdict())
    atomic_write(path, buffer.getvalue())


def _load(path: Path) -> dict[str, ShardIndex]:
    """Reads a file of indexes; empty if there is none, or of another version, or damaged."""
    try:
        # NumPy does not close a damaged file that it opens.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            metadata = json.loads(stored["metadata"].tobytes())
            if metadata["version"] != _VERSION:
                return {}
            *arrays, names = (stored[name] for name in Samples._fields)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return {}
    labels = tuple(metadata["labels"])
    indexes = {}
    start = names_start = 0
    for shard in metadata["shards"]:
        stop, names_stop = start + shard["num_samples"], names_start + shard["num_bytes"]
        parts = [array[start:stop] for array in arrays]
        values = {key: shard[key] for key in _SHARD_VALUES}
        values["fields"] = tuple(values["fields"])
        samples = Samples._make([*parts, names[names_start:names_stop]])
        indexes[shard["name"]] = ShardIndex(samples, labels, **values)
        start, names_start = stop, names_stop
    return indexes
