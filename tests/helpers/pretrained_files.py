"""Weights in the layouts that they are published in, written from their description alone."""

import io
import struct
import zlib
from typing import Any

import numpy as np

MIXINGS = ("token_mixing", "channel_mixing")
Tensors = dict[str, Any]


def google(params: Any) -> Tensors:
    """The names of Google's npz files."""
    tensors = _leaf("stem", params["stem"]) | _leaf("head", params.get("head", {}))
    tensors |= _leaf("pre_head_layer_norm", params["pre_head_layer_norm"])
    blocks = params["blocks"]
    for i in range(len(blocks["LayerNorm_0"]["scale"])):
        for number, mixing in enumerate(MIXINGS):
            norm = f"LayerNorm_{number}"
            tensors |= _leaf(f"MixerBlock_{i}/{norm}", _block(blocks[norm], i))
            for dense in ("Dense_0", "Dense_1"):
                part = _block(blocks[mixing][dense], i)
                tensors |= _leaf(f"MixerBlock_{i}/{mixing}/{dense}", part)
    return tensors


def google_older(params: Any) -> Tensors:
    """The names of Google's older npz files, with their extra axes of length 1."""
    tensors = _leaf("embedding", params["stem"]) | _leaf("head", params.get("head", {}))
    tensors |= _leaf("Mixer/encoder_norm", params["pre_head_layer_norm"])
    blocks = params["blocks"]
    for i in range(len(blocks["LayerNorm_0"]["scale"])):
        block = f"Mixer/encoderblock_{i}"
        for number, mixing in enumerate(MIXINGS):
            norm = f"LayerNorm_{number}"
            tensors |= _leaf(f"{block}/{norm}", _block(blocks[norm], i))
            for dense in (0, 1):
                name = f"{block}/{mixing}_phase_0"
                part = _block(blocks[mixing][f"Dense_{dense}"], i)
                tensors[f"{name}/kernel{dense + 1}"] = part["kernel"][None, :, None, :]
                tensors[f"{name}/bias{dense + 1}"] = part["bias"][None, None]
    return tensors


def timm(params: Any) -> Tensors:
    """The names of timm's files."""
    stem = params["stem"]
    tensors = {"stem.proj.weight": stem["kernel"].transpose(3, 2, 0, 1)}
    tensors["stem.proj.bias"] = stem["bias"]
    blocks = params["blocks"]
    for i in range(len(blocks["LayerNorm_0"]["scale"])):
        for number, mlp in enumerate(("mlp_tokens", "mlp_channels")):
            norm = _block(blocks[f"LayerNorm_{number}"], i)
            tensors[f"blocks.{i}.norm{number + 1}.weight"] = norm["scale"]
            tensors[f"blocks.{i}.norm{number + 1}.bias"] = norm["bias"]
            for dense in (0, 1):
                part = _block(blocks[MIXINGS[number]][f"Dense_{dense}"], i)
                tensors[f"blocks.{i}.{mlp}.fc{dense + 1}.weight"] = part["kernel"].T
                tensors[f"blocks.{i}.{mlp}.fc{dense + 1}.bias"] = part["bias"]
    norm = params["pre_head_layer_norm"]
    tensors |= {"norm.weight": norm["scale"], "norm.bias": norm["bias"]}
    if "head" in params:
        head = params["head"]
        tensors |= {"head.weight": head["kernel"].T, "head.bias": head["bias"]}
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _leaf(name: str, arrays: Any) -> Tensors:
    return {f"{name}/{kind}": array for kind, array in arrays.items()}


def _block(arrays: Any, number: int) -> Any:
    return {kind: array[number] for kind, array in arrays.items()}


def npy(array: np.ndarray) -> bytes:
    """The bytes of an .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


def npy_header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    """The beginning of an .npy file that announces any shape."""
    file = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def deflated_zeros(prefix: bytes, gibibytes: int) -> bytes:
    """A few megabytes that unpack to a prefix and many zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(prefix) + packer.flush(zlib.Z_FULL_FLUSH)
    # What follows a full flush stands alone, and may stand there any number of times.
    piece = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + piece * (64 * gibibytes)


def zip_of(name: str, data: bytes, deflated: bool = False, announced: int | None = None) -> bytes:
    """A zip archive of one member, whose directory may announce another size than it has."""
    size = len(data) if announced is None else announced
    method = zlib.DEFLATED if deflated else 0
    packed = len(data) if deflated else size
    crc = zlib.crc32(data)
    encoded = name.encode()
    extra = struct.pack("<HHQQ", 1, 16, size, packed)
    sizes = struct.pack("<HHHHHIII", 45, 0, method, 0, 33, crc, 2**32 - 1, 2**32 - 1)
    lengths = struct.pack("<HH", len(encoded), len(extra))
    local = b"PK\3\4" + sizes + lengths + encoded + extra
    tail = struct.pack("<HHHII", 0, 0, 0, 0, 0)
    entry = b"PK\1\2" + struct.pack("<H", 45) + sizes + lengths + tail + encoded + extra
    place = struct.pack("<IIH", len(entry), len(local) + len(data), 0)
    return local + data + entry + b"PK\5\6" + struct.pack("<HHHH", 0, 0, 1, 1) + place


def safetensors_bytes(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data
