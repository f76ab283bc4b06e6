"""Plan of a suite: its tasks, the settings of all runs, and the config of each run."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mixer_jax import config as config_lib
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.config.config import parse, validate
from mixer_jax.config.loading import Overrides, set_override
from mixer_jax.config.schema import NAMED_SECTIONS, RunConfig, get_field
from mixer_jax.errors import UserError
from mixer_jax.models.family import INIT_FROM
from mixer_jax.suites.tasks import TEST, VALIDATION, FineTuneTask, Suite, Task

_MAX_CHECKPOINT_STEPS = 1_000
_PROBE_BATCH_SIZE = 256
# Keys that a suite sets in each of its runs.
_RESERVED_KEYS = (
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


class Run(NamedTuple):
    """One call of `training.loop.train_and_evaluate`; `folder` is relative to the suite's."""

    folder: str
    config: RunConfig


class TransferPlan(NamedTuple):
    """Suite to run for a checkpoint.

    Attributes:
        checkpoint: Checkpoint to fine-tune, as in `config.init_from`.
        model_info: Metadata of the checkpoint.
        overrides: Config keys overridden by the user.
        image_sizes: Image size of each task by name, in pixels.
        pretrain_dataset: One of `paper_results.PRETRAIN_DATASETS`; empty if unknown.
        device_days: Days of pre-training times the number of devices; None if unknown.
        digest: `weights.params_digest` of the checkpoint.
        data_notes: Data that differ from the protocol, one line each.
        pretrain_dataset_assumed: Whether `pretrain_dataset` is assumed from the number of classes.
    """

    suite: Suite
    checkpoint: str
    model_info: ModelInfo
    data_dir: str
    overrides: Overrides
    image_sizes: dict[str, int]
    pretrain_dataset: str = ""
    device_days: float | None = None
    digest: str = ""
    data_notes: tuple[str, ...] = ()
    pretrain_dataset_assumed: bool = False

    @property
    def protocol_overrides(self) -> Overrides:
        """Overrides that affect the result, each key once."""
        return tuple(
            (path, text) for path, text in dict(self.overrides).items() if not is_resumable(path)
        )

    @property
    def largest_image_size(self) -> int:
        """Largest image size of fine-tuning, or of probes if there are only probes.

        It selects the paper's row, and is the size at which throughput is measured.
        """
        fine_tuned = [task for task in self.suite.tasks if isinstance(task, FineTuneTask)]
        return max(self.image_sizes[task.name] for task in fine_tuned or self.suite.tasks)

    def sweep_runs(self, task: FineTuneTask) -> dict[float, Run]:
        """Returns the runs of a task's sweep by learning rate; empty if there is a single rate.

        Raises:
            UserError: An overridden key does not exist, or breaks a rule.
        """
        if len(task.learning_rates) == 1:
            return {}
        evals = {VALIDATION: {"split": task.sweep_val_split}}
        split, seed = task.sweep_train_split, task.seeds[0]
        return {
            rate: Run(sweep_folder(task, rate), _make_config(self, task, split, rate, seed, evals))
            for rate in task.learning_rates
        }

    def final_runs(self, task: FineTuneTask, learning_rate: float) -> dict[int, Run]:
        """Returns the runs that are evaluated on the test split, by seed.

        Raises:
            UserError: An overridden key does not exist, or breaks a rule.
        """
        evals = {TEST: {"split": task.test_split}}
        for name, (dataset, split) in task.extra_evals.items():
            evals[name] = {"dataset": dataset, "split": split}
        return {
            seed: Run(
                final_folder(task, seed),
                _make_config(self, task, task.train_split, learning_rate, seed, evals),
            )
            for seed in task.seeds
        }


def sweep_folder(task: FineTuneTask, learning_rate: float) -> str:
    """Returns the folder of a sweep run, relative to the suite's workdir."""
    return f"{task.name}/choose/learning_rate={learning_rate:g}"


def final_folder(task: FineTuneTask, seed: int) -> str:
    """Returns the folder of a final run, relative to the suite's workdir."""
    return f"{task.name}/final/seed={seed}"


