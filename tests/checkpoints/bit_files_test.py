"""Tests of BiT's published layouts, written here as the files are, and of their conversion."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixer_jax import convert
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.weights import flatten_params
from mixer_jax.cli import common
from mixer_jax.errors import UserError
from mixer_jax.inference import load_pretrained
from mixer_jax.models.bit_config import BitConfig
from mixer_jax.models.registry import get_family
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import assert_params_equal

# Units of the blocks, and channels of the root.
UNITS, WIDTH = (2, 1), 4
CONFIG = BitConfig("2,1", WIDTH)
Tensors = dict[str, Any]


@pytest.fixture(autouse=True)
def keep_jax_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process do not change the test suite's JAX config."""
    monkeypatch.setattr(common, "configure_jax", lambda compilation_cache, cpu_only: None)


def google_shapes(num_classes: int = 3) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of a published npz."""
    shapes: dict[str, tuple[int, ...]] = {
        "resnet/root_block/standardized_conv2d/kernel": (7, 7, 3, WIDTH)
    }
    inputs = WIDTH
    for block, num_units in enumerate(UNITS, 1):
        middle = WIDTH * 2 ** (block - 1)
        for unit in range(1, num_units + 1):
            name = f"resnet/block{block}/unit{unit:02}"
            kernels = {
                "a": (1, 1, inputs, middle),
                "b": (3, 3, middle, middle),
                "c": (1, 1, middle, 4 * middle),
            }
            for branch, shape in kernels.items():
                shapes[f"{name}/{branch}/group_norm/gamma"] = shape[2:3]
                shapes[f"{name}/{branch}/group_norm/beta"] = shape[2:3]
                shapes[f"{name}/{branch}/standardized_conv2d/kernel"] = shape
            if unit == 1:
                shape = (1, 1, inputs, 4 * middle)
                shapes[f"{name}/a/proj/standardized_conv2d/kernel"] = shape
            inputs = 4 * middle
    shapes |= {f"resnet/group_norm/{leaf}": (inputs,) for leaf in ("gamma", "beta")}
    head = {"kernel": (1, 1, inputs, num_classes), "bias": (num_classes,)}
    return shapes | {f"resnet/head/conv2d/{leaf}": shape for leaf, shape in head.items()}


def google_tensors(num_classes: int = 3) -> Tensors:
    """Returns random tensors with the names of a published npz."""
    rng, shapes = np.random.default_rng(0), google_shapes(num_classes)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def timm_tensors(tensors: Tensors) -> Tensors:
    """Returns the same tensors with timm's names and axes."""
    renamed = {}
    for name, array in tensors.items():
        parts = name.removeprefix("resnet/").split("/")
        leaf = {"beta": "bias", "bias": "bias"}.get(parts[-1], "weight")
        if parts[0].startswith("block"):
            block, unit = int(parts[0][5:]) - 1, int(parts[1][4:]) - 1
            kind = "norm" if parts[-2] == "group_norm" else "conv"
            layer = kind + {"a": "1", "b": "2", "c": "3"}[parts[2]]
            layer = "downsample.conv" if parts[3] == "proj" else layer
            layer = f"stages.{block}.blocks.{unit}.{layer}"
        else:
            layer = {"root_block": "stem.conv", "group_norm": "norm", "head": "head.fc"}[parts[0]]
        axes = (3, 2, 0, 1) if array.ndim == 4 else (0,)
        renamed[f"{layer}.{leaf}"] = np.ascontiguousarray(array.transpose(axes))
    return renamed


def assert_tensors_equal(actual: Tensors, expected: Tensors) -> None:
    assert {n: a.shape for n, a in actual.items()} == {n: a.shape for n, a in expected.items()}
    for name, array in actual.items():
        np.testing.assert_array_equal(array.view(np.uint32), expected[name].view(np.uint32))


@pytest.mark.parametrize("num_classes", [3, 1])
def test_npz_round_trip(num_classes: int, tmp_path: Path) -> None:
    tensors = google_tensors(num_classes)
    np.savez(tmp_path / "BiT.npz", **tensors)
    assert convert.main([f"{tmp_path}/BiT.npz", f"{tmp_path}/ours"]) == 0
    assert convert.main([f"{tmp_path}/ours", f"{tmp_path}/again.npz"]) == 0
    with np.load(tmp_path / "again.npz") as archive:
        assert_tensors_equal(dict(archive), tensors)


