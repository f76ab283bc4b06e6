"""Resuming, devices and microbatches over pairs of controls of a recipe, and of model families."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from mixer_jax.checkpoints.manager import CheckpointManager
from mixer_jax.config.schema import RunConfig
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.initialize import find_init_source, restore_or_init, save_state
from mixer_jax.training.setup import build_experiment, make_train_batches
from mixer_jax.training.step import TrainState
from tests.helpers.tiny_run import FAMILY_OVERRIDES, NO_REGULARIZATION, small_config

STEPS, SAVED_STEP = 6, 3
Settings = dict[str, Any]

AUGMENTATIONS: dict[str, Settings] = {
    "none": {},
    "mixup": {"recipe__mixup": 0.5},
    "cutmix": {"recipe__cutmix": 1.0},
    "switching": {"recipe__mixup": 0.5, "recipe__cutmix": 1.0},
    "erasing": {"preprocess__random_erasing": 0.5, "preprocess__random_erasing_mode": "pixel"},
}
OPTIMIZERS = ("adamw", "sgd", "lion", "lamb", "muon", "adafactor")
LOSSES = ("softmax", "sigmoid")
EMA_DECAYS = (0.0, 0.9)
CONTROLS: dict[str, Settings] = {
    "plain": {},
    "sam": {"optimizer__sam_rho": 0.1},
    "weighted": {
        "optimizer__layer_decay": 0.75,
        "optimizer__freeze": "*bias",
        "recipe__class_weights": "balanced",
    },
}
FAMILIES = tuple(FAMILY_OVERRIDES)


class Recipe(NamedTuple):
    """One choice of each kind."""

    augmentation: str
    optimizer: str
    loss: str
    ema_decay: float
    control: str
    family: str


# Each augmentation with each optimizer; the rest varies such that every pair of choices occurs.
RECIPES = [
    Recipe(
        augmentation,
        optimizer,
        LOSSES[(i + j) % 2],
        EMA_DECAYS[(i + j // 2) % 2],
        tuple(CONTROLS)[(i + 2 * j) % 3],
        FAMILIES[(i + j) % 3],
    )
    for i, augmentation in enumerate(AUGMENTATIONS)
    for j, optimizer in enumerate(OPTIMIZERS)
]


def test_recipes_have_every_pair_of_choices() -> None:
    kinds = (tuple(AUGMENTATIONS), OPTIMIZERS, LOSSES, EMA_DECAYS, tuple(CONTROLS), FAMILIES)
    for a, b in itertools.combinations(range(len(kinds)), 2):
        pairs = {(recipe[a], recipe[b]) for recipe in RECIPES}
        assert pairs == set(itertools.product(kinds[a], kinds[b]))


def train(
    config: RunConfig, num_devices: int, workdir: Path, save_at: int = 0
) -> tuple[TrainState, list[float]]:
    """Trains from the newest checkpoint, if any, to the end, and saves at one step."""
    experiment = build_experiment(config, open_datasets(config), jax.devices()[:num_devices])
    checkpoints = CheckpointManager(str(workdir), max_to_keep=1)
    init = find_init_source(config, str(workdir))
    state, _ = restore_or_init(experiment, checkpoints, init)
    losses = []
    for batch in make_train_batches(experiment, int(state.step), print):
        state, metrics = experiment.train_step(state, batch, experiment.hyperparams)
        losses.append(float(metrics["loss"]))
        if state.step == save_at:
            save_state(experiment, checkpoints, state, save_at, loss_window=[])
    checkpoints.close()
    return jax.device_get(state), losses


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: "-".join(map(str, recipe)))
def test_resuming_is_exact_and_devices_and_microbatches_change_only_rounding(
    recipe: Recipe, digits_dir: str, tmp_path: Path
) -> None:
    settings: Settings = {
        **NO_REGULARIZATION,
        **FAMILY_OVERRIDES[recipe.family],
        **AUGMENTATIONS[recipe.augmentation],
        **CONTROLS[recipe.control],
        "num_steps": STEPS,
        "optimizer__name": recipe.optimizer,
        "recipe__loss": recipe.loss,
        "recipe__ema_decay": recipe.ema_decay,
    }
    config = small_config(digits_dir, **settings)
    undisturbed, losses = train(config, 1, tmp_path, save_at=SAVED_STEP)
    resumed, last_losses = train(config, 1, tmp_path)
    assert last_losses == losses[SAVED_STEP:]
    assert (resumed.ema_params is not None) == (recipe.ema_decay > 0)
    for a, b in zip(jax.tree.leaves(undisturbed), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)

    config = small_config(digits_dir, **settings, mesh__fsdp=2, recipe__grad_accum_steps=2)
    _, sharded_losses = train(config, 4, tmp_path)
    np.testing.assert_allclose(sharded_losses, losses[SAVED_STEP:], rtol=1e-5)
