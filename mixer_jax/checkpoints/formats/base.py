"""Files of named tensors: what is in one is known, and checked, before any of it is read."""

import abc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mixer_jax import files
from mixer_jax.errors import UserError

# NumPy has no bfloat16 of its own: files of Google's hold it as raw pairs of bytes.
_BFLOAT16 = (np.dtype("V2"), np.dtype(ml_dtypes.bfloat16))
_BAND = 16


class TensorFile(abc.ABC):
    """Tensors by name, to be used as a context.

    Attributes:
        path: of the file, for messages.
        shapes: of its tensors, by name.
        said: what it says of its weights, as plain data; empty where it says nothing.
    """

    path: str
    shapes: dict[str, tuple[int, ...]]
    said: dict[str, Any]

    @abc.abstractmethod
    def read(self, name: str, out: np.ndarray) -> None:
        """Reads one tensor into `out`, float32 of its shape, in any order of memory.

        May be called by several threads.

        Raises:
            UserError: the tensor is damaged.
        """

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027 - most have nothing open
        """Lets go of the file."""

    def error(self, name: str, what: str) -> UserError:
        """Returns an error that names the file and one of its tensors."""
        return UserError(f"{self.path}: tensor {name!r} {what}")

    def check_type(self, name: str, dtype: np.dtype) -> None:
        """Raises UserError unless a tensor has a type that weights can have."""
        if dtype.hasobject:
            raise self.error(name, "holds Python objects, which may be programs: it is not read")
        if dtype.kind != "f" and dtype not in _BFLOAT16:
            raise self.error(name, f"is of type {dtype}; weights are floating-point numbers")


def to_float(array: np.ndarray) -> np.ndarray:
    """Returns an array of any type that `check_type` lets through, as one that can be cast."""
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def copy_into(source: np.ndarray, out: np.ndarray) -> None:
    """Copies numbers into `out`, of the same shape up to axes of length 1, transposed or not."""
    source = source.reshape(out.shape)
    if out.ndim != 2 or source.flags.c_contiguous == out.flags.c_contiguous:
        out[...] = source
        return
    # One of them is transposed: so many rows at a time fill whole lines of the processor's cache.
    for start in range(0, len(out), _BAND):
        out[start : start + _BAND] = source[start : start + _BAND]


def contiguous(tensor: np.ndarray) -> np.ndarray:
    """Returns a tensor whose numbers lie in the order of its axes, itself if they do."""
    if tensor.flags.c_contiguous:
        return tensor
    out = np.empty(tensor.shape, tensor.dtype)
    copy_into(tensor, out)
    return out


def check_target(path: str, force: bool) -> None:
    """Raises UserError if a file cannot be written at `path`, or lies there already."""
    target = Path(path)
    if not target.parent.is_dir():
        raise UserError(f"{str(target.parent)!r} is no folder; make it, or name a file in another")
    if target.is_dir():
        raise UserError(f"{path!r} is a folder; name a file")
    if target.exists() and not force:
        raise UserError(f"{path!r} exists; name another file, or replace it with --force")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"{str(target.parent)!r} cannot be written; name a file in another folder")


@contextmanager
def atomic_target(path: str) -> Iterator[Path]:
    """Yields a temporary path, which replaces `path` on success.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        with files.atomic_target(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"{path!r} cannot be written: {error.strerror or error}") from error
