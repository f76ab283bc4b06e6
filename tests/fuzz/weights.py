"""Targets that read weights: npz, safetensors and PyTorch files, their JSON, and checkpoints."""

import dataclasses
import functools
import importlib.util
import io
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from mixer_jax.checkpoints.checksums import (
    CHECKSUMS_FILE,
    DamagedFileError,
    verify_checksums,
    write_checksums,
)
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.model_info import ModelInfo, parse_metadata_json
from mixer_jax.errors import UserError
from mixer_jax.models.registry import FAMILIES
from tests.fuzz.mutation import mutate, mutate_json, mutate_safetensors, mutate_zip, pick
from tests.fuzz.target import Target
from tests.helpers import pretrained_files
from tests.helpers.random_weights import random_weights, save_npz, save_run, save_safetensors

# Arrays of checkpoints of this size and more are in the chunks of the target of all files.
_METADATA = "metadata/metadata"


def _write(save: Callable[..., str], suffix: str, **options: Any) -> bytes:
    """Returns the bytes of a file of weights."""
    with tempfile.TemporaryDirectory() as folder:
        return Path(save(path=Path(folder, f"w{suffix}"), **options)).read_bytes()


@functools.cache
def _npz_seeds() -> Sequence[bytes]:
    seeds = [_write(save_npz, ".npz", weights=random_weights())]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **pretrained_files.google_legacy(random_weights().params))
    bomb = pretrained_files.deflated_zeros(pretrained_files.npy_header((2**28,)), 1)
    return [
        *seeds,
        buffer.getvalue(),
        pretrained_files.zip_archive("head/bias.npy", bomb[: 2**20], is_deflated=True),
        pretrained_files.zip_archive(
            "head/bias.npy", pretrained_files.npy_header((2**40,)), claimed_size=2**42
        ),
    ]


def _mutate_npz(data: bytes, rng: np.random.Generator) -> bytes:
    if len(data) < 2**15 and rng.random() < 0.6:
        try:
            return mutate_zip(data, rng)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError):
            pass
    return mutate(data, rng)


def _load(suffix: str, data: bytes, folder: Path) -> None:
    path = folder / f"weights{suffix}"
    path.write_bytes(data)
    weights = load_checkpoint(str(path))
    assert weights.model_info.num_classes >= 0


@functools.cache
def _npz_json_seeds() -> Sequence[bytes]:
    _npz_seeds()
    info = random_weights().model_info.to_dict()
    return [json.dumps(info).encode(), b'{"image_size": [16, 16], "class_names": ["a"]}']


def _load_npz_json(data: bytes, folder: Path) -> None:
    path = folder / "weights.npz"
    path.write_bytes(_npz_seeds()[0])
    (folder / "weights.npz.json").write_bytes(data)
    load_checkpoint(str(path))


@functools.cache
def _safetensors_seeds() -> Sequence[bytes]:
    metadata = random_weights().model_info.to_dict()
    return [
        _write(save_safetensors, ".safetensors", weights=random_weights(), metadata=metadata),
        _write(save_safetensors, ".safetensors", weights=random_weights()),
    ]


@functools.cache
def _timm_config_seeds() -> Sequence[bytes]:
    _safetensors_seeds()
    config = {
        "architecture": "mixer_b16_224",
        "num_classes": 10,
        "model_args": {"act_layer": "gelu_tanh", "img_size": 16},
        "label_names": [*"abcdefghij"],
        "pretrained_cfg": {
            "input_size": [3, 16, 16],
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "interpolation": "bilinear",
            "crop_mode": "center",
            "crop_pct": 0.9,
            "label_names": {str(index): name for index, name in enumerate("abcdefghij")},
        },
    }
    return [json.dumps(config).encode()]


