"""A test of a run that goes on with other numbers of devices, to the same end."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mixer_jax.training.beginning import begin
from mixer_jax.training.experiment import build, training_batches
from mixer_jax.training.loop import save
from mixer_jax.training.run_sources import open_sources
from mixer_jax.weights.checkpoint import Checkpoints
from tests.small_run import PLAIN, small_config

# Steps of a run, and what does them, all along or one after the other: devices, fsdp, steps.
STEPS = 12
SAME = [(8, 1, range(STEPS))]
CHANGING = [(8, 1, range(3)), (4, 2, range(3, 6)), (1, 1, range(6, 9)), (8, 1, range(9, STEPS))]
SETTINGS: dict[str, Any] = PLAIN | {"num_steps": STEPS, "model__dropout": 0.1}

History = list[tuple[str, float]]


def run(data_dir: str, workdir: Path, parts: list[tuple[int, int, range]]) -> History:
    """Trains in parts, from checkpoint to checkpoint; returns each step's examples and loss."""
    history = []
    for devices, fsdp, steps in parts:
        config = small_config(data_dir, **SETTINGS, mesh__fsdp=fsdp)
        experiment = build(config, open_sources(config), jax.devices()[:devices])
        checkpoints = Checkpoints(str(workdir), keep=1)
        assert (checkpoints.latest_step() or 0) == steps.start
        state, window = begin(experiment, checkpoints, steps.start, None)
        # What the journal has not written yet goes along.
        assert window == ([0.1, steps.start] if steps.start else [])
        batches = training_batches(experiment, steps.start, print)
        for _ in steps:
            batch = next(batches)
            rows = b"".join(np.asarray(batch[name]).tobytes() for name in sorted(batch))
            state, metrics = experiment.train_step(state, batch)
            history.append((hashlib.sha256(rows).hexdigest(), float(metrics["loss"])))
        batches.close()
        save(experiment, checkpoints, state, steps.stop, window=[0.1, steps.stop])
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
