"""Weights drawn at random, biases and norms too, for tests of what is done with weights."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from mixer_jax.checkpoints import tree
from mixer_jax.checkpoints.load import PretrainedWeights
from mixer_jax.checkpoints.manager import CheckpointManager
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.models.mixer_config import MixerConfig, param_shapes
from mixer_jax.models.registry import get_family

TINY = MixerConfig(num_blocks=2, patch_size=4, hidden_dim=16, tokens_mlp_dim=8, channels_mlp_dim=24)
DIGITS = tuple(str(digit) for digit in range(10))


def random_weights(
    widths: MixerConfig = TINY,
    image_size: tuple[int, int] = (16, 16),
    class_names: tuple[str, ...] = DIGITS,
    seed: int = 0,
    **about: Any,
) -> PretrainedWeights:
    """Weights of a small Mixer; `about` in place of fields of `ModelInfo`."""
    height, width = image_size
    told = {"gelu": "tanh", "eval_crop": "resize", "exif_orientation": False, "loss": "softmax"}
    made = ModelInfo(
        "mixer",
        get_family("mixer").infer_variant(widths),
        widths,
        image_size=image_size,
        **{"num_classes": len(class_names), "class_names": class_names, **told, **about},
    )
    tokens = (height // widths.patch_size) * (width // widths.patch_size)
    rng = np.random.default_rng(seed)
    shapes = param_shapes(widths, tokens, made.num_classes)
    flat = {
        path: (rng.normal(0.0, 0.3, shape) + path.endswith("scale")).astype(np.float32)
        for path, shape in shapes.items()
    }
    return PretrainedWeights(tree.unflatten(flat), made)


def save_run(weights: PretrainedWeights, workdir: Path, step: int = 1, **metadata: Any) -> str:
    """Saves weights as a run would, and returns its name."""
    checkpoints = CheckpointManager(str(workdir), max_to_keep=1)
    about = {"model_info": weights.model_info.to_dict(), "ema": False, **metadata}
    checkpoints.save(step, {"params": weights.params}, about)
    checkpoints.close()
    return str(workdir)


def assert_params_equal(ours: Any, theirs: Any) -> None:
    """Asserts that two trees have the same arrays, bit for bit."""
    ours, theirs = dict(tree.flatten(ours)), dict(tree.flatten(theirs))
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(theirs[path]), err_msg=path)


def tree_norm(tree: Any) -> float:
    """Returns the global norm of a tree's arrays, in float64."""
    squares = (np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree))
    return float(np.sqrt(sum(squares)))
