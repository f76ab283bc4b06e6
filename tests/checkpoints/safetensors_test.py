"""Tests of safetensors files that are damaged, or made to do harm."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load, save

from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.errors import UserError
from tests.helpers import pretrained_files
from tests.helpers.corrupt_files import (
    SMALLEST,
    assert_rejected,
    fuzz,
    load_or_error,
    refusals_in_little_memory,
)
from tests.helpers.messages import mentions
from tests.helpers.pretrained_files import safetensors_bytes
from tests.helpers.random_weights import assert_params_equal, random_weights

STEM = "stem.proj.weight"


def content(metadata: dict[str, str] | None = None, **changes: Any) -> bytes:
    """A good file with some tensors changed, or left out if they are None."""
    tensors = pretrained_files.timm(random_weights().params) | changes
    return save({name: t for name, t in tensors.items() if t is not None}, metadata)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_of(tensors: dict[str, Any], data: bytes = b"") -> bytes:
    return safetensors_bytes(json.dumps(tensors).encode(), data)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_numbers_of_any_floating_type_are_read(dtype: Any, tmp_path: Path) -> None:
    tensors = pretrained_files.timm(random_weights().params)
    given = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    path = write(tmp_path / "model.safetensors", save(given))
    found = pretrained_files.timm(load_checkpoint(str(path)).params)
    assert_params_equal(found, {name: tensor.astype(np.float32) for name, tensor in given.items()})


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
def test_a_tensor_that_is_not_as_it_should_be_is_named(case: str, tmp_path: Path) -> None:
    changes, parts = BAD_TENSORS[case]
    assert mentions(
        assert_rejected(write(tmp_path / "model.safetensors", content(**changes))), *parts
    )


def test_what_announces_more_than_it_holds_costs_no_memory(tmp_path: Path) -> None:
    good = content()
    files = {
        "terabytes": file_of({STEM: tensor([10**6, 10**6], 0, 4 * 10**12)}, bytes(100)),
        "terabytes in few bytes": file_of({STEM: tensor([10**6, 10**6], 0, 100)}, bytes(100)),
        "overlapping": file_of(
            {STEM: tensor([4], 0, 16), "norm.bias": tensor([4], 8, 24)}, bytes(24)
        ),
        "long header": safetensors_bytes(b"{}", length=2**60),
        "long header in a whole file": (2**60).to_bytes(8, "little") + good[8:],
        "empty and huge": file_of({STEM: tensor([2**62, 0, 3, 2**62], 0, 0)}),
        "empty": b"",
        "text": b"these are no weights, and that in many words\n",
        "no JSON": safetensors_bytes(b"{not JSON}"),
        "another JSON": safetensors_bytes(b"[1, 2, 3]"),
        "deep JSON": safetensors_bytes(b"[" * 100_000),
        "no tensors": safetensors_bytes(b"{}"),
    }
    files |= {f"{tenth} tenths": good[: len(good) * tenth // 10] for tenth in range(10)}
    refusals_in_little_memory(files, tmp_path, ".safetensors")


@pytest.mark.parametrize("said", ["{", "[1, 2]", '"gelu"', '["gelu"]', "[" * 100_000])
def test_a_header_that_says_no_json_is_refused(said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", content({"mixer_jax": said}))
    assert mentions(assert_rejected(path), "mixer_jax", "JSON")


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ("{", ["config.json", "JSON"]),
        ('{"crop_pct": 0.9}', ["crop_pct", "0.9"]),
        ('{"pretrained_cfg": {"interpolation": "nearest"}}', ["interpolation", "nearest"]),
        ('{"interpolation": ["bicubic"]}', ["interpolation", "['bicubic']"]),
        ('{"mean": [0.5, 0.5]}', ["mean", "[0.5, 0.5]"]),
        ('{"std": [0.5, 0.5, 0]}', ["std", "[0.5, 0.5, 0]"]),
        ('{"mean": [0, 0, NaN]}', ["mean", "[0, 0, nan]"]),
        ('{"std": "wide"}', ["std", "wide"]),
        ('{"label_names": ["one"]}', ["10", "1"]),
        ('{"label_names": {"0": "one", "7": "two"}}', ["class_names"]),
    ],
)
def test_a_config_that_cannot_be_so_is_refused(
    config: str, parts: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path / "model.safetensors", content())
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError) as caught:
        load_checkpoint(str(path))
    # The path may have numbers in it.
    message = str(caught.value).replace(str(tmp_path), "")
    assert mentions(message, *parts)
    assert "\n" not in message


def test_another_crop_can_be_said_in_place_of_the_configs(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", content())
    names = [f"class {label}" for label in range(10)]
    numbered = {str(label): name for label, name in enumerate(names)}
    for given in (names, numbered):
        config = {"pretrained_cfg": {"crop_pct": 0.9}, "label_names": given}
        (tmp_path / "config.json").write_text(json.dumps(config))
        about = load_checkpoint(str(path), eval_crop="square").model_info
        assert (about.eval_crop, list(about.class_names)) == ("square", names)


def test_no_damage_ends_otherwise_than_in_one_line(tmp_path: Path) -> None:
    weights = random_weights(SMALLEST, (2, 2), ("one", "two"))
    data = save(pretrained_files.timm(weights.params), {"mixer_jax": '{"gelu": "exact"}'})
    path = tmp_path / "model.safetensors"
    outcomes = {"loaded": 0, "refused": 0}
    for damaged in fuzz(data, 2000, ends=400):
        path.write_bytes(damaged)
        found = load_or_error(path)
        if isinstance(found, str):
            assert "\n" not in found
            assert path.name in found
            outcomes["refused"] += 1
        else:
            # The format has no checksum: what is read is what the file says.
            assert_params_equal(pretrained_files.timm(found.params), load(damaged))
            outcomes["loaded"] += 1
    assert outcomes["refused"] > 1000
    assert outcomes["loaded"] > 10
