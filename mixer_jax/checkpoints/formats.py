"""Files of named tensors: npz archives, safetensors files and PyTorch checkpoints.

Names, shapes and metadata are known, and sizes are checked, before any data is read.
"""

import abc
import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from isal import isal_zlib

from mixer_jax.checkpoints.model_info import parse_metadata_json, read_metadata_json
from mixer_jax.checkpoints.resolve import METADATA_SUFFIX
from mixer_jax.errors import UserError, summarize_error
from mixer_jax.files import atomic_target, atomic_write

# Archives that unpack to more than this many times their size are rejected. Random float32 numbers
# hardly compress.
_MAX_COMPRESSION = 10
_SLACK = 2**20
_MAX_HEADER = 10_000  # Usual headers have 128 bytes.
# Fixed part of the header before each member of a zip file; its last two numbers are the sizes of
# the name and of the extra fields that follow.
_LOCAL_HEADER_SIZE = 30
_CHUNK_SIZE = 2**20  # Fits in a core's cache, where its checksum is computed.
_BAND = 16  # Rows.
# NumPy has no bfloat16 and stores it as pairs of bytes.
_RAW_BFLOAT16 = np.dtype("V2")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Key of the header's metadata that holds the description of the model, as JSON.
_METADATA_KEY = "mixer_jax"
# Key of the header's metadata that holds the CRC-32 of the description and of each tensor, as JSON.
_CHECKSUMS_KEY = "mixer_jax_crc32"
# Entry of the JSON file next to an npz archive that holds the CRC-32 of the other entries.
_JSON_CHECKSUM = "crc32"
_FLOATS = {"F16", "BF16", "F32", "F64"}
# Dictionaries nested in a PyTorch checkpoint are read to this depth; optimizers nest four.
_MAX_DEPTH = 8
# First line of the file that Git LFS keeps in place of a large file until `git lfs pull`.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# timm's training checkpoints contain their parsed arguments; timm itself allows this class, too.
# Unpickling it runs no code: PyTorch creates an empty object and sets attributes, whose values can
# only be what it loads anyway. Metrics next to the weights are often numbers of NumPy, whose module
# had another name in NumPy 1; they are built from a dtype and bytes.
_SCALAR = np.float64(0).__reduce__()[0]
_SAFE_CLASSES: tuple[Any, ...] = (
    argparse.Namespace,
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
)
# torch.load(weights_only=True) of earlier releases can be made to run code.
_MIN_TORCH = (2, 6)
# Name of a class in PyTorch's message that it is not allowed.
_FORBIDDEN_CLASS = re.compile(r"GLOBAL (\w[\w.]*)")


class TensorFile(abc.ABC):
    """File of named tensors; a context manager that closes it.

    Attributes:
        path: Path for messages.
        shapes: Shape of each floating-point tensor by name.
        unreadable: Reason why each other entry, such as a counter, cannot be read.
        metadata: Description of the model, stored with the tensors; empty if there is none.
    """

    shapes: dict[str, tuple[int, ...]]
    unreadable: dict[str, str]
    metadata: dict[str, Any]

    def __init__(self, path: str):
        """Checks that the file is not a pointer to another one.

        Raises:
            UserError: The file is a Git LFS pointer.
        """
        self.path = path
        self.unreadable = {}
        self._open_files = contextlib.ExitStack()
        _check_not_lfs_pointer(path)

    @abc.abstractmethod
    def read(self, name: str, out: np.ndarray) -> None:
        """Reads one tensor. Can be called from several threads.

        Args:
            name: Key of `shapes`.
            out: Float32 array to fill, of the tensor's shape up to axes of length 1. Its axes may
                be in any order in memory.

        Raises:
            UserError: The tensor is damaged.
        """

    def check_names(self, names: Iterable[str]) -> None:
        """Raises UserError if one of these entries cannot be read."""
        for name in names:
            if name in self.unreadable:
                raise self.error(name, self.unreadable[name])

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self._open_files.close()

    def error(self, name: str, problem: str) -> UserError:
        """Creates an error that names the file and one of its tensors."""
        return UserError(f"{self.path}: tensor {name!r} {problem}")


