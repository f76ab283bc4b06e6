"""Files of named tensors: names, shapes and metadata are known before any data is read."""

import abc
from typing import Any

import numpy as np

from mixer_jax.errors import UserError

_BAND = 16


class TensorFile(abc.ABC):
    """File of named tensors; a context manager that closes it.

    Attributes:
        path: Path for messages.
        shapes: Shape of each tensor by name.
        metadata: Description of the model, stored with the tensors; empty if there is none.
    """

    path: str
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, Any]

    @abc.abstractmethod
    def read(self, name: str, out: np.ndarray) -> None:
        """Reads one tensor. Can be called from several threads.

        Args:
            name: Name of the tensor.
            out: Float32 array to fill, of the tensor's shape up to axes of length 1. Its axes may
                be in any order in memory.

        Raises:
            UserError: The tensor is damaged.
        """

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027 - most readers hold nothing open
        """Closes the file."""

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
