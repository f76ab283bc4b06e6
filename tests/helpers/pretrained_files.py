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


# Names of submodules of a ViT's block: numbered together, or by type as Linen does.
OLDER_NAMES = {
    "LayerNorm_0": "LayerNorm_0",
    "attention": "MultiHeadDotProductAttention_1",
    "LayerNorm_1": "LayerNorm_2",
    "mlp": "MlpBlock_3",
}
LINEN_NAMES = {
    "LayerNorm_0": "LayerNorm_0",
    "attention": "MultiHeadDotProductAttention_0",
    "LayerNorm_1": "LayerNorm_1",
    "mlp": "MlpBlock_0",
}


def google_vit(params: Any, names: dict[str, str] = OLDER_NAMES) -> Tensors:
    """Returns tensors of a ViT with the names of Google's npz files."""
    tensors = {
        "cls": params.get("cls"),
        "Transformer/posembed_input/pos_embedding": params.get("pos_embedding"),
        **_vit_outer(params),
    }
    for i in range(_num_blocks(params)):
        block = _take_block(params["blocks"], i)
        tensors |= _flatten(f"Transformer/encoderblock_{i}", _rename(block, names))
    return _drop_missing(tensors)


def big_vision(params: Any, stacked: bool) -> Tensors:
    """Returns tensors of a ViT with big_vision's names, stacked or one per block.

    A class token has no entry in the position embedding.
    """
    pos = params.get("pos_embedding")
    tensors = {"cls": params.get("cls"), **_vit_outer(params)}
    tensors["pos_embedding"] = pos[:, 1:] if "cls" in params and pos is not None else pos
    blocks = _rename(params["blocks"], LINEN_NAMES)
    if stacked:
        return _drop_missing(tensors | _flatten("Transformer/encoderblock", blocks))
    for i in range(_num_blocks(params)):
        block = _take_block(blocks, i)
        tensors |= _flatten(f"Transformer/encoderblock_{i}", block)
    return _drop_missing(tensors)


def _vit_outer(params: Any) -> Tensors:
    tensors = _flatten("embedding", params["stem"])
    tensors |= _flatten("Transformer/encoder_norm", params["encoder_norm"])
    for name in ("pre_logits", "head"):
        tensors |= _flatten(name, params.get(name, {}))
    return tensors | _flatten("MAPHead_0", _rename(params.get("map_head", {}), LINEN_NAMES))


def timm_vit(params: Any) -> Tensors:
    """Returns tensors of a ViT with the names and axes of timm's files."""
    stem, norm = params["stem"], params["encoder_norm"]
    tensors = {
        "cls_token": params.get("cls"),
        "pos_embed": params.get("pos_embedding"),
        "patch_embed.proj.weight": stem["kernel"].transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": stem["bias"],
        "norm.weight": norm["scale"],
        "norm.bias": norm["bias"],
    }
    for i in range(_num_blocks(params)):
        block = _take_block(params["blocks"], i)
        for index in (0, 1):
            tensors |= _torch_norm(f"blocks.{i}.norm{index + 1}", block[f"LayerNorm_{index}"])
        tensors |= _torch_attention(f"blocks.{i}.attn", block["attention"], {"qkv": "qkv"})
        tensors |= _torch_mlp(f"blocks.{i}.mlp", block["mlp"])
    if "map_head" in params:
        head = params["map_head"]
        tensors["attn_pool.latent"] = head["probe"]
        tensors |= _torch_attention("attn_pool", head["attention"], {"q": "q", "kv": "kv"})
        tensors |= _torch_norm("attn_pool.norm", head["LayerNorm_0"])
        tensors |= _torch_mlp("attn_pool.mlp", head["mlp"])
    if "head" in params:
        tensors |= _torch_dense("head", params["head"])
    return {name: np.ascontiguousarray(t) for name, t in _drop_missing(tensors).items()}


def _torch_attention(name: str, arrays: Any, layers: dict[str, str]) -> Tensors:
    """Returns an attention layer, of which each of `layers` computes several of q, k and v."""
    width = len(arrays["query"]["kernel"])
    inputs = {"q": arrays["query"], "k": arrays["key"], "v": arrays["value"]}
    tensors = {}
    for layer, parts in layers.items():
        kernels = [inputs[part]["kernel"].reshape(width, -1).T for part in parts]
        tensors[f"{name}.{layer}.weight"] = np.concatenate(kernels)
        biases = [inputs[part]["bias"].ravel() for part in parts]
        tensors[f"{name}.{layer}.bias"] = np.concatenate(biases)
    kernel = arrays["out"]["kernel"]
    tensors[f"{name}.proj.weight"] = kernel.reshape(-1, kernel.shape[-1]).T
    tensors[f"{name}.proj.bias"] = arrays["out"]["bias"]
    return tensors


def _torch_norm(name: str, arrays: Any) -> Tensors:
    return {f"{name}.weight": arrays["scale"], f"{name}.bias": arrays["bias"]}


def _torch_dense(name: str, arrays: Any) -> Tensors:
    return {f"{name}.weight": arrays["kernel"].T, f"{name}.bias": arrays["bias"]}


def _torch_mlp(name: str, arrays: Any) -> Tensors:
    return _torch_dense(f"{name}.fc1", arrays["Dense_0"]) | _torch_dense(
        f"{name}.fc2", arrays["Dense_1"]
    )


def _flatten(prefix: str, tree: Any) -> Tensors:
    tensors: Tensors = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}"
        tensors |= _flatten(path, value) if isinstance(value, dict) else {path: value}
    return tensors


def _rename(tree: Any, names: dict[str, str]) -> Any:
    return {names.get(name, name): value for name, value in tree.items()}


def _take_block(tree: Any, index: int) -> Any:
    if isinstance(tree, dict):
        return {name: _take_block(value, index) for name, value in tree.items()}
    return tree[index]


def _drop_missing(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


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
