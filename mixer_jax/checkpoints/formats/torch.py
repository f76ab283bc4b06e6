"""PyTorch checkpoints. They are pickles; only tensors are ever loaded from them."""

import argparse
import importlib.util
import os
import zipfile
from typing import Any

import numpy as np

from mixer_jax.checkpoints.formats.base import TensorFile, copy_into
from mixer_jax.errors import UserError, summarize_error

# Keys under which training programs store the weights, in order of preference.
_STATE_DICT_KEYS = ("state_dict_ema", "state_dict", "model_ema", "model")
# Prefixes that DistributedDataParallel and torch.compile add to names, in any order.
_PREFIXES = ("module.", "_orig_mod.")
# timm's training checkpoints contain their parsed arguments; timm itself allows this class, too.
# Unpickling it runs no code: PyTorch creates an empty object and sets attributes, whose values can
# only be what it loads anyway.
_SAFE_CLASSES = (argparse.Namespace,)


class TorchFile(TensorFile):
    """A state dict saved by `torch.save`. It has no metadata."""

    def __init__(self, path: str):
        """Maps the file into memory.

        Raises:
            UserError: PyTorch is not installed, or the file is damaged or contains anything but
                floating-point tensors.
        """
        self.path, self.metadata = path, {}
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