def _load_timm_config(data: bytes, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(_safetensors_seeds()[1])
    (folder / "config.json").write_bytes(data)
    load_checkpoint(str(path))


class _Hostile:
    """Object whose pickle runs a program when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


@functools.cache
def _torch_seeds() -> Sequence[bytes]:
    import torch

    params = random_weights().params
    tensors = {name: torch.tensor(t) for name, t in pretrained_files.timm(params).items()}
    seeds = []
    for content, options in (
        (tensors, {}),
        ({"state_dict": tensors, "epoch": 3, "arg": {"lr": 0.1}}, {}),
        (tensors, {"_use_new_zipfile_serialization": False}),
        ({"state_dict": _Hostile()}, {}),
    ):
        buffer = io.BytesIO()
        torch.save(content, buffer, **options)
        seeds.append(buffer.getvalue())
    return [*seeds, pickle.dumps({"state_dict": _Hostile()}, 2)]


def _mutate_torch(data: bytes, rng: np.random.Generator) -> bytes:
    if zipfile.is_zipfile(io.BytesIO(data)) and rng.random() < 0.7:
        return mutate_zip(data, rng)
    return mutate(data, rng)


@functools.cache
def _metadata_seeds() -> Sequence[bytes]:
    seeds = []
    for family in FAMILIES.values():
        config = next(iter(family.variants.values()))
        info = dataclasses.replace(random_weights().model_info, family=family.name, config=config)
        seeds.append(json.dumps({"model_info": info.to_dict(), "ema": False}).encode())
    old = {
        "widths": {"num_blocks": 1, "patch_size": 4, "hidden_dim": 8, "tokens_mlp_dim": 4},
        "variant": "custom",
        "class_names": ["a", "b"],
        "image_size": 16,
        "gelu": "tanh",
        "loss": "softmax",
        "preprocess": {"eval_crop": "whole"},
        "config": {"model": {"dtype": "float32"}, "preprocess": {"exif_orientation": False}},
    }
    old["widths"]["channels_mlp_dim"] = 8  # type: ignore[index]
    return [*seeds, json.dumps(old).encode()]


def _parse_metadata(data: bytes, folder: Path) -> None:
    metadata = parse_metadata_json(data, "checkpoint x")
    info = ModelInfo.from_metadata(metadata, "checkpoint x")
    # The number of parameters is computed; no array is allocated.
    shapes = info.param_shapes()
    assert all(isinstance(length, int) for shape in shapes.values() for length in shape)
    json.dumps(info.to_dict())
    str(info.name)


@functools.cache
def _checksums_seeds() -> Sequence[bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "params").mkdir()
        (folder / "params/a").write_bytes(b"a" * 100)
        write_checksums(folder)
        return [(folder / CHECKSUMS_FILE).read_bytes()]


def _verify_checksums(data: bytes, folder: Path) -> None:
    (folder / "params").mkdir(exist_ok=True)
    (folder / "params/a").write_bytes(b"a" * 100)
    (folder / CHECKSUMS_FILE).write_bytes(data)
    try:
        verify_checksums(epath.Path(folder))
    except DamagedFileError as error:  # The checkpoint manager names the folder.
        raise UserError(str(error)) from error


@functools.cache
def _run() -> Path:
    """Saves a checkpoint of a run, without checksums, so that every file is parsed."""
    folder = Path(tempfile.mkdtemp())
    save_run(random_weights(), folder)
    step = folder / "checkpoints/1"
    (step / CHECKSUMS_FILE).unlink()
    metadata = json.loads((step / _METADATA).read_text())
    (step / _METADATA).write_text(
        json.dumps({k: v for k, v in metadata.items() if "checksum" not in k})
    )
    return folder


@functools.cache
def _run_files() -> list[str]:
    step = _run() / "checkpoints/1"
    return sorted(path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file())


@functools.cache
def _run_seeds() -> Sequence[bytes]:
    """Lists the files of a checkpoint: one line with the name, and the contents."""
    step = _run() / "checkpoints/1"
    return [name.encode() + b"\n" + (step / name).read_bytes() for name in _run_files()]


def _mutate_run(data: bytes, rng: np.random.Generator) -> bytes:
    name, _, content = data.partition(b"\n")
    try:
        is_json = isinstance(json.loads(content), dict)
    except ValueError:
        is_json = False
    content = mutate_json(content, rng) if is_json and rng.random() < 0.8 else mutate(content, rng)
    if rng.random() < 0.02:
        content = pick(rng, (b"", b"{}", b"[]"))
    return name + b"\n" + content


def _load_run(data: bytes, folder: Path) -> None:
    name, _, content = data.partition(b"\n")
    assert name.decode() in _run_files()
    workdir = folder / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(_run(), workdir)
    (workdir / "checkpoints/1" / name.decode()).write_bytes(content)
    load_checkpoint(str(workdir))


TARGETS = [
    Target("weights: npz", _npz_seeds, functools.partial(_load, ".npz"), _mutate_npz, 5),
    Target("weights: JSON of npz", _npz_json_seeds, _load_npz_json, mutate_json, 10),
    Target(
        "weights: safetensors",
        _safetensors_seeds,
        functools.partial(_load, ".safetensors"),
        mutate_safetensors,
        5,
    ),
    Target("weights: timm's config", _timm_config_seeds, _load_timm_config, mutate_json, 10),
    Target("checkpoint: metadata", _metadata_seeds, _parse_metadata, mutate_json),
    Target("checkpoint: checksums", _checksums_seeds, _verify_checksums, mutate_json),
    Target("checkpoint: all files", _run_seeds, _load_run, _mutate_run, 50),
]
if importlib.util.find_spec("torch"):
    load_torch = functools.partial(_load, ".pth")
    TARGETS.append(Target("weights: PyTorch", _torch_seeds, load_torch, _mutate_torch, 20))
