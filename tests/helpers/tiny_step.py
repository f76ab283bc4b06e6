"""Tiny models of each family and a batch of images, for tests of the training step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixer_jax.models.registry import create_model, get_family

NUM_CLASSES = 3
# Regularizers with random masks, where a family has them.
_MASKS: dict[str, Any] = {"dropout": 0.3, "stochastic_depth": 0.5}
REGULARIZERS = {"mixer": _MASKS, "vit": _MASKS, "bit": {}}


def make_model(num_blocks: int = 1, family: str = "mixer", **overrides: Any) -> Any:
    """Makes a model for images of 8 pixels."""
    blocks: dict[str, Any] = {"num_blocks": num_blocks, "patch_size": 4, "hidden_dim": 8}
    architecture: dict[str, Any] = {
        "mixer": blocks | {"tokens_mlp_dim": 8, "channels_mlp_dim": 8},
        "vit": blocks | {"mlp_dim": 16, "num_heads": 2},
        "bit": {"units": "1,1", "root_width": 8, "root": "3x3"},
    }[family]
    name = get_family(family).full_name("custom")
    return create_model(name, NUM_CLASSES, **architecture, **overrides)


def make_batch(n: int = 8) -> dict[str, jax.Array]:
    """Makes a batch of images of 8 pixels, with the labels 0, 1, 2, 0, 1 and so on."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    return {"image": jnp.asarray(images), "label": jnp.arange(n, dtype=jnp.int32) % NUM_CLASSES}


def assert_trees_equal(a: Any, b: Any, tolerance: float = 0.0) -> None:
    """Checks that two trees have equal arrays, up to a tolerance."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
