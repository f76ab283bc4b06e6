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
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

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
_FLOATS = {"F16", "BF16", "F32", "F64"}
# Keys under which training programs store the weights, in order of preference.
_STATE_DICT_KEYS = ("state_dict_ema", "state_dict", "model_ema", "model")
# Prefixes that DistributedDataParallel and torch.compile add to names, in any order.
_PREFIXES = ("module.", "_orig_mod.")
# timm's training checkpoints contain their parsed arguments; timm itself allows this class, too.
# Unpickling it runs no code: PyTorch creates an empty object and sets attributes, whose values can
# only be what it loads anyway.
_SAFE_CLASSES = (argparse.Namespace,)


class TensorFile(abc.ABC):
    """File of named tensors; a context manager that closes it.

    Attributes:
        path: Path for messages.
        shapes: Shape of each tensor by name.
        metadata: Description of the model, stored with the tensors; empty if there is none.
    """

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, Any]

    def __init__(self, path: str):
        self.path = path
        self._open_files = contextlib.ExitStack()

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

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self._open_files.close()

    def error(self, name: str, problem: str) -> UserError:
        """Creates an error that names the file and one of its tensors."""
        return UserError(f"{self.path}: tensor {name!r} {problem}")


def copy_into(source: np.ndarray, out: np.ndarray) -> None:
    """Copies an array into `out`, of the same shape up to axes of length 1, transposed or not."""
    source = source.reshape(out.shape)
    if out.ndim != 2 or source.flags.c_contiguous == out.flags.c_contiguous:
        out[...] = source
        return
    # One of them is transposed: copying bands of rows fills whole cache lines.
    for start in range(0, len(out), _BAND):
        out[start : start + _BAND] = source[start : start + _BAND]


def contiguous(tensor: np.ndarray) -> np.ndarray:
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
            UserError: The file is not an archive of floating-point arrays, or is damaged.
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
                if name in self._members:
                    raise self.error(name, "occurs twice: the file is damaged.")
                self._members[name] = self._read_header(name, info)
            self.shapes = {name: member.shape for name, member in self._members.items()}
            self.metadata = read_metadata_json(Path(path + METADATA_SUFFIX))
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
        checksum, start = zlib.crc32(member.header), 0
        # Threads cannot share a file's position.
        with open(self.path, "rb", buffering=0) as file:
            file.seek(member.position)
            while start < len(buffer):
                count = file.readinto(buffer[start : start + _CHUNK_SIZE])
                if not count:
                    raise EOFError("it is truncated")
                checksum = zlib.crc32(buffer[start : start + count], checksum)
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

    def _read_header(self, name: str, info: zipfile.ZipInfo) -> _Member:
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
            raise self.error(name, "contains Python objects, which can run code: not read.")
        if dtype.kind != "f" and dtype not in (_RAW_BFLOAT16, _BFLOAT16):
            raise self.error(name, f"must be floating-point, got {dtype}.")
        header_size = start.tell()
        claimed = header_size + math.prod(shape) * dtype.itemsize
        if claimed != info.file_size:
            raise self.error(
                name,
                f"claims {claimed:,} bytes (shape {shape}) but has {info.file_size:,}: it is "
                "damaged.",
            )
        # The local header repeats the entry of the directory, with other extra fields. zipfile has
        # compared them.
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
                np.lib.format.write_array(member, contiguous(tensor))
    atomic_write(Path(path + METADATA_SUFFIX), json.dumps(metadata, indent=2) + "\n")


class SafetensorsFile(TensorFile):
    """Safetensors file, as timm publishes weights."""

    def __init__(self, path: str):
        """Reads and checks the header.

        Raises:
            UserError: The file is not a safetensors file, is damaged, or has other than
                floating-point tensors.
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
            if header.get_dtype() not in _FLOATS:
                raise self.error(name, f"must be floating-point, got {header.get_dtype()}.")
            self.shapes[name] = tuple(header.get_shape())
        header_source = f"{path}: {_METADATA_KEY!r} in its header"
        self.metadata = parse_metadata_json(metadata.get(_METADATA_KEY, "{}"), header_source)

    def read(self, name: str, out: np.ndarray) -> None:
        """Reads one tensor; see `TensorFile`."""
        try:
            tensor = self._file.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise self.error(name, f"cannot be read: {summarize_error(error)}.") from error
        copy_into(tensor, out)


def write_safetensors(
    path: str, tensors: Iterable[tuple[str, np.ndarray]], metadata: dict[str, Any]
) -> None:
    """Writes a safetensors file, with the description of its model in the header."""
    arrays = {name: contiguous(tensor) for name, tensor in tensors}
    header = {"format": "pt", _METADATA_KEY: json.dumps(metadata)}
    with atomic_target(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary, metadata=header)


class TorchFile(TensorFile):
    """A state dict saved by `torch.save`. It has no metadata."""

    def __init__(self, path: str):
        """Maps the file into memory.

        Raises:
            UserError: PyTorch is not installed, or the file is damaged or contains anything but
                floating-point tensors.
        """
        super().__init__(path)
        self.metadata = {}
        if importlib.util.find_spec("torch") is None:
            raise UserError(
                f"{path} can only be read with PyTorch. Run pip install torch, or save the weights "
                "as safetensors."
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
            reason = summarize_error(error)
            raise UserError(f"{path} is not a file of PyTorch tensors only: {reason}.") from error
        for key in _STATE_DICT_KEYS:
            if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
        if not isinstance(loaded, dict):
            raise UserError(f"{path} must contain a state dict, got {type(loaded).__name__}.")
        self._tensors: dict[str, Any] = {}
        for key, tensor in loaded.items():
            name = _strip_prefixes(str(key))
            if not isinstance(tensor, torch.Tensor):
                raise self.error(name, f"must be a tensor, got {type(tensor).__name__}.")
            if not tensor.dtype.is_floating_point:
                raise self.error(name, f"must be floating-point, got {tensor.dtype}.")
            if tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise self.error(
                    name, f"must be dense and on the CPU, got {tensor.layout} on {tensor.device}."
                )
            if name in self._tensors:
                raise self.error(name, "occurs twice, with different prefixes.")
            self._tensors[name] = tensor.detach()
        # A tensor with stride 0 can be larger than its storage.
        claimed = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())
        if claimed > (size := os.path.getsize(path)):
            raise UserError(f"{path} claims {claimed:,} bytes but has {size:,}: it is damaged.")
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, out: np.ndarray) -> None:
        """Reads one tensor; see `TensorFile`."""
        copy_into(self._tensors[name].float().numpy(), out)


def _strip_prefixes(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


READERS: dict[str, Callable[[str], TensorFile]] = {
    "npz": NpzFile,
    "safetensors": SafetensorsFile,
    "torch": TorchFile,
}
