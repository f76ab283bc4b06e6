"""The runs of a fine-tuning task, as configurations: those that choose its rate, and the final."""

from typing import NamedTuple

from ml_collections import ConfigDict

from mixer_jax import config as config_lib
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.config.config import validate
from mixer_jax.config.loading import Overrides, set_override
from mixer_jax.config.schema import NAMED_SECTIONS, get_field
from mixer_jax.errors import UserError
from mixer_jax.models.family import INIT_FROM
from mixer_jax.suites.tasks import FineTuneTask, Suite

# Evaluations of choosing and of final runs.
VALIDATION, TEST = "validation", "test"
_MOST_STEPS_BETWEEN_CHECKPOINTS = 1_000
# Images a step of a probe.
_PROBE_BATCH_SIZE = 256
# What a suite sets for each of its runs.
_NOT_TO_BE_CHANGED = (
    "seed",
    "num_epochs",
    "image_size",
    "init_from",
    "model.variant",
    "dataset.name",
    "dataset.data_dir",
    "dataset.train_split",
    "optimizer.learning_rate",
)


class SuiteSettings(NamedTuple):
    """What all runs of a suite have in common.

    Attributes:
        checkpoint: the weights they begin with, as `config.init_from`.
        about: what these say of themselves.
        data_dir: where TFDS keeps its data sets.
        overrides: keys that the user changes.
    """

    checkpoint: str
    about: ModelInfo
    data_dir: str = ""
    overrides: Overrides = ()

    @property
    def protocol_overrides(self) -> Overrides:
        """Those of the overrides that change what comes out, each key once."""
        return tuple(
            (path, text) for path, text in dict(self.overrides).items() if not is_resumable(path)
        )

    def config(self) -> ConfigDict:
        """Returns the keys of what is no run, as `default_config`."""
        return default_config(self.overrides)


class Run(NamedTuple):
    """A run of `training.loop.train_and_evaluate`.

    Attributes:
        folder: of the run, in that of its suite.
        config: of the run.
    """

    folder: str
    config: ConfigDict


def sweep_runs(task: FineTuneTask, image_size: int, setting: SuiteSettings) -> dict[float, Run]:
    """Returns the runs among which a learning rate is chosen, by that; none if there is one rate.

    Args:
        task: to choose for.
        image_size: in pixels.
        setting: of the suite.

    Raises:
        UserError: a key that the user or the task changes does not exist, or breaks a rule.
    """
    if len(task.learning_rates) == 1:
        return {}
    runs = {}
    for rate in task.learning_rates:
        evals = {VALIDATION: {"split": task.validation_split}}
        config = _make(task, image_size, setting, task.choose_split, rate, task.seeds[0], evals)
        runs[rate] = Run(f"{task.name}/choose/learning_rate={rate:g}", config)
    return runs


def final_runs(
    task: FineTuneTask, image_size: int, setting: SuiteSettings, learning_rate: float
) -> dict[int, Run]:
    """Returns the runs that are scored on the test split, by their seeds.

    Args:
        task: to run.
        image_size: in pixels.
        setting: of the suite.
        learning_rate: that was chosen.

    Raises:
        UserError: as `sweep_runs`.
    """
    evals = {TEST: {"split": task.test_split}}
    for name, (dataset, split) in task.also.items():
        evals[name] = {"dataset": dataset, "split": split}
    runs = {}
    for seed in task.seeds:
        config = _make(task, image_size, setting, task.train_split, learning_rate, seed, evals)
        runs[seed] = Run(f"{task.name}/final/seed={seed}", config)
    return runs


def eval_crop(task: FineTuneTask, image_size: int, about: ModelInfo) -> str:
    """Returns the evaluation crop of a task: its own, or that of the paper's tables.

    Table 3 resizes the shorter side, and Table 2, where images are larger than those that the
    weights are for, both sides.

    Args:
        task: that is scored.
        image_size: in pixels.
        about: what the weights say of themselves.
    """
    return task.eval_crop or ("shorter_side" if image_size <= about.image_size[0] else "square")


