"""States and batches to measure with: random numbers, made faster than by training's own ways."""

import math
from typing import Any

import jax
import numpy as np

from mixer_jax.benchmarks.contestants import Setting


def make_batch(setting: Setting, count: int, device: Any) -> dict[str, jax.Array]:
    """Returns random images and labels on the device."""
    rng, size = np.random.default_rng(1), setting.image_size
    images = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    labels = rng.integers(0, setting.num_classes, (count,), np.int32)
    return {
        "image": jax.device_put(images, device),
        "label": jax.device_put(labels, device),
    }


def make_state(shapes: Any, device: Any) -> Any:
    """Returns parameters and optimizer moments as before the first step, on the device.

    Every kernel is random, the head's too, so that from the first step on everything changes.

    Args:
        shapes: of their arrays, in a tree.
        device: on which they are to be.
    """
    rng = np.random.default_rng(0)

    def make(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        values = np.zeros(shape.shape, np.float32)
        if "mu" not in names and "nu" not in names:
            if names[-1] == "kernel":
                fan_in = math.prod(shape.shape[:-1] if "stem" in names else shape.shape[-2:-1])
                values = rng.standard_normal(shape.shape, np.float32) / math.sqrt(fan_in)
            elif names[-1] == "scale":
                values = np.ones(shape.shape, np.float32)
        return jax.device_put(values.astype(shape.dtype), device)

    return jax.tree_util.tree_map_with_path(make, shapes)
