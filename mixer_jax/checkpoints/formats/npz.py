"""NumPy's npz archives of tensors, as Google publishes weights.

`numpy.load` is not used: it believes what a header announces, and reads with one thread.
"""

import contextlib
import io
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixer_jax.checkpoints.formats.base import (
    TensorFile,
    atomic_target,
    contiguous,
    copy_into,
    to_float,
)
from mixer_jax.checkpoints.model_info import read_metadata_json
from mixer_jax.errors import UserError, summarize_error

# What a file says of its weights stands beside it, under its name and this: other programs refuse
# an archive that holds more than tensors.
METADATA_SUFFIX = ".json"

# An archive that unfolds to more than this many times its size is no weights.
_MOST_COMPRESSED = 10
_SLACK = 2**20
# A header is a few hundred bytes.
_MAX_HEADER = 10_000
_LOCAL_HEADER = struct.Struct("<4s22xHH")
# What is not stored as it is gets unpacked in pieces: an archive's word on its length may be false.
_PIECE = 2**20


class _Member(NamedTuple):
    """One tensor of an archive.

    Attributes:
        info: of the archive.
        dtype: of its numbers.
        shape: of it.
        fortran: whether its numbers lie column by column.
        header: bytes before its numbers.
    """

    info: zipfile.ZipInfo
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    header: int


class NpzFile(TensorFile):
    """An npz archive, and the JSON file beside it if there is one."""

    def __init__(self, path: str):
        """Reads the headers.

        Raises:
            UserError: it is no archive, or a header is damaged, announces what the file does not
                hold, or something that is no tensor of numbers.
        """
        self.path = path
        with contextlib.ExitStack() as opened:
            try:
                self._file = opened.enter_context(open(path, "rb"))
                self._archive = opened.enter_context(zipfile.ZipFile(self._file))
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
                raise UserError(f"{path} is no npz archive, or is cut off: {error}") from error
            self._check_size()
            self._members: dict[str, _Member] = {}
            for info in self._archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name in self._members:
                    raise self.error(name, "is there twice: the file is damaged")
                self._members[name] = self._read_header(name, info)
            self.shapes = {name: member.shape for name, member in self._members.items()}
            self.said = read_metadata_json(Path(path + METADATA_SUFFIX))
            self._opened = opened.pop_all()

    def close(self) -> None:
        """As `TensorFile`."""
        self._opened.close()

    def read(self, name: str, out: np.ndarray) -> None:
        """As `TensorFile`."""
        member = self._members[name]
        if member.info.compress_type == zipfile.ZIP_STORED:
            array = self._read_stored(name, member, out)
        else:
            array = self._read_compressed(name, member)
        if array is not out:
            copy_into(array, out)

    def _check_size(self) -> None:
        announced = sum(info.file_size for info in self._archive.infolist())
        size = os.fstat(self._file.fileno()).st_size
        if announced > _MOST_COMPRESSED * size + _SLACK:
            largest = max(self._archive.infolist(), key=lambda info: info.file_size)
            name = largest.filename.removesuffix(".npy")
            raise self.error(
                name, f"announces {largest.file_size:,} bytes in a file of {size:,}: it is damaged"
            )

    def _read_header(self, name: str, info: zipfile.ZipInfo) -> _Member:
        if not info.filename.endswith(".npy"):
            raise self.error(info.filename, "is no .npy file; an npz archive holds nothing else")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self.error(name, "is compressed by another method than npz archives use")
        try:
            with self._archive.open(info) as file:
                start = io.BytesIO(file.read(_MAX_HEADER))
            version = np.lib.format.read_magic(start)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(start, max_header_size=_MAX_HEADER)
        except Exception as error:  # What zipfile and NumPy stumble over is no closed list.
            raise self.error(name, f"is damaged: {summarize_error(error)}") from error
        header = start.tell()
        self.check_type(name, dtype)
        announced = header + math.prod(shape) * dtype.itemsize
        if announced != info.file_size:
            raise self.error(
                name,
                f"announces {announced:,} bytes, shape {shape}, and has {info.file_size:,}: "
                "it is damaged",
            )
        return _Member(info, dtype, shape, fortran, header)

    def _read_stored(self, name: str, member: _Member, out: np.ndarray) -> np.ndarray:
        """Reads a tensor that is not compressed, into `out` if it lies there as in the file."""
        info = member.info
        descriptor = self._file.fileno()
        local = os.pread(descriptor, _LOCAL_HEADER.size, info.header_offset)
        _, name_length, extra_length = _LOCAL_HEADER.unpack(local)
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        header = os.pread(descriptor, member.header, start)
        direct = out.flags.c_contiguous and not member.fortran and member.dtype == np.float32
        data = out if direct else np.empty(math.prod(member.shape), member.dtype)
        view = memoryview(data.reshape(-1).view(np.uint8).data)
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], start + member.header + done)
            if not count:
                raise self.error(name, "is cut off: the file is damaged")
            done += count
        if zlib.crc32(view, zlib.crc32(header)) != info.CRC:
            raise self.error(name, "does not match its checksum: the file is damaged")
        return out if direct else self._parse(member, data)

    def _read_compressed(self, name: str, member: _Member) -> np.ndarray:
        data = np.empty(math.prod(member.shape), member.dtype)
        view = memoryview(data.view(np.uint8).data)
        done = 0
        try:
            with self._archive.open(member.info) as file:
                file.read(member.header)
                while piece := file.read(min(_PIECE, len(view) - done)):
                    view[done : done + len(piece)] = piece
                    done += len(piece)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise self.error(name, f"is damaged: {summarize_error(error)}") from error
        if done < len(view):
            raise self.error(name, "is cut off: the file is damaged")
        return self._parse(member, data)

    def _parse(self, member: _Member, data: np.ndarray) -> np.ndarray:
        array = data.reshape(member.shape, order="F" if member.fortran else "C")
        return to_float(array)


def write_npz(path: str, tensors: Iterable[tuple[str, np.ndarray]], said: dict[str, Any]) -> None:
    """Writes an npz archive, and what it says of its weights as JSON beside it.

    Args:
        path: of the file.
        tensors: by name.
        said: plain data.

    Raises:
        UserError: they cannot be written.
    """
    with atomic_target(path) as draft, atomic_target(path + METADATA_SUFFIX) as said_draft:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
            for name, tensor in tensors:
                # A fixed date: the same weights make the same file.
                info = zipfile.ZipInfo(f"{name}.npy")
                with archive.open(info, "w", force_zip64=True) as member:
                    # A writer that is no file: NumPy then writes a tensor piece by piece.
                    np.lib.format.write_array(member, contiguous(tensor))
        said_draft.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
