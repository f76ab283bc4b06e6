"""Tasks and suites as plain data, their validation, and their JSON form."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from mixer_jax.config.compat import upgrade_overrides, upgrade_value
from mixer_jax.config.schema import EVAL_FIELDS, FIELDS
from mixer_jax.errors import UserError

# The paper's sweep (Section 3; arXiv 2010.11929, B.1.1).
LEARNING_RATES = (0.003, 0.01, 0.03, 0.06)
# Values of --image_size: the checkpoint's own size, or a size chosen per task.
NATIVE, AUTO = "native", "auto"
METHODS = EVAL_FIELDS["type"].choices[1:]
# Files in the workdir of a suite or a run, which no task may be named like.
_RESERVED_NAME = re.compile(r"(suite|results|throughput|config)\..*|checkpoints")
# Columns of the paper's tables that contain accuracies.
_PAPER_COLUMNS = ("imagenet", "real", "avg5", "vtab")
# Names of a task's own evaluations.
_OWN_EVALS = ("validation", "test")


@dataclasses.dataclass(frozen=True)
class FineTuneTask:
    """Dataset to fine-tune on, and its protocol.

    Each learning rate is trained on `sweep_train_split` and evaluated on `sweep_val_split`. The
    best one is trained on `train_split` with every seed and evaluated on `test_split`.

    Attributes:
        name: Name, unique in the suite; also the folder of its runs.
        dataset: Dataset, as in `config.dataset.name`.
        num_classes: Number of classes.
        sweep_train_split: Training split of the sweep, in TFDS syntax.
        sweep_val_split: Validation split of the sweep.
        train_split: Training split of the final runs.
        test_split: Test split of the final runs.
        num_examples: Sizes of these four splits, in this order, according to TFDS. They are checked
            where the data are available. Empty if unknown.
        num_steps: Steps of every run.
        warmup_steps: Warmup steps.
        learning_rates: Learning rates of the sweep.
        batch_size: Images per step.
        seeds: Seeds of the final runs; the sweep uses the first one.
        is_large_image: Whether images have 96 × 96 px or more, for `--image_size=auto`. None
            measures some of them.
        train_crop: Training crop, as in `config.preprocess.train_crop`.
        flip: Whether half of the training images are flipped.
        eval_crop: Evaluation crop, as in `config.preprocess.eval_crop`. Empty for that of the
            paper's tables: "shorter_side" at the checkpoint's size, "square" at a larger one.
        extra_evals: Other datasets to evaluate the final runs on, as (dataset, split) by name,
            such as ReaL. A name of a column of the paper's tables is compared with it.
        paper_column: Column of the paper's tables with this accuracy; empty if there is none.
        group: Name of a group of tasks with a separate mean; empty for no group.
        config_overrides: Values of other config keys, by dotted path.
    """

    name: str
    dataset: str
    num_classes: int
    sweep_train_split: str
    sweep_val_split: str
    train_split: str
    test_split: str
    num_examples: Sequence[int]
    num_steps: int
    warmup_steps: int
    learning_rates: Sequence[float] = LEARNING_RATES
    batch_size: int = 512
    seeds: Sequence[int] = (0, 1, 2)
    is_large_image: bool | None = None
    train_crop: str = "random_crop"
    flip: bool = True
    eval_crop: str = ""
    extra_evals: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    paper_column: str = ""
    group: str = ""
    config_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _convert_to_tuples(self)


@dataclasses.dataclass(frozen=True)
class ProbeTask:
    """Dataset to probe frozen features on.

    Attributes:
        name: Name, unique in the suite.
        dataset: Dataset, as in `config.dataset.name`.
        method: "few_shot", "linear" or "knn"; see `evaluation.probes`.
        train_split: Split to fit the probe on, in TFDS syntax.
        test_split: Split to evaluate on.
        num_classes: Number of classes; 0 if unknown.
        num_examples: Sizes of these two splits, as in `FineTuneTask`.
        shots: Images per class; few_shot only.
        seeds: Seeds of the samples; few_shot only.
        is_large_image: Whether images are large, as in `FineTuneTask`.
        eval_crop: Evaluation crop, as in `config.preprocess.eval_crop`. Empty for the checkpoint's.
        compare_random_init: Whether to also probe a randomly initialized network.
    """

    name: str
    dataset: str
    method: str
    train_split: str
    test_split: str
    num_classes: int = 0
    num_examples: Sequence[int] = ()
    shots: Sequence[int] = (1, 5, 10, 25)
    seeds: Sequence[int] = (0, 1, 2)
    is_large_image: bool | None = None
    eval_crop: str = ""
    compare_random_init: bool = False

    def __post_init__(self) -> None:
        _convert_to_tuples(self)


Task = FineTuneTask | ProbeTask


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tasks that a checkpoint is evaluated on.

    Attributes:
        name: Name of the suite.
        title: One-line description.
        tasks: Tasks, in the order of the table.
        paper_column: Column of the paper's tables with the mean of the fine-tuned tasks; empty if
            there is none.
    """

    name: str
    title: str
    tasks: Sequence[Task]
    paper_column: str = ""

    def __post_init__(self) -> None:
        _convert_to_tuples(self)


