"""Tests of safetensors files: types of numbers, and corrupt and hostile files."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load, save

from mixer_jax.checkpoints.load import load_checkpoint
from tests.helpers import pretrained_files
from tests.helpers.corrupt_files import (
    SMALLEST,
    assert_rejected,
    assert_rejected_without_memory,
    fuzz,
    load_or_error,
)
from tests.helpers.messages import mentions
from tests.helpers.pretrained_files import safetensors_bytes
from tests.helpers.random_weights import assert_params_equal, random_weights

STEM = "stem.proj.weight"


def content(metadata: dict[str, str] | None = None, **changes: Any) -> bytes:
    """Returns a good file with some tensors changed, or left out if they are None."""
    tensors = pretrained_files.timm(random_weights().params) | changes
    return save({name: t for name, t in tensors.items() if t is not None}, metadata)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    """Returns a tensor's entry in the header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def file_of(header: dict[str, Any], data: bytes = b"") -> bytes:
    return safetensors_bytes(json.dumps(header).encode(), data)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_safetensors_file_reads_any_float_type(dtype: Any, tmp_path: Path) -> None:
    tensors = pretrained_files.timm(random_weights().params)
    saved = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    path = write(tmp_path / "model.safetensors", save(saved))
    loaded = pretrained_files.timm(load_checkpoint(str(path)).params)
    expected = {name: tensor.astype(np.float32) for name, tensor in saved.items()}
    assert_params_equal(loaded, expected)


BAD_TENSORS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "missing": ({"norm.bias": None}, ["norm.bias"]),
    "extra": ({"extra": np.zeros(3, np.float32)}, ["extra"]),
    "shape": ({"norm.bias": np.zeros(4, np.float32)}, ["norm.bias", "4", "16"]),
    "nan": ({"norm.bias": np.full(16, np.nan, np.float32)}, ["norm.bias"]),
    "integers": ({"norm.bias": np.ones(16, np.int64)}, ["norm.bias", "I64"]),
    "far block": (
        {f"blocks.{10**12}.norm1.weight": np.zeros(16, np.float32)},
        ["blocks.1000000000000.norm1.weight"],
    ),
    "block of many digits": (
        {f"blocks.{'1' * 5000}.norm1.weight": np.zeros(16, np.float32)},
        ["norm1.weight"],
    ),
    "new line": ({"a\nb": np.zeros(3, np.float32)}, [r"a\nb"]),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_safetensors_file_names_the_bad_tensor(case: str, tmp_path: Path) -> None:
    changes, parts = BAD_TENSORS[case]
    message = assert_rejected(write(tmp_path / "model.safetensors", content(**changes)))
    assert mentions(message, *parts)


def test_safetensors_file_rejects_false_sizes_without_memory(tmp_path: Path) -> None:
    good = content()
    files = {
        "terabytes": file_of({STEM: entry([10**6, 10**6], 0, 4 * 10**12)}, bytes(100)),
        "terabytes in few bytes": file_of({STEM: entry([10**6, 10**6], 0, 100)}, bytes(100)),
        "overlapping": file_of(
            {STEM: entry([4], 0, 16), "norm.bias": entry([4], 8, 24)}, bytes(24)
        ),
        "long header": safetensors_bytes(b"{}", length=2**60),
        "long header in a good file": (2**60).to_bytes(8, "little") + good[8:],
        "empty and huge": file_of({STEM: entry([2**62, 0, 3, 2**62], 0, 0)}),
        "empty": b"",
        "text": b"these are not weights, and that in many words\n",
        "not JSON": safetensors_bytes(b"{not JSON}"),
        "other JSON": safetensors_bytes(b"[1, 2, 3]"),
        "deep JSON": safetensors_bytes(b"[" * 100_000),
        "no tensors": safetensors_bytes(b"{}"),
    }
    files |= {f"{tenth} tenths": good[: len(good) * tenth // 10] for tenth in range(10)}
    assert_rejected_without_memory(files, tmp_path, ".safetensors")


@pytest.mark.parametrize("metadata", ["{", "[1, 2]", '"gelu"', '["gelu"]', "[" * 100_000])
def test_safetensors_file_rejects_metadata_that_is_not_a_json_object(
    metadata: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "model.safetensors", content({"mixer_jax": metadata}))
    assert mentions(assert_rejected(path), "mixer_jax", "JSON")


@pytest.mark.slow
def test_safetensors_file_loads_exactly_or_fails_with_one_line(tmp_path: Path) -> None:
    weights = random_weights(SMALLEST, (2, 2), ("one", "two"))
    data = save(pretrained_files.timm(weights.params), {"mixer_jax": '{"gelu": "exact"}'})
    path = tmp_path / "model.safetensors"
    counts = {"loaded": 0, "rejected": 0}
    for damaged in fuzz(data, 2000, margin=400):
        path.write_bytes(damaged)
        result = load_or_error(path)
        if isinstance(result, str):
            assert "\n" not in result
            assert path.name in result
            counts["rejected"] += 1
        else:
            # The format has no checksum: the numbers are those of the damaged file.
            assert_params_equal(pretrained_files.timm(result.params), load(damaged))
            counts["loaded"] += 1
    assert counts["rejected"] > 1000
    assert counts["loaded"] > 10
