"""Tiny Mixers that are trained in seconds on images whose class depends on one place."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mixer_jax.checkpoints.weights import PretrainedWeights
from mixer_jax.models.mixer_config import MixerConfig
from tests.helpers.random_weights import random_weights


class PlantedTask(NamedTuple):
    """Images of noise, uint8, whose class is planted in them."""

    images: np.ndarray
    labels: np.ndarray


def corner_task(count: int, seed: int, size: int = 16, patch: int = 4) -> PlantedTask:
    """Makes noise whose lower right patch is bright (class 1) or dark (class 0)."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    labels = rng.integers(0, 2, count)
    images[:, -patch:, -patch:] = np.where(labels, 220, 35)[:, None, None, None]
    return PlantedTask(images, labels)


def halves_task(count: int, seed: int, size: int = 16) -> PlantedTask:
    """Makes noise that is brighter in the left, right, upper or lower half: classes 0 to 3."""
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 50, (count, size, size, 3)) + 127
    labels = rng.integers(0, 4, count)
    half = size // 2
    masks = np.zeros((4, size, size, 1))
    masks[0, :, :half] = masks[1, :, half:] = masks[2, :half] = masks[3, half:] = 1
    images += 60 * (masks[labels] - 0.5)
    return PlantedTask(images.clip(0, 255).astype(np.uint8), labels)


def initial_weights(config: MixerConfig, num_classes: int, size: int = 16) -> PretrainedWeights:
    """Initializes a Mixer as for training."""
    names = tuple(f"class {index}" for index in range(num_classes))
    weights = random_weights(config, (size, size), names, dtype="float32")
    model = weights.model_info.build_model()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
    return weights._replace(params=jax.tree.map(np.asarray, params))


def train(
    weights: PretrainedWeights, task: PlantedTask, *, num_steps: int, weight_decay: float = 0.0
) -> PretrainedWeights:
    """Trains weights with AdamW on batches of 64 images."""
    model = weights.model_info.build_model()
    tx = optax.adamw(3e-3, weight_decay=weight_decay)
    inputs, labels = jnp.asarray(task.images) / 127.5 - 1, jnp.asarray(task.labels)

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, inputs[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def step(index: int, state: tuple[Any, Any]) -> tuple[Any, Any]:
        params, opt_state = state
        rows = jax.random.choice(jax.random.key(index), len(labels), (64,))
        updates, opt_state = tx.update(jax.grad(loss)(params, rows), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def run(params: Any) -> Any:
        return jax.lax.fori_loop(0, num_steps, step, (params, tx.init(params)))[0]

    return weights._replace(params=jax.tree.map(np.asarray, jax.jit(run)(weights.params)))
