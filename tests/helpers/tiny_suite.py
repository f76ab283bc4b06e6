"""A suite that takes seconds, and weights to judge by it."""

from pathlib import Path
from typing import Any

from mixer_jax.suites.tasks import FineTuneTask, ProbeTask, Suite
from tests.helpers.random_weights import random_weights, save_run

SETTINGS: dict[str, Any] = {
    "num_steps": 6,
    "warmup_steps": 1,
    "learning_rates": (0.01, 0.1),
    "batch_size": 32,
    "seeds": (0, 1),
    "large": False,
    "train_crop": "random_shift",
    "flip": False,
    "eval_crop": "resize",
    "changes": {"preprocess.max_shift": 1},
}
HIGH = FineTuneTask(
    "high",
    "digits/high",
    5,
    "train[:90%]",
    "train[90%:]",
    "train",
    "test",
    (656, 73, 729, 167),
    **SETTINGS,
)
LOW = FineTuneTask(
    "low",
    "digits/low",
    5,
    "train[:90%]",
    "train[90%:]",
    "train",
    "test",
    (),
    **{**SETTINGS, "seeds": (0,), "learning_rates": (0.03,)},
)
PROBE = ProbeTask(
    "probe", "digits/high", "few_shot", "train", "test", shots=(1, 5), seeds=(0, 1), large=False
)
SUITE = Suite("small", "digits, quickly", (HIGH, LOW, PROBE))


def save_weights(folder: Path) -> str:
    """Saves a tiny model's weights as a run, and returns its name."""
    return save_run(random_weights(), folder / "weights")