def _check_not_lfs_pointer(path: str) -> None:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(
                f"{path} is a Git LFS pointer instead of the weights. Run git lfs pull in its "
                "repository to download them."
            )


def copy_into(source: np.ndarray, out: np.ndarray) -> None:
    """Copies an array into `out`, of the same shape up to axes of length 1, transposed or not."""
    source = source.reshape(out.shape)
    if out.ndim != 2 or source.flags.c_contiguous == out.flags.c_contiguous:
        out[...] = source
        return
    # One of them is transposed: copying bands of rows fills whole cache lines.
    for start in range(0, len(out), _BAND):
        out[start : start + _BAND] = source[start : start + _BAND]


def to_c_order(tensor: np.ndarray) -> np.ndarray:
    """Returns a tensor in C order; the tensor itself if it is already."""
    if tensor.flags.c_contiguous:
        return tensor
    out = np.empty(tensor.shape, tensor.dtype)
    copy_into(tensor, out)
    return out


class _Member(NamedTuple):
    """Tensor of an archive: its entry in the directory, and its header."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    is_fortran_order: bool
    dtype: np.dtype
    header: bytes
    position: int  # Of the numbers in the file, if they are stored and not deflated.


class NpzFile(TensorFile):
    """NumPy's npz archive, as Google publishes weights, and the JSON file next to it if any.

    `numpy.load` would allocate any size that a header claims. Here sizes are checked first: those
    in headers against the archive's directory, and those in the directory against the file.
    """

    def __init__(self, path: str):
        """Reads and checks the headers of all tensors.

        Raises:
            UserError: The file is not an archive of arrays, or is damaged.
        """
        super().__init__(path)
        self._lock = threading.Lock()
        with contextlib.ExitStack() as stack:
            try:
                self._file = stack.enter_context(open(path, "rb"))
                self._archive = stack.enter_context(zipfile.ZipFile(self._file))
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
                raise UserError(
                    f"{path} is not an npz archive or is truncated: {error}."
                ) from error
            self._check_size(os.fstat(self._file.fileno()).st_size)
            self._members: dict[str, _Member] = {}
            for info in self._archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name in self._members or name in self.unreadable:
                    raise self.error(name, "occurs twice: the file is damaged.")
                if member := self._read_header(name, info):
                    self._members[name] = member
            self.shapes = {name: member.shape for name, member in self._members.items()}
            self.metadata = read_metadata_json(Path(path + METADATA_SUFFIX))
            checksum = self.metadata.pop(_JSON_CHECKSUM, None)
            if checksum not in (None, _json_checksum(self.metadata)):
                raise UserError(
                    f"{path}{METADATA_SUFFIX} differs from its checksum: it is damaged or was "
                    f"edited. Restore it, or delete its entry {_JSON_CHECKSUM!r} if you edited it."
                )
            self._open_files = stack.pop_all()

    def read(self, name: str, out: np.ndarray) -> None:
        """Reads one tensor and verifies its checksum; see `TensorFile`.

        `numpy.lib.format.read_array` would parse the header again, which is not thread-safe.
        """
        member = self._members[name]
        # Usual tensors are read straight into `out`.
        is_direct = (
            member.dtype == np.float32 and out.flags.c_contiguous and not member.is_fortran_order
        )
        array = out.reshape(-1) if is_direct else np.empty(math.prod(member.shape), member.dtype)
        is_stored = member.info.compress_type == zipfile.ZIP_STORED
        read = self._read_stored if is_stored else self._read_deflated
        try:
            read(member, array.view(np.uint8).data)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise self.error(name, f"is damaged: {summarize_error(error)}.") from error
        if not is_direct:
            array = array.view(_BFLOAT16) if member.dtype == _RAW_BFLOAT16 else array
            array = array.reshape(member.shape, order="F" if member.is_fortran_order else "C")
            copy_into(array, out)

    def _read_stored(self, member: _Member, buffer: memoryview) -> None:
        """Fills a buffer straight from the file; `zipfile` would copy everything twice."""
        checksum, start = isal_zlib.crc32(member.header), 0
        # Threads cannot share a file's position.
        with open(self.path, "rb", buffering=0) as file:
            file.seek(member.position)
            while start < len(buffer):
                count = file.readinto(buffer[start : start + _CHUNK_SIZE])
                if not count:
                    raise EOFError("it is truncated")
                checksum = isal_zlib.crc32(buffer[start : start + count], checksum)
                start += count
        if checksum != member.info.CRC:
            raise zipfile.BadZipFile("its checksum differs from that in the archive's directory")

    def _read_deflated(self, member: _Member, buffer: memoryview) -> None:
        # zipfile can read several members in parallel, but must not open or close them in parallel.
        with self._lock:
            unpacked = self._archive.open(member.info)
        try:
            unpacked.read(len(member.header))
            start = 0
            while chunk := unpacked.read(_CHUNK_SIZE):
                buffer[start : start + len(chunk)] = chunk
                start += len(chunk)
        finally:
            with self._lock:
                unpacked.close()
        if start < len(buffer):
            raise EOFError("it is truncated")

    def _check_size(self, file_size: int) -> None:
        """Raises UserError if the directory claims far more than the file can hold."""
        members = self._archive.infolist()
        if sum(info.file_size for info in members) > _MAX_COMPRESSION * file_size + _SLACK:
            largest = max(members, key=lambda info: info.file_size)
            raise self.error(
                largest.filename.removesuffix(".npy"),
                f"claims {largest.file_size:,} bytes in a file of {file_size:,}: it is damaged.",
            )

    def _read_header(self, name: str, info: zipfile.ZipInfo) -> _Member | None:
        """Reads and checks the header of one tensor; returns None if it is not floating-point."""
        if not info.filename.endswith(".npy"):
            raise self.error(info.filename, "must be an .npy file, as all members of npz archives.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self.error(name, "must be stored or deflated, as in all npz archives.")
        try:
            with self._archive.open(info) as member:
                start = io.BytesIO(member.read(_MAX_HEADER))
            version = np.lib.format.read_magic(start)
            read_header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, is_fortran_order, dtype = read_header(start, max_header_size=_MAX_HEADER)
        except Exception as error:  # zipfile and NumPy raise errors of many types.
            raise self.error(name, f"is damaged: {summarize_error(error)}.") from error
        if dtype.hasobject:
            self.unreadable[name] = "contains Python objects, which can run code: not read."
            return None
        if dtype.kind != "f" and dtype not in (_RAW_BFLOAT16, _BFLOAT16):
            self.unreadable[name] = f"must be floating-point, got {dtype}."
            return None
        header_size = start.tell()
        claimed = header_size + math.prod(shape) * dtype.itemsize
        if claimed != info.file_size:
            raise self.error(
                name,
                f"claims {claimed:,} bytes (shape {shape}) but has {info.file_size:,}: it is "
                "damaged.",
            )
        # The local header repeats the directory's entry, but its extra fields may have another
        # length. zipfile has checked that both have the same name.
        self._file.seek(info.header_offset + _LOCAL_HEADER_SIZE - 4)
        variable_size = sum(struct.unpack("<HH", self._file.read(4)))
        position = info.header_offset + _LOCAL_HEADER_SIZE + variable_size + header_size
        header = start.getvalue()[:header_size]
        return _Member(info, shape, is_fortran_order, dtype, header, position)


def write_npz(
    path: str, tensors: Iterable[tuple[str, np.ndarray]], metadata: dict[str, Any]
) -> None:
    """Writes an npz archive, and the description of its model as JSON next to it."""
    with (
        atomic_target(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
        for name, tensor in tensors:
            # A fixed date, so that the same weights give the same file.
            info = zipfile.ZipInfo(f"{name}.npy")
            with archive.open(info, "w", force_zip64=True) as member:
                # NumPy writes to a zip member in chunks, without copying the tensor.
                np.lib.format.write_array(member, to_c_order(tensor))
    metadata = metadata | {_JSON_CHECKSUM: _json_checksum(metadata)}
    atomic_write(Path(path + METADATA_SUFFIX), json.dumps(metadata, indent=2) + "\n")


def _json_checksum(metadata: dict[str, Any]) -> int:
    return isal_zlib.crc32(json.dumps(metadata, sort_keys=True).encode())


class SafetensorsFile(TensorFile):
    """Safetensors file, as timm publishes weights."""

    def __init__(self, path: str):
        """Reads and checks the header.

        Raises:
            UserError: The file is not a safetensors file, or is damaged.
        """
        super().__init__(path)
        try:
            # Memory-mapped pages would stay in memory next to the copies.
            self._file = safetensors.safe_open(path, framework="numpy", backend="pread")
            self._open_files.enter_context(self._file)
            headers = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
            metadata = self._file.metadata() or {}
        except (safetensors.SafetensorError, OSError) as error:
            reason = summarize_error(error)
            raise UserError(
                f"{path} is not a safetensors file, or is damaged: {reason}."
            ) from error
        self.shapes = {}
        for name, header in headers.items():
            if header.get_dtype() in _FLOATS:
                self.shapes[name] = tuple(header.get_shape())
            else:
                self.unreadable[name] = f"must be floating-point, got {header.get_dtype()}."
        header_source = f"{path}: {_METADATA_KEY!r} in its header"
        description = metadata.get(_METADATA_KEY, "{}")
        self._checksums: dict[str, Any] | None = None
        if _CHECKSUMS_KEY in metadata:
            checksums_source = f"{path}: {_CHECKSUMS_KEY!r} in its header"
            self._checksums = parse_metadata_json(metadata[_CHECKSUMS_KEY], checksums_source)
            if self._checksums.get("") != isal_zlib.crc32(description.encode()):
                raise UserError(f"{header_source} differs from its checksum: the file is damaged.")
        self.metadata = parse_metadata_json(description, header_source)

    def read(self, name: str, out: np.ndarray) -> None:
        """Reads one tensor; see `TensorFile`."""
        try:
            tensor = self._file.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise self.error(name, f"cannot be read: {summarize_error(error)}.") from error
        if self._checksums is not None and self._checksums.get(name) != _array_checksum(tensor):
            raise self.error(
                name,
                "differs from its checksum: the file is damaged, or another program has changed it "
                f"but kept {_CHECKSUMS_KEY!r} in the header.",
            )
        copy_into(tensor, out)


def write_safetensors(
    path: str, tensors: Iterable[tuple[str, np.ndarray]], metadata: dict[str, Any]
) -> None:
    """Writes a safetensors file, with the description of its model in the header."""
    arrays = {name: to_c_order(tensor) for name, tensor in tensors}
    description = json.dumps(metadata)
    checksums = {name: _array_checksum(array) for name, array in arrays.items()}
    # No tensor has an empty name.
    checksums[""] = isal_zlib.crc32(description.encode())
    header = {
        "format": "pt",
        _METADATA_KEY: description,
        _CHECKSUMS_KEY: json.dumps(checksums),
    }
    with atomic_target(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary, metadata=header)


def _array_checksum(array: np.ndarray) -> int:
    return isal_zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


class TorchFile(TensorFile):
    """Checkpoint saved by `torch.save`: a pickle, from which only tensors are loaded.

    It has no metadata.

    Names of tensors in nested dictionaries are joined by slashes: "state_dict/stem.proj.weight".
    """

    def __init__(self, path: str):
        """Maps the file into memory.

        Raises:
            UserError: PyTorch is not installed, or the file is damaged or contains anything but
                tensors and Python's own types.
        """
        super().__init__(path)
        self.metadata = {}
        if importlib.util.find_spec("torch") is None:
            raise UserError(
                f"{path} can only be read with PyTorch. Run pip install torch, or save the weights "
                "as safetensors."
            )
        version = metadata.version("torch")
        if tuple(map(int, version.split(".")[:2])) < _MIN_TORCH:
            minimum = ".".join(map(str, _MIN_TORCH))
            raise UserError(
                f"torch must be {minimum} or newer, got {version}, which can run code in {path} "
                "(CVE-2025-32434). Run pip install --upgrade torch, or save the weights as "
                "safetensors."
            )
        import torch

        try:
            # Files from before PyTorch 1.6 are not archives and cannot be mapped.
            is_archive = zipfile.is_zipfile(path)
            # On exit, safe_globals also removes classes that were allowed before.
            allowed = torch.serialization.get_safe_globals()
            with torch.serialization.safe_globals([c for c in _SAFE_CLASSES if c not in allowed]):
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        except Exception as error:  # torch.load raises errors of many types.
            if match := _FORBIDDEN_CLASS.search(str(error)):
                raise UserError(
                    f"{path} contains {match[1]}, which could run code and is not loaded. Save the "
                    "tensors alone: torch.save(model.state_dict(), FILE)."
                ) from error
            reason = summarize_error(error)
            raise UserError(f"{path} is not a file of PyTorch tensors only: {reason}.") from error
        if not isinstance(loaded, dict):
            raise UserError(f"{path} must contain a state dict, got {type(loaded).__name__}.")
        self._tensors: dict[str, Any] = {}
        for name, value in _flatten_dicts(loaded):
            if name in self._tensors or name in self.unreadable:
                raise self.error(name, "occurs twice.")
            if not isinstance(value, torch.Tensor):
                self.unreadable[name] = f"must be a tensor, got {type(value).__name__}."
            elif not value.dtype.is_floating_point:
                self.unreadable[name] = f"must be floating-point, got {value.dtype}."
            elif value.layout != torch.strided or value.device.type != "cpu":
                self.unreadable[name] = (
                    f"must be dense and on the CPU, got {value.layout} on {value.device}."
                )
            else:
                self._tensors[name] = value.detach()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def check_names(self, names: Iterable[str]) -> None:
        """Raises UserError if one of these entries cannot be read, or claims a false size."""
        names = list(names)
        super().check_names(names)
        # A tensor with stride 0 can be larger than its storage.
        tensors = [self._tensors[name] for name in names]
        claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if claimed > (size := os.path.getsize(self.path)):
            raise UserError(
                f"{self.path} claims {claimed:,} bytes but has {size:,}: it is damaged."
            )

    def read(self, name: str, out: np.ndarray) -> None:
        """Reads one tensor; see `TensorFile`."""
        copy_into(self._tensors[name].float().numpy(), out)


def _flatten_dicts(tree: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the values of nested dictionaries with their slash-separated names.

    Each dictionary is visited once, as a file can contain references in cycles.
    """
    visited = set()
    pending: list[tuple[str, int, dict[Any, Any]]] = [("", 0, tree)]
    while pending:
        prefix, depth, node = pending.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and depth < _MAX_DEPTH:
                pending.append((f"{name}/", depth + 1, value))
            else:
                yield name, value


class SelectedTensors(TensorFile):
    """Some tensors of an open file, under other names; `shapes` has no others."""

    def __init__(self, file: TensorFile, names: Mapping[str, str], prefix: str):
        """Checks that the tensors can be read.

        Args:
            file: File that contains the tensors; it stays open.
            names: Name in the file of each tensor.
            prefix: Prefix of names in the file, for messages about missing tensors.

        Raises:
            UserError: A tensor cannot be read.
        """
        super().__init__(file.path)
        file.check_names(names.values())
        self._file, self._names, self._prefix = file, names, prefix
        self.metadata = file.metadata
        self.shapes = {name: file.shapes[original] for name, original in names.items()}

    def read(self, name: str, out: np.ndarray) -> None:
        """Reads one tensor; see `TensorFile`."""
        self._file.read(self._names[name], out)

    def error(self, name: str, problem: str) -> UserError:
        """Creates an error with the tensor's name in the file."""
        return super().error(self._names.get(name, self._prefix + name), problem)


READERS: dict[str, Callable[[str], TensorFile]] = {
    "npz": NpzFile,
    "safetensors": SafetensorsFile,
    "torch": TorchFile,
}
