"""Random weights, biases and scales included, in memory and in files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mixer_jax.checkpoints.formats import write_npz, write_safetensors
from mixer_jax.checkpoints.layouts import layout_tensors
from mixer_jax.checkpoints.manager import CheckpointManager
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.weights import PretrainedWeights, flatten_params, unflatten_params
from mixer_jax.models.mixer_config import MixerConfig
from mixer_jax.models.registry import FAMILIES, get_family

TINY = MixerConfig(num_blocks=2, patch_size=4, hidden_dim=16, tokens_mlp_dim=8, channels_mlp_dim=24)
DIGITS = tuple(str(digit) for digit in range(10))


def random_weights(
    config: Any = TINY,
    image_size: tuple[int, int] = (16, 16),
    class_names: tuple[str, ...] = DIGITS,
    seed: int = 0,
    **fields: Any,
) -> PretrainedWeights:
    """Creates random weights of the family of `config`; `fields` override those of `ModelInfo`."""
    (family,) = (f for f in FAMILIES.values() if type(config) is f.config_class)
    defaults = {"gelu": "tanh", "eval_crop": "resize", "exif_orientation": False, "loss": "softmax"}
    defaults |= {"num_classes": len(class_names), "class_names": class_names}
    model_info = ModelInfo(
        family.name,
        family.infer_variant(config),
        config,
        image_size=image_size,
        **{**defaults, **fields},
    )
    rng = np.random.default_rng(seed)
    shapes = family.param_shapes(config, image_size, model_info.num_classes)
    flat = {
        path: (rng.normal(0.0, 0.3, shape) + path.endswith("scale")).astype(np.float32)
        for path, shape in shapes.items()
    }
    return PretrainedWeights(unflatten_params(flat), model_info)


def save_run(
    weights: PretrainedWeights, workdir: Path, step: int = 1, keep: int = 1, **metadata: Any
) -> str:
    """Saves weights as a checkpoint of a run, and returns its workdir."""
    checkpoints = CheckpointManager(str(workdir), max_to_keep=keep)
    metadata = {"model_info": weights.model_info.to_dict(), "ema": False, **metadata}
    checkpoints.save(step, {"params": weights.params}, metadata)
    checkpoints.close()
    return str(workdir)


def save_npz(
    weights: PretrainedWeights, path: Path | str, metadata: dict[str, Any] | None = None
) -> str:
    """Saves weights with Google's names, and returns the path. By default without metadata."""
    write_npz(str(path), _tensors(weights, "Google"), metadata or {})
    return str(path)


def save_safetensors(
    weights: PretrainedWeights, path: Path | str, metadata: dict[str, Any] | None = None
) -> str:
    """Saves weights with timm's names, and returns the path. By default without metadata."""
    write_safetensors(str(path), _tensors(weights, "timm"), metadata or {})
    return str(path)


def _tensors(weights: PretrainedWeights, name: str) -> Iterator[tuple[str, np.ndarray]]:
    layouts = get_family(weights.model_info.family).weight_layouts()
    (layout,) = (layout for layout in layouts if layout.name == name)
    return layout_tensors(dict(flatten_params(weights.params)), layout)


def assert_params_equal(actual: Any, expected: Any) -> None:
    """Asserts that two trees have the same arrays, bit for bit."""
    actual, expected = dict(flatten_params(actual)), dict(flatten_params(expected))
    assert actual.keys() == expected.keys()
    for path, array in actual.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[path]), err_msg=path)


def tree_norm(tree: Any) -> float:
    """Returns the global norm of a tree's arrays, in float64."""
    squares = (np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree))
    return float(np.sqrt(sum(squares)))