def test_timm_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tensors = timm_tensors(google_tensors())
    save_file(tensors, tmp_path / "timm.safetensors")
    assert convert.main([f"{tmp_path}/timm.safetensors", f"{tmp_path}/ours"]) == 0
    assert convert.main([f"{tmp_path}/ours", f"{tmp_path}/google.npz"]) == 0
    with np.load(tmp_path / "google.npz") as archive:
        assert_tensors_equal(dict(archive), google_tensors())
    assert convert.main([f"{tmp_path}/google.npz", f"{tmp_path}/again.safetensors"]) == 0
    assert_tensors_equal(load_file(tmp_path / "again.safetensors"), tensors)
    # timm has no model of these widths.
    assert mentions(capsys.readouterr().out.splitlines()[-1], "mixer_jax.predict")


def test_both_layouts_are_recognized(tmp_path: Path) -> None:
    tensors = google_tensors()
    np.savez(tmp_path / "BiT.npz", **tensors)
    save_file(timm_tensors(tensors), tmp_path / "timm.safetensors")
    loaded = load_checkpoint(tmp_path / "BiT.npz")
    info = loaded.model_info
    assert (info.family, info.config, info.variant) == ("bit", CONFIG, "custom")
    assert (info.num_classes, info.image_size, info.eval_crop) == (3, (224, 224), "resize")
    flat = dict(flatten_params(loaded.params))
    shapes = {path: array.shape for path, array in flat.items()}
    assert shapes == get_family("bit").param_shapes(CONFIG, 224, 3)
    kernel = tensors["resnet/block2/unit01/a/proj/standardized_conv2d/kernel"]
    np.testing.assert_array_equal(flat["block2/unit01/conv_proj/kernel"], kernel)
    from_timm = load_checkpoint(tmp_path / "timm.safetensors")
    assert_params_equal(from_timm.params, loaded.params)
    crop = from_timm.model_info.eval_crop, from_timm.model_info.eval_crop_fraction
    assert crop == ("bilinear", 0.875)
    # The weights fit any image size, and are used at it.
    images = np.random.default_rng(1).uniform(-1, 1, (2, 9, 12, 3)).astype(np.float32)
    assert load_pretrained(tmp_path / "BiT.npz", image_size=(9, 12))(images).shape == (2, 3)


def test_numbered_layers_are_the_same(tmp_path: Path) -> None:
    tensors = google_tensors()
    numbered = {
        name.replace("standardized_conv2d/", f"standardized_conv2d_{i}/"): array
        for i, (name, array) in enumerate(tensors.items())
    }
    np.savez(tmp_path / "plain.npz", **tensors)
    np.savez(tmp_path / "numbered.npz", **numbered)
    expected, actual = (load_checkpoint(tmp_path / f"{n}.npz") for n in ("plain", "numbered"))
    assert_params_equal(actual.params, expected.params)


@pytest.mark.parametrize(
    "name", ["block1/unit02/a", "block1/unit01/a/proj", "block2/unit01/c", "root_block"]
)
def test_missing_kernel_is_an_error(name: str, tmp_path: Path) -> None:
    tensors = google_tensors()
    del tensors[f"resnet/{name}/standardized_conv2d/kernel"]
    np.savez(tmp_path / "BiT.npz", **tensors)
    with raises(UserError, "BiT.npz"):
        load_checkpoint(tmp_path / "BiT.npz")


def test_contradicting_shape_is_an_error(tmp_path: Path) -> None:
    tensors = google_tensors()
    name = "resnet/block1/unit02/b/standardized_conv2d/kernel"
    tensors[name] = tensors[name][:, :, :, :-1]
    np.savez(tmp_path / "BiT.npz", **tensors)
    with raises(UserError, name, "3"):
        load_checkpoint(tmp_path / "BiT.npz")


def test_other_normalization_cannot_be_folded_into_the_root(tmp_path: Path) -> None:
    save_file(timm_tensors(google_tensors()), tmp_path / "model.safetensors")
    config: dict[str, Any] = {"mean": [0.485, 0.456, 0.406], "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": config}))
    with raises(UserError, "mean", "std", "0.5", "0.485"):
        load_checkpoint(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.5] * 3}}))
    load_checkpoint(tmp_path / "model.safetensors")
