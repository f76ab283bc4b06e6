"""NumPy's npz archives, as Google publishes weights.

`numpy.load` would allocate any size that a header claims. Here sizes are checked first: those in
headers against the archive's directory, and those in the directory against the file.
"""

import contextlib
import io
import json
import math
import os
import threading
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mixer_jax.checkpoints.formats.base import TensorFile, contiguous, copy_into
from mixer_jax.checkpoints.model_info import read_metadata_json
from mixer_jax.errors import UserError, summarize_error
from mixer_jax.files import atomic_target, atomic_write

# Suffix of the JSON file next to an archive that describes its model. Other programs reject an
# archive with anything but tensors in it.
METADATA_SUFFIX = ".json"

# Archives that unpack to more than this many times their size are rejected. Random float32 numbers
# hardly compress.
_MAX_COMPRESSION = 10
_SLACK = 2**20
_MAX_HEADER = 10_000  # Usual headers have 128 bytes.
_CHUNK_SIZE = 2**20
# NumPy has no bfloat16 and stores it as pairs of bytes.
_RAW_BFLOAT16 = np.dtype("V2")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class _Member(NamedTuple):
    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    is_fortran_order: bool
    dtype: np.dtype
    header_size: int


class NpzFile(TensorFile):
    """An npz archive, and the JSON file next to it if there is one."""

    def __init__(self, path: str):
        """Reads and checks the headers of all tensors.

        Raises:
            UserError: The file is not an archive of floating-point arrays, or is damaged.
        """
        self.path = path
        self._lock = threading.Lock()
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open(path, "rb"))
                self._archive = stack.enter_context(zipfile.ZipFile(file))
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
                raise UserError(f"{path} is not an npz archive or is truncated: {error}") from error
            self._check_size(os.fstat(file.fileno()).st_size)
            self._members: dict[str, _Member] = {}
            for info in self._archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name in self._members:
                    raise self.error(name, "occurs twice: the file is damaged.")
                self._members[name] = self._read_header(name, info)
            self.shapes = {name: member.shape for name, member in self._members.items()}
            self.metadata = read_metadata_json(Path(path + METADATA_SUFFIX))
            self._open_files = stack.pop_all()

    def close(self) -> None:
        """Closes the archive."""
        self._open_files.close()

    def read(self, name: str, out: np.ndarray) -> None:
        """Reads one tensor and verifies its checksum; see `TensorFile`.

        `numpy.lib.format.read_array` would parse the header again, which is not thread-safe.
        """
        info, shape, is_fortran_order, dtype, header_size = self._members[name]
        # Usual tensors are read straight into `out`.
        is_direct = dtype == np.float32 and out.flags.c_contiguous and not is_fortran_order
        array = out.reshape(-1) if is_direct else np.empty(math.prod(shape), dtype)
        view = array.view(np.uint8).data
        # zipfile can read several members in parallel, but must not open or close them in parallel.
        with self._lock:
            member = self._archive.open(info)
        try:
            member.read(header_size)
            position = 0
            while chunk := member.read(_CHUNK_SIZE):
                view[position : position + len(chunk)] = chunk
                position += len(chunk)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise self.error(name, f"is damaged: {summarize_error(error)}") from error
        finally:
            with self._lock:
                member.close()
        if position < len(view):
            raise self.error(name, "is truncated.")
        if not is_direct:
            array = array.view(_BFLOAT16) if dtype == _RAW_BFLOAT16 else array
            copy_into(array.reshape(shape, order="F" if is_fortran_order else "C"), out)

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
            raise self.error(name, f"is damaged: {summarize_error(error)}") from error
        if dtype.hasobject:
            raise self.error(name, "contains Python objects, which can run code: not read.")
        if dtype.kind != "f" and dtype not in (_RAW_BFLOAT16, _BFLOAT16):
            raise self.error(name, f"must be floating-point, got {dtype}.")
        claimed = start.tell() + math.prod(shape) * dtype.itemsize
        if claimed != info.file_size:
            raise self.error(
                name,
                f"claims {claimed:,} bytes (shape {shape}) but has {info.file_size:,}: it is "
                "damaged.",
            )
        return _Member(info, shape, is_fortran_order, dtype, start.tell())


def write_npz(
    path: str, tensors: Iterable[tuple[str, np.ndarray]], metadata: dict[str, Any]
) -> None:
    """Writes an npz archive, and the description of its model as JSON next to it.

    Args:
        path: Path of the archive.
        tensors: Names and tensors.
        metadata: Description of the model.
    """
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
