"""PyTorch's files of tensors; they are pickles, of which only tensors are ever loaded."""

import argparse
import importlib.util
import os
import zipfile
from typing import Any

import numpy as np

from mixer_jax.checkpoints.formats.base import TensorFile, copy_into
from mixer_jax.errors import UserError, summarize_error

# Where training programs put the weights among other things.
_WRAPPERS = ("state_dict_ema", "state_dict", "model_ema", "model")
# And what they put before every name, in any order: DistributedDataParallel and torch.compile.
_PREFIXES = ("module.", "_orig_mod.")
# What timm's training checkpoints hold beside tensors: its command line. Nothing runs when one is
# made: PyTorch's reader of weights alone makes an empty one and sets attributes on it, and those
# can only be what it reads anyway. timm allows it too.
_HARMLESS = (argparse.Namespace,)


class TorchFile(TensorFile):
    """A state dict saved by `torch.save`."""

    def __init__(self, path: str):
        """Maps the file into memory.

        Raises:
            UserError: PyTorch is not installed; the file is damaged, or holds other than tensors.
        """
        self.path, self.said = path, {}
        if importlib.util.find_spec("torch") is None:
            raise UserError(
                f"{path} can only be read by PyTorch: pip install torch, or save the weights as "
                "safetensors"
            )
        import torch

        try:
            # Files of before PyTorch 1.6 are no archives, and cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            # On its way out, `safe_globals` would take back what the user's program has allowed.
            allowed = torch.serialization.get_safe_globals()
            with torch.serialization.safe_globals([c for c in _HARMLESS if c not in allowed]):
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # What it stumbles over is no closed list.
            reason = summarize_error(error)
            raise UserError(f"{path} is no file of PyTorch tensors alone: {reason}") from error
        for wrapper in _WRAPPERS:
            if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
                loaded = loaded[wrapper]
                break
        if not isinstance(loaded, dict):
            raise UserError(f"{path} holds a {type(loaded).__name__}, not tensors by name")
        self._tensors: dict[str, Any] = {}
        for name, tensor in loaded.items():
            if not isinstance(tensor, torch.Tensor):
                raise self.error(str(name), f"is a {type(tensor).__name__}; weights are tensors")
            if not tensor.dtype.is_floating_point:
                raise self.error(str(name), f"is of type {tensor.dtype}; weights are floats")
            if tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise self.error(str(name), f"is {tensor.layout} on {tensor.device}, not plain")
            bare = _without_prefixes(str(name))
            if bare in self._tensors:
                raise self.error(bare, "is there twice, with other prefixes")
            self._tensors[bare] = tensor.detach()
        # A tensor may show the same numbers over and over, and so announce what the file lacks.
        announced = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())
        if announced > (size := os.path.getsize(path)):
            raise UserError(f"{path} announces {announced:,} bytes and has {size:,}: it is damaged")
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, out: np.ndarray) -> None:
        """As `TensorFile`."""
        copy_into(self._tensors[name].float().numpy(), out)


def _without_prefixes(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name