def _make_config(
    plan: TransferPlan,
    task: FineTuneTask,
    train_split: str,
    learning_rate: float,
    seed: int,
    evals: dict[str, dict[str, str]],
) -> RunConfig:
    info, image_size = plan.model_info, plan.image_sizes[task.name]
    config = config_lib.get_default()
    config.seed = seed
    config.num_steps = task.num_steps
    config.batch_size = config.eval_batch_size = task.batch_size
    config.image_size = image_size
    config.init_from = plan.checkpoint
    config.init_head = "new"
    config.model.family = info.family
    config.model.variant = INIT_FROM

    config.dataset.name = task.dataset
    config.dataset.data_dir = plan.data_dir
    config.dataset.train_split = train_split
    config.preprocess.train_crop = task.train_crop
    config.preprocess.flip = task.flip
    if image_size == task.image_size:
        config.preprocess.resize_size = task.resize_size
    # Table 3 resizes the shorter side. Table 2, with images larger than in pre-training, resizes
    # both sides.
    paper_crop = "shorter_side" if image_size <= info.image_size[0] else "square"
    config.preprocess.eval_crop = task.eval_crop or paper_crop
    config.preprocess.exif_orientation = info.exif_orientation
    if permutation := info.permutation:
        config.preprocess.permute = permutation.kind
        config.preprocess.permute_patch_size = permutation.patch_size
        config.preprocess.permute_seed = permutation.seed

    config.recipe.loss = "softmax"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = learning_rate
    config.optimizer.warmup_steps = task.warmup_steps
    config.optimizer.decay_type = "cosine"

    config.checkpoint.every_steps = min(_MAX_CHECKPOINT_STEPS, -(-task.num_steps // 5))
    config.checkpoint.keep = 1
    # metrics.jsonl has the same numbers, and a suite may have a hundred runs.
    config.tensorboard = False
    config.evals = config_lib.evals(**evals)
    for path, value in task.config_overrides.items():
        set_override(config, path, str(value))
    for path, text in plan.overrides:
        set_override(config, path, text)
    return parse(config)


def validate_run_configs(plan: TransferPlan, tasks: Sequence[Task]) -> None:
    """Raises UserError if the config of a run has an unknown key or breaks a rule."""
    for task in tasks:
        if isinstance(task, FineTuneTask):
            plan.sweep_runs(task)
            plan.final_runs(task, task.learning_rates[0])


def select_tasks(suite: Suite, names: tuple[str, ...], shard: tuple[int, int]) -> tuple[Task, ...]:
    """Selects the tasks that this process runs.

    Args:
        suite: Suite to select from.
        names: Names of tasks; empty for all.
        shard: i and n, for the i-th of n shards, counted from 1.

    Raises:
        UserError: The suite has no task with a name, or the shard is empty.
    """
    choices = [task.name for task in suite.tasks]
    for name in names:
        if name not in choices:
            raise UserError(
                f"--tasks must be among the tasks of {suite.name}, {', '.join(choices)}, got "
                f"{name!r}."
            )
    selected = [task for task in suite.tasks if not names or task.name in names]
    index, count = shard
    tasks = tuple(selected[index - 1 :: count])
    if not tasks:
        raise UserError(
            f"--shard={index}/{count} is empty: there are only {len(selected)} tasks. Use fewer "
            "shards."
        )
    return tasks


def is_resumable(path: str) -> bool:
    """Returns whether a key may change between starts without affecting the result."""
    field = get_field(path)
    return field is not None and field.resumable


def default_config(overrides: Overrides) -> ConfigDict:
    """Returns the default config with overrides, for probes and the command itself.

    Raises:
        UserError: A key does not exist, or its value has the wrong type.
    """
    config = config_lib.get_default()
    config.eval_batch_size = _PROBE_BATCH_SIZE
    for path, text in overrides:
        set_override(config, path, text)
    return config


def check_overrides(overrides: Overrides) -> None:
    """Validates the user's overrides as far as possible without the checkpoint.

    Raises:
        UserError: A key does not exist, its value is invalid, or suites set it themselves.
    """
    for path, value in overrides:
        if _is_reserved(path):
            raise UserError(
                f"--config.{path}={value} must be left out: a suite sets {path} in each of its "
                "runs. Use the command's own flags, or write a custom suite."
            )
    _check_values(overrides)


def check_task_overrides(suite: Suite) -> None:
    """Validates the config overrides of a suite's tasks, like `check_overrides`.

    Raises:
        UserError: An override is invalid; the message names the task.
    """
    for task in suite.tasks:
        if not isinstance(task, FineTuneTask):
            continue
        versions = [task.config_overrides]
        versions += [fields.get("config_overrides", {}) for fields in task.model_overrides.values()]
        try:
            for overrides in filter(None, versions):
                _check_task_overrides(overrides)
        except UserError as error:
            raise UserError(f"task {task.name}: {error}") from error


def _check_task_overrides(overrides: dict[str, Any]) -> None:
    for path in overrides:
        if _is_reserved(path):
            raise UserError(
                f"config_overrides must not contain {path!r}, which a suite sets in each of its "
                "runs."
            )
    _check_values(tuple((path, str(value)) for path, value in overrides.items()))


def _is_reserved(path: str) -> bool:
    return path in _RESERVED_KEYS or path.partition(".")[0] in NAMED_SECTIONS


def _check_values(overrides: Overrides) -> None:
    """Raises UserError if an override is valid in no run."""
    config = default_config(overrides)
    config.model.variant, config.init_from = INIT_FROM, "weights"
    paths = dict(overrides)
    # Other keys get values with which only the overrides can break a rule.
    if "num_steps" not in paths:
        config.num_steps = max(1, config.optimizer.warmup_steps)
    if "optimizer.warmup_steps" not in paths:
        config.optimizer.warmup_steps = 0
    if "batch_size" not in paths:
        config.batch_size = 2 * max(1, config.recipe.grad_accum_steps)
    validate(config)
