"""A suite that takes seconds, plans of suites, and a checkpoint to evaluate."""

from pathlib import Path
from typing import Any

from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.models.registry import get_family
from mixer_jax.suites.plan import TransferPlan
from mixer_jax.suites.tasks import FineTuneTask, ProbeTask, Suite
from tests.helpers.random_weights import random_weights, save_run

SETTINGS: dict[str, Any] = {
    "num_steps": 6,
    "warmup_steps": 1,
    "learning_rates": (0.01, 0.1),
    "batch_size": 32,
    "seeds": (0, 1),
    "is_large_image": False,
    "train_crop": "random_shift",
    "flip": False,
    "eval_crop": "resize",
    "config_overrides": {"preprocess.max_shift": 1},
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
    "probe",
    "digits/high",
    "few_shot",
    "train",
    "test",
    shots=(1, 5),
    seeds=(0, 1),
    is_large_image=False,
)
SUITE = Suite("tiny", "digits, quickly", (HIGH, LOW, PROBE))

# Metadata of a published checkpoint.
LARGE_INFO = ModelInfo(
    "mixer",
    "L/16",
    get_family("mixer").get_config("L/16"),
    (224, 224),
    21_843,
    (),
    gelu="tanh",
    eval_crop="shorter_side",
    exif_orientation=False,
    loss="sigmoid",
)
TINY_INFO = random_weights().model_info


def make_plan(
    suite: Suite = SUITE,
    image_size: int = 16,
    *,
    model_info: ModelInfo = TINY_INFO,
    checkpoint: str = "runs/a",
    data_dir: str = "",
    overrides: tuple[tuple[str, str], ...] = (),
    **fields: Any,
) -> TransferPlan:
    """Creates a plan with one image size for all tasks; `fields` as in `TransferPlan`."""
    sizes = {task.name: image_size for task in suite.tasks}
    return TransferPlan(suite, checkpoint, model_info, data_dir, overrides, sizes, **fields)


def save_weights(folder: Path) -> str:
    """Saves a tiny model's weights as a run; returns its workdir."""
    return save_run(random_weights(), folder / "weights")
