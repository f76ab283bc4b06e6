"""A test of a run that goes on with other numbers of devices, to the same end."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mixer_jax.checkpoints.manager import CheckpointManager
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.initialize import restore_or_init
from mixer_jax.training.loop import save
from mixer_jax.training.setup import build_experiment, make_train_batches
from tests.helpers.tiny_run import NO_REGULARIZATION, small_config

# Steps of a run, and what does them, all along or one after the other: devices, fsdp, steps.
STEPS = 12
SAME = [(8, 1, range(STEPS))]
CHANGING = [(8, 1, range(3)), (4, 2, range(3, 6)), (1, 1, range(6, 9)), (8, 1, range(9, STEPS))]
SETTINGS: dict[str, Any] = NO_REGULARIZATION | {"num_steps": STEPS, "model__dropout": 0.1}

History = list[tuple[str, float]]


def run(data_dir: str, workdir: Path, parts: list[tuple[int, int, range]]) -> History:
    """Trains in parts, from checkpoint to checkpoint; returns each step's examples and loss."""
    history = []
    for devices, fsdp, steps in parts:
        config = small_config(data_dir, **SETTINGS, mesh__fsdp=fsdp)
        experiment = build_experiment(config, open_datasets(config), jax.devices()[:devices])
        checkpoints = CheckpointManager(str(workdir), max_to_keep=1)
        assert (checkpoints.latest_step() or 0) == steps.start
        state, window = restore_or_init(experiment, checkpoints, steps.start, None)
        # What the journal has not written yet goes along.
        assert window == ([0.1, steps.start] if steps.start else [])
        batches = make_train_batches(experiment, steps.start, print)
        for _ in steps:
            batch = next(batches)
            rows = b"".join(np.asarray(batch[name]).tobytes() for name in sorted(batch))
            state, metrics = experiment.train_step(state, batch)
            history.append((hashlib.sha256(rows).hexdigest(), float(metrics["loss"])))
        batches.close()
        save(experiment, checkpoints, state, steps.stop, loss_window=[0.1, steps.stop])
        checkpoints.close()
    return history


def test_devices_may_come_and_go(digits_dir: str, tmp_path: Path) -> None:
    expected = run(digits_dir, tmp_path / "same", SAME)
    actual = run(digits_dir, tmp_path / "changing", CHANGING)
    # The same images, augmented and in order.
    assert [rows for rows, _ in actual] == [rows for rows, _ in expected]
    assert len({rows for rows, _ in expected}) == STEPS
    np.testing.assert_allclose(
        [loss for _, loss in actual], [loss for _, loss in expected], rtol=1e-5
    )