def default_config(overrides: Overrides) -> ConfigDict:
    """Returns the defaults with the user's keys: what probes and the program itself go by.

    Args:
        overrides: keys that the user changes.

    Raises:
        UserError: a key does not exist, or its value is not of its type.
    """
    config = config_lib.get_default()
    config.eval_batch_size = _PROBE_BATCH_SIZE
    for path, text in overrides:
        set_override(config, path, text)
    return config


def is_resumable(path: str) -> bool:
    """Returns whether a key may differ between starts without harm to what comes out."""
    key = get_field(path)
    return key is not None and key.resumable


def check_overrides(overrides: Overrides) -> None:
    """Checks the user's keys, as far as that can be done without weights.

    Raises:
        UserError: a key does not exist, its value cannot be, or a suite sets it for each run.
    """
    for path, value in overrides:
        if _is_set_by_suites(path):
            raise UserError(
                f"--config.{path}={value}: a suite sets {path} itself, for each of its runs; see "
                "--help, or write a suite of your own"
            )
    _check_values(overrides)


def check_task_overrides(suite: Suite) -> None:
    """Checks the keys that tasks change, like `check_overrides`.

    Raises:
        UserError: as there, naming the task.
    """
    for task in suite.tasks:
        changes = task.changes if isinstance(task, FineTuneTask) else {}
        for path in changes:
            if _is_set_by_suites(path):
                raise UserError(
                    f"task {task.name}: changes has {path!r}, which a suite sets itself, for each "
                    "of its runs; leave it out"
                )
        try:
            _check_values(tuple((path, str(value)) for path, value in changes.items()))
        except UserError as error:
            raise UserError(f"task {task.name}: {error}") from error


def _is_set_by_suites(path: str) -> bool:
    return path in _NOT_TO_BE_CHANGED or path.partition(".")[0] in NAMED_SECTIONS


def _check_values(overrides: Overrides) -> None:
    """Raises UserError if a key has a value that it can have in no run."""
    config = default_config(overrides)
    config.model.variant, config.init_from = INIT_FROM, "weights"
    given = dict(overrides)
    # What a task says itself is such that only the keys given can break a rule.
    if "num_steps" not in given:
        config.num_steps = max(1, config.optimizer.warmup_steps)
    if "optimizer.warmup_steps" not in given:
        config.optimizer.warmup_steps = 0
    if "batch_size" not in given:
        config.batch_size = 2 * max(1, config.recipe.grad_accum_steps)
    validate(config)


def _make(
    task: FineTuneTask,
    image_size: int,
    setting: SuiteSettings,
    train_split: str,
    learning_rate: float,
    seed: int,
    evals: dict[str, dict[str, str]],
) -> ConfigDict:
    config = config_lib.get_default()
    config.seed = seed
    config.num_steps = task.num_steps
    config.batch_size = config.eval_batch_size = task.batch_size
    config.image_size = image_size
    config.init_from = setting.checkpoint
    config.init_head = "new"
    config.model.variant = INIT_FROM

    config.dataset.name = task.dataset
    config.dataset.data_dir = setting.data_dir
    config.dataset.train_split = train_split
    config.preprocess.train_crop = task.train_crop
    config.preprocess.flip = task.flip
    config.preprocess.eval_crop = eval_crop(task, image_size, setting.about)
    config.preprocess.exif_orientation = setting.about.exif_orientation

    config.recipe.loss = "softmax"
    config.optimizer.name = "momentum"
    config.optimizer.learning_rate = learning_rate
    config.optimizer.warmup_steps = task.warmup_steps
    config.optimizer.decay_type = "cosine"

    config.checkpoint.every_steps = min(_MOST_STEPS_BETWEEN_CHECKPOINTS, -(-task.num_steps // 5))
    config.checkpoint.keep = 1
    # The same numbers stand in metrics.jsonl, and a suite may have a hundred runs.
    config.tensorboard = False
    config.evals = config_lib.evals(**evals)
    for path, value in task.changes.items():
        set_override(config, path, str(value))
    for path, text in setting.overrides:
        set_override(config, path, text)
    validate(config)
    return config
