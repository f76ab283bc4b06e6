"""Published layouts and file formats, implemented independently of `mixer_jax.checkpoints`."""

import io
import struct
import zlib
from typing import Any

import numpy as np

MIXINGS = ("token_mixing", "channel_mixing")
Tensors = dict[str, Any]


def google(params: Any) -> Tensors:
    """Returns tensors with the names of Google's npz files."""
    tensors = _prefix("stem", params["stem"]) | _prefix("head", params.get("head", {}))
    tensors |= _prefix("pre_head_layer_norm", params["pre_head_layer_norm"])
    blocks = params["blocks"]
    for i in range(_num_blocks(params)):
        for index, mixing in enumerate(MIXINGS):
            norm = f"LayerNorm_{index}"
            tensors |= _prefix(f"MixerBlock_{i}/{norm}", _block(blocks[norm], i))
            for dense in ("Dense_0", "Dense_1"):
                arrays = _block(blocks[mixing][dense], i)
                tensors |= _prefix(f"MixerBlock_{i}/{mixing}/{dense}", arrays)
    return tensors


def google_legacy(params: Any) -> Tensors:
    """Returns tensors with the names of Google's older npz files, with axes of length 1."""
    tensors = _prefix("embedding", params["stem"]) | _prefix("head", params.get("head", {}))
    tensors |= _prefix("Mixer/encoder_norm", params["pre_head_layer_norm"])
    blocks = params["blocks"]
    for i in range(_num_blocks(params)):
        block = f"Mixer/encoderblock_{i}"
        for index, mixing in enumerate(MIXINGS):
            norm = f"LayerNorm_{index}"
            tensors |= _prefix(f"{block}/{norm}", _block(blocks[norm], i))
            for dense in (0, 1):
                name = f"{block}/{mixing}_phase_0"
                arrays = _block(blocks[mixing][f"Dense_{dense}"], i)
                tensors[f"{name}/kernel{dense + 1}"] = arrays["kernel"][None, :, None, :]
                tensors[f"{name}/bias{dense + 1}"] = arrays["bias"][None, None]
    return tensors


def timm(params: Any) -> Tensors:
    """Returns tensors with the names and axes of timm's files."""
    stem = params["stem"]
    tensors = {"stem.proj.weight": stem["kernel"].transpose(3, 2, 0, 1)}
    tensors["stem.proj.bias"] = stem["bias"]
    blocks = params["blocks"]
    for i in range(_num_blocks(params)):
        for index, mlp in enumerate(("mlp_tokens", "mlp_channels")):
            norm = _block(blocks[f"LayerNorm_{index}"], i)
            tensors[f"blocks.{i}.norm{index + 1}.weight"] = norm["scale"]
            tensors[f"blocks.{i}.norm{index + 1}.bias"] = norm["bias"]
            for dense in (0, 1):
                arrays = _block(blocks[MIXINGS[index]][f"Dense_{dense}"], i)
                tensors[f"blocks.{i}.{mlp}.fc{dense + 1}.weight"] = arrays["kernel"].T
                tensors[f"blocks.{i}.{mlp}.fc{dense + 1}.bias"] = arrays["bias"]
    norm = params["pre_head_layer_norm"]
    tensors |= {"norm.weight": norm["scale"], "norm.bias": norm["bias"]}
    if "head" in params:
        head = params["head"]
        tensors |= {"head.weight": head["kernel"].T, "head.bias": head["bias"]}
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _num_blocks(params: Any) -> int:
    return len(params["blocks"]["LayerNorm_0"]["scale"])


def _prefix(prefix: str, arrays: Any) -> Tensors:
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


def _block(arrays: Any, index: int) -> Any:
    return {name: array[index] for name, array in arrays.items()}


def npy(array: np.ndarray) -> bytes:
    """Returns the bytes of an .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


def npy_header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    """Returns the header of an .npy file with any shape."""
    file = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def deflated_zeros(prefix: bytes, gibibytes: int) -> bytes:
    """Returns a few megabytes that unpack to a prefix and gibibytes of zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(prefix) + packer.flush(zlib.Z_FULL_FLUSH)
    # After a full flush, data is independent of what precedes it and can be repeated.
    chunk = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + chunk * (64 * gibibytes)


def zip_archive(
    name: str, data: bytes, is_deflated: bool = False, claimed_size: int | None = None
) -> bytes:
    """Returns a zip archive of one member, whose directory can claim any size."""
    size = len(data) if claimed_size is None else claimed_size
    method = zlib.DEFLATED if is_deflated else 0
    packed_size = len(data) if is_deflated else size
    crc = zlib.crc32(data)
    encoded = name.encode()
    extra = struct.pack("<HHQQ", 1, 16, size, packed_size)
    sizes = struct.pack("<HHHHHIII", 45, 0, method, 0, 33, crc, 2**32 - 1, 2**32 - 1)
    lengths = struct.pack("<HH", len(encoded), len(extra))
    local = b"PK\3\4" + sizes + lengths + encoded + extra
    tail = struct.pack("<HHHII", 0, 0, 0, 0, 0)
    entry = b"PK\1\2" + struct.pack("<H", 45) + sizes + lengths + tail + encoded + extra
    end = struct.pack("<IIH", len(entry), len(local) + len(data), 0)
    return local + data + entry + b"PK\5\6" + struct.pack("<HHHH", 0, 0, 1, 1) + end


def safetensors_bytes(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """Returns a safetensors file with any header, which can claim any length."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data
