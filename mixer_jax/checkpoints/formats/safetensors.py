"""Safetensors files, as timm publishes weights."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mixer_jax.checkpoints.formats.base import TensorFile, contiguous, copy_into
from mixer_jax.errors import UserError, summarize_error
from mixer_jax.files import atomic_target

# Key of the header's metadata that holds the description of the model, as JSON.
METADATA_KEY = "mixer_jax"
_FLOATS = {"F16", "BF16", "F32", "F64"}


class SafetensorsFile(TensorFile):
    """A safetensors file."""

    def __init__(self, path: str):
        """Reads and checks the header.

        Raises:
            UserError: The file is not a safetensors file, is damaged, or has other than
                floating-point tensors.
        """
        self.path = path
        try:
            # Memory-mapped pages would stay in memory next to the copies.
            self._file = safetensors.safe_open(path, framework="numpy", backend="pread")
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
        try:
            self.metadata = json.loads(metadata.get(METADATA_KEY, "{}"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: {METADATA_KEY!r} in its header is not JSON.") from error
        if not isinstance(self.metadata, dict):
            raise UserError(f"{path}: {METADATA_KEY!r} in its header is not a JSON object.")

    def close(self) -> None:
        """Closes the file."""
        self._file.__exit__(None, None, None)

    def read(self, name: str, out: np.ndarray) -> None:
        """Reads one tensor; see `TensorFile`."""
        try:
            tensor = self._file.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise self.error(name, f"cannot be read: {summarize_error(error)}") from error
        copy_into(tensor, out)


def write_safetensors(
    path: str, tensors: Iterable[tuple[str, np.ndarray]], metadata: dict[str, Any]
) -> None:
    """Writes a safetensors file.

    Args:
        path: Path of the file.
        tensors: Names and tensors.
        metadata: Description of the model, stored in the header.
    """
    arrays = {name: contiguous(tensor) for name, tensor in tensors}
    header = {"format": "pt", METADATA_KEY: json.dumps(metadata)}
    with atomic_target(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary, metadata=header)
