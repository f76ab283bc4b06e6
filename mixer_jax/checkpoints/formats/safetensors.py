"""Files of tensors in the safetensors format, as timm publishes weights."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mixer_jax.checkpoints.formats.base import TensorFile, atomic_target, contiguous, copy_into
from mixer_jax.errors import UserError, summarize_error

# What a file says of its weights stands in its header under this key.
METADATA_KEY = "mixer_jax"
# The file format's names of the types that weights can have.
_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


class SafetensorsFile(TensorFile):
    """A safetensors file."""

    def __init__(self, path: str):
        """Reads the header.

        Raises:
            UserError: it is none, or its header is damaged or announces what it does not hold.
        """
        self.path = path
        try:
            # Not mapped into memory: what has been read would stay there beside the copy.
            self._file = safetensors.safe_open(path, framework="numpy", backend="pread")
            headers = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
            metadata = self._file.metadata() or {}
        except (safetensors.SafetensorError, OSError) as error:
            reason = summarize_error(error)
            raise UserError(f"{path} is no safetensors file, or is damaged: {reason}") from error
        self.shapes = {}
        for name, header in headers.items():
            if header.get_dtype() not in _TYPES:
                raise self.error(name, f"is of type {header.get_dtype()}; weights are floats")
            self.shapes[name] = tuple(header.get_shape())
        try:
            self.said = json.loads(metadata.get(METADATA_KEY, "{}"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} has a header whose {METADATA_KEY!r} is no JSON") from error
        if not isinstance(self.said, dict):
            raise UserError(f"{path} has a header whose {METADATA_KEY!r} is no JSON object")

    def close(self) -> None:
        """As `TensorFile`."""
        self._file.__exit__(None, None, None)

    def read(self, name: str, out: np.ndarray) -> None:
        """As `TensorFile`."""
        try:
            tensor = self._file.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise self.error(name, f"cannot be read: {summarize_error(error)}") from error
        copy_into(tensor, out)


def write_safetensors(
    path: str, tensors: Iterable[tuple[str, np.ndarray]], said: dict[str, Any]
) -> None:
    """Writes a safetensors file.

    Args:
        path: of the file.
        tensors: by name.
        said: plain data, put into its header.

    Raises:
        UserError: it cannot be written.
    """
    arrays = {name: contiguous(tensor) for name, tensor in tensors}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(said)}
    with atomic_target(path) as draft:
        safetensors.numpy.save_file(arrays, draft, metadata=metadata)
