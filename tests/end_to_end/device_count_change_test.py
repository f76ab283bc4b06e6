"""Test of a run that is resumed on different numbers of devices."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax.checkpoints.manager import CheckpointManager
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.initialize import find_init_source, restore_or_init, save_state
from mixer_jax.training.setup import build_experiment, make_train_batches
from tests.helpers.tiny_run import (
    FAMILY_OVERRIDES,
    NO_REGULARIZATION,
    OPTIMIZER_OVERRIDES,
    small_config,
)

pytestmark = pytest.mark.slow

STEPS = 12
# Number of devices, fsdp, and the steps that they compute.
CONSTANT = [(8, 1, range(STEPS))]
CHANGING = [(8, 1, range(3)), (4, 2, range(3, 6)), (1, 1, range(6, 9)), (8, 1, range(9, STEPS))]
SETTINGS: dict[str, Any] = NO_REGULARIZATION | {"num_steps": STEPS, "model__dropout": 0.1}

# Hash of the examples, and loss, per step.
History = list[tuple[str, float]]


def run(
    data_dir: str, workdir: Path, layouts: list[tuple[int, int, range]], overrides: dict[str, Any]
) -> History:
    """Trains on one layout of devices after the other, each from the checkpoint of the last."""
    history = []
    for num_devices, fsdp, steps in layouts:
        config = small_config(data_dir, **SETTINGS | overrides, mesh__fsdp=fsdp)
        experiment = build_experiment(config, open_datasets(config), jax.devices()[:num_devices])
        init = find_init_source(config, str(workdir))
        assert (init.resume_step if init else 0) == steps.start
        checkpoints = CheckpointManager(str(workdir), max_to_keep=1)
        state, window = restore_or_init(experiment, checkpoints, init)
        # Losses that are not logged yet are part of the checkpoint.
        assert window == ([0.1, steps.start] if steps.start else [])
        batches = make_train_batches(experiment, steps.start, print)
        for _ in steps:
            batch = next(batches)
            examples = b"".join(np.asarray(batch[name]).tobytes() for name in sorted(batch))
            state, metrics = experiment.train_step(state, batch, experiment.hyperparams)
            history.append((hashlib.sha256(examples).hexdigest(), float(metrics["loss"])))
        batches.close()
        save_state(experiment, checkpoints, state, steps.stop, loss_window=[0.1, steps.stop])
        checkpoints.close()
    return history


@pytest.mark.parametrize("name", [*FAMILY_OVERRIDES, *OPTIMIZER_OVERRIDES])
def test_the_number_of_devices_changes_neither_examples_nor_losses(
    digits_dir: str, tmp_path: Path, name: str
) -> None:
    overrides = (FAMILY_OVERRIDES | OPTIMIZER_OVERRIDES)[name]
    if name == "frozen":
        overrides = overrides | {"model__num_blocks": 2}
    expected = run(digits_dir, tmp_path / "constant", CONSTANT, overrides)
    actual = run(digits_dir, tmp_path / "changing", CHANGING, overrides)
    assert [examples for examples, _ in actual] == [examples for examples, _ in expected]
    assert len({examples for examples, _ in expected}) == STEPS
    np.testing.assert_allclose(
        [loss for _, loss in actual], [loss for _, loss in expected], rtol=1e-5
    )
