"""Tiny Mixers and random parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixer_jax.models.mixer import MlpMixer
from mixer_jax.models.mixer_config import MixerConfig
from mixer_jax.models.registry import create_model

TINY_CONFIG = MixerConfig(
    num_blocks=3, patch_size=4, hidden_dim=8, tokens_mlp_dim=6, channels_mlp_dim=10
)


def tiny_mixer(num_classes: int = 5, **overrides: Any) -> MlpMixer:
    """Creates a Mixer of `TINY_CONFIG`; `overrides` as for `create_model`."""
    return create_model("custom", num_classes, **{**vars(TINY_CONFIG), **overrides})


def param_shapes(model: Any, height: int = 16, width: int = 0) -> Any:
    """Returns the tree of a model's parameter shapes; images are square if `width` is 0."""
    images = jnp.zeros((1, height, width or height, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images))["params"]


def random_params(model: Any, height: int = 16, width: int = 0) -> Any:
    """Returns parameters none of which is zero, so that every one of them matters."""
    rng = np.random.default_rng(0)
    shapes = param_shapes(model, height, width)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)


def random_images(batch_size: int = 2, size: int = 16) -> jax.Array:
    """Returns images with pixels in [-1, 1]."""
    return jax.random.uniform(jax.random.key(1), (batch_size, size, size, 3), minval=-1, maxval=1)