def _convert_to_tuples(record: Any) -> None:
    """Converts the lists and ranges that a suite file may contain to tuples."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, list | range):
            object.__setattr__(record, field.name, tuple(value))
        elif field.name == "extra_evals" and isinstance(value, dict):
            evals = {n: tuple(v) if isinstance(v, list) else v for n, v in value.items()}
            object.__setattr__(record, field.name, evals)


_TASK_TYPES: dict[str, type[FineTuneTask] | type[ProbeTask]] = {
    "fine_tune": FineTuneTask,
    "probe": ProbeTask,
}


def to_json(suite: Suite) -> dict[str, Any]:
    """Converts a suite to plain data."""
    names = {task_type: name for name, task_type in _TASK_TYPES.items()}
    tasks = [{"type": names[type(task)], **dataclasses.asdict(task)} for task in suite.tasks]
    return {
        "name": suite.name,
        "title": suite.title,
        "tasks": tasks,
        "paper_column": suite.paper_column,
    }


def from_json(data: dict[str, Any]) -> Suite:
    """Restores a suite from the result of `to_json`, or of an earlier version of it."""
    data = _rename_keys(data, {"paper": "paper_column"})
    tasks = []
    for saved in data["tasks"]:
        fields = _upgrade_task(saved)
        if "extra_evals" in fields:
            extra_evals = fields["extra_evals"].items()
            fields["extra_evals"] = {name: tuple(entry) for name, entry in extra_evals}
        tasks.append(_TASK_TYPES[fields.pop("type")](**fields))
    return Suite(data["name"], data["title"], tuple(tasks), data["paper_column"])


# Old spellings in files that were saved before a rename.
_RENAMED_TASK_FIELDS = {
    "kind": "type",
    "choose_split": "sweep_train_split",
    "validation_split": "sweep_val_split",
    "large": "is_large_image",
    "also": "extra_evals",
    "paper": "paper_column",
    "changes": "config_overrides",
    "beside_fresh": "compare_random_init",
}


def _upgrade_task(saved: dict[str, Any]) -> dict[str, Any]:
    fields = _rename_keys(saved, _RENAMED_TASK_FIELDS)
    for crop in ("train_crop", "eval_crop"):
        if crop in fields:
            fields[crop] = upgrade_value(f"preprocess.{crop}", fields[crop])
    if "config_overrides" in fields:
        fields["config_overrides"] = upgrade_overrides(fields["config_overrides"])
    return fields


def _rename_keys(data: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in data.items()}


def check_suite(suite: Suite) -> None:
    """Validates a suite without looking at data.

    Raises:
        UserError: The first rule that is broken, naming the task, the field and its value.
    """
    _check_name("suite", suite.name)
    source = f"suite {suite.name}"
    _check(isinstance(suite.title, str), source, suite, "title", "be a string")
    _check_paper_column(source, suite)
    types = tuple(_TASK_TYPES.values())
    if not _is_list(suite.tasks, lambda task: isinstance(task, types), unique=False):
        raise UserError(
            f"{source}: tasks must be a non-empty list of FineTuneTask and ProbeTask, got "
            f"{suite.tasks!r}."
        )
    names = [task.name for task in suite.tasks]
    for task in suite.tasks:
        _check_name("task", task.name)
        source = f"task {task.name}"
        if names.count(task.name) > 1:
            raise UserError(
                f"suite {suite.name}: names of tasks must be unique, got several {task.name!r}."
            )
        if _RESERVED_NAME.fullmatch(task.name):
            raise UserError(
                f"{source}: name must not be that of a file in the workdir of a suite, got "
                f"{task.name!r}. Choose another name."
            )
        _check_shared_fields(task, source)
        if isinstance(task, FineTuneTask):
            _check_fine_tune(task, source)
        else:
            _check_probe(task, source)


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name):
        raise UserError(
            f"{what} name must consist of letters, digits, _, . and -, and not start with a dot, "
            f"got {name!r}."
        )


def _check_shared_fields(task: Task, source: str) -> None:
    splits = [f.name for f in dataclasses.fields(task) if f.name.endswith("_split")]
    for name in ("dataset", *splits):
        value = getattr(task, name)
        _check(isinstance(value, str) and value, source, task, name, "be a non-empty string")
    _check(_is_int(task.num_classes, 0), source, task, "num_classes", "be an integer >= 0")
    seeds = _is_list(task.seeds, lambda seed: _is_int(seed, 0) and seed <= FIELDS["seed"].max)
    _check(seeds, source, task, "seeds", "list distinct integers >= 0")
    counts = task.num_examples
    is_complete = _is_list(counts, _is_int, unique=False) and len(counts) == len(splits)
    rule = f"be empty or have one number for each of {', '.join(splits)}"
    _check(is_complete or counts == (), source, task, "num_examples", rule)
    crops = FIELDS["preprocess.eval_crop"].choices
    rule = f"be one of {', '.join(crops)}, or ''"
    _check(task.eval_crop in ("", *crops), source, task, "eval_crop", rule)


def _check_fine_tune(task: Any, source: str) -> None:
    for name in ("num_steps", "batch_size"):
        _check(_is_int(getattr(task, name)), source, task, name, "be an integer >= 1")
    warmup = _is_int(task.warmup_steps, 0) and task.warmup_steps <= task.num_steps
    _check(warmup, source, task, "warmup_steps", "be an integer from 0 to num_steps")
    rates = _is_list(task.learning_rates, _is_learning_rate)
    # Folders are named by the formatted learning rate.
    rates = rates and len({f"{rate:g}" for rate in task.learning_rates}) == len(task.learning_rates)
    rule = "list positive numbers that differ in their first six digits"
    _check(rates, source, task, "learning_rates", rule)
    _check_paper_column(source, task)
    _check(isinstance(task.group, str), source, task, "group", "be a string")
    overrides = isinstance(task.config_overrides, dict)
    _check(overrides, source, task, "config_overrides", "be a dict of config keys and values")
    evals = isinstance(task.extra_evals, dict)
    _check(evals, source, task, "extra_evals", "be a dict of names and (dataset, split)")
    for name, entry in task.extra_evals.items():
        # The name becomes a config key, so it must not contain dots.
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(
                f"{source}: names in extra_evals must consist of letters, digits, _ and -, got "
                f"{name!r}."
            )
        if name in _OWN_EVALS:
            raise UserError(
                f"{source}: names in extra_evals must not be {' or '.join(_OWN_EVALS)}, got "
                f"{name!r}."
            )
        if not _is_list(entry, lambda x: isinstance(x, str), unique=False) or len(entry) != 2:
            raise UserError(
                f"{source}: values in extra_evals must be (dataset, split), got {name}={entry!r}."
            )


def _check_probe(task: Any, source: str) -> None:
    rule = f"be one of {', '.join(METHODS)}"
    _check(task.method in METHODS, source, task, "method", rule)
    _check(_is_list(task.shots, _is_int), source, task, "shots", "list distinct integers >= 1")


def _check_paper_column(source: str, record: Any) -> None:
    rule = f"be one of {', '.join(_PAPER_COLUMNS)}, or ''"
    is_valid = record.paper_column in ("", *_PAPER_COLUMNS)
    _check(is_valid, source, record, "paper_column", rule)


def _check(is_valid: Any, source: str, record: Any, name: str, rule: str) -> None:
    if not is_valid:
        raise UserError(f"{source}: {name} must {rule}, got {getattr(record, name)!r}.")


def _is_list(values: Any, is_valid: Callable[[Any], bool], *, unique: bool = True) -> bool:
    """Returns whether `values` is a non-empty tuple of valid items, all different if `unique`."""
    if not isinstance(values, tuple) or not values or not all(map(is_valid, values)):
        return False
    return not unique or len(set(values)) == len(values)


def _is_int(value: Any, minimum: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_learning_rate(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0
