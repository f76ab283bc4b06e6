"""Tasks and suites as plain data, their validation, and their JSON form."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from mixer_jax.config.compat import upgrade_overrides, upgrade_value
from mixer_jax.config.schema import EVAL_FIELDS, FIELDS
from mixer_jax.errors import UserError
from mixer_jax.models.registry import FAMILIES, list_model_names

# Values of --image_size: the checkpoint's own size, or a size chosen per task.
NATIVE, AUTO = "native", "auto"
METHODS = EVAL_FIELDS["type"].choices[1:]
# Files in the workdir of a suite or a run, which no task may be named like.
_RESERVED_NAME = re.compile(r"(suite|results|throughput|config)\..*|checkpoints")
# Columns of the paper's tables that contain accuracies.
_PAPER_COLUMNS = ("imagenet", "real", "avg5", "vtab")
# Names of the evaluations of sweep runs and of final runs.
VALIDATION, TEST = "validation", "test"
# Folders of a probe of the checkpoint, and of a randomly initialized network.
CHECKPOINT, RANDOM_INIT = "checkpoint", "fresh"
NETWORK_TITLES = {CHECKPOINT: "checkpoint", RANDOM_INIT: "random initialization"}

# Fields that `model_overrides` may change. Data are opened before the model is known.
_OVERRIDABLE = (
    "num_steps",
    "warmup_steps",
    "learning_rates",
    "batch_size",
    "train_crop",
    "flip",
    "eval_crop",
    "image_size",
    "resize_size",
    "config_overrides",
)

_OTHER_NAME = "Choose another name."


@dataclasses.dataclass(frozen=True)
class FineTuneTask:
    """Dataset to fine-tune on, and its protocol.

    Each learning rate is trained on `sweep_train_split` and evaluated on `sweep_val_split`. The
    best one is trained on `train_split` with every seed and evaluated on `test_split`. Splits are
    in TFDS syntax.

    Attributes:
        name: Name, unique in the suite; also the folder of its runs.
        dataset: Dataset, as in `config.dataset.name`.
        num_examples: Sizes of the four splits, in this order, according to TFDS. They are checked
            where the data are available. Empty if unknown.
        learning_rates: Learning rates of the sweep; by default those for small datasets (arXiv
            2010.11929, Table 4).
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
        image_size: Image size of the protocol, in pixels, which only a number of `--image_size`
            changes; rounded to a multiple of the model's patch size. 0: as `--image_size` says.
        resize_size: Size before a random crop to `image_size`, as in
            `config.preprocess.resize_size`; not used at other image sizes.
        paper_column: Column of the paper's tables with this accuracy; empty if there is none.
        group: Name of a group of tasks with a separate mean; empty for no group.
        config_overrides: Values of other config keys, by dotted path.
        model_overrides: Values of fields for some models, by the name of a family, such as "bit",
            or of a model, such as "BiT-R152x4", which comes last.
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
    learning_rates: Sequence[float] = (0.001, 0.003, 0.01, 0.03)
    batch_size: int = 512
    seeds: Sequence[int] = (0, 1, 2)
    is_large_image: bool | None = None
    train_crop: str = "random_crop"
    flip: bool = True
    eval_crop: str = ""
    image_size: int = 0
    resize_size: int = 0
    extra_evals: dict[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    paper_column: str = ""
    group: str = ""
    config_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    model_overrides: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _convert_to_tuples(self)


@dataclasses.dataclass(frozen=True)
class ProbeTask:
    """Dataset to probe frozen features on; attributes as in `FineTuneTask`.

    Attributes:
        method: "few_shot", "linear" or "knn"; see `evaluation.probes`.
        num_classes: Number of classes; 0 if unknown.
        num_examples: Sizes of the two splits.
        shots: Images per class; few_shot only.
        seeds: Seeds of the samples; few_shot only.
        eval_crop: Evaluation crop. Empty for the checkpoint's.
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

    @property
    def networks(self) -> tuple[str, ...]:
        """Networks to probe, keys of `NETWORK_TITLES`."""
        return (CHECKPOINT, RANDOM_INIT) if self.compare_random_init else (CHECKPOINT,)


Task = FineTuneTask | ProbeTask
_TASK_TYPES: dict[str, type[Task]] = {"fine_tune": FineTuneTask, "probe": ProbeTask}


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tasks that a checkpoint is evaluated on.

    Attributes:
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
    """Converts the lists and ranges that a suite file or JSON may contain to tuples."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, list | range):
            object.__setattr__(record, field.name, tuple(value))
        elif field.name == "extra_evals" and isinstance(value, dict):
            evals = {n: tuple(v) if isinstance(v, list) else v for n, v in value.items()}
            object.__setattr__(record, field.name, evals)
        elif field.name == "model_overrides" and isinstance(value, dict):
            overrides = {
                name: {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
                if isinstance(fields, dict)
                else fields
                for name, fields in value.items()
            }
            object.__setattr__(record, field.name, overrides)


def for_model(suite: Suite, family: str, model: str) -> Suite:
    """Applies the `model_overrides` of a suite's tasks.

    Args:
        suite: Suite, validated by `check_suite`.
        family: Name of the family, e.g. "bit".
        model: Full name of the model, e.g. "BiT-R50x1".
    """

    def apply(task: Task) -> Task:
        if isinstance(task, ProbeTask):
            return task
        overrides = task.model_overrides
        fields = overrides.get(family, {}) | overrides.get(model, {})
        return dataclasses.replace(task, **fields, model_overrides={})

    return dataclasses.replace(suite, tasks=tuple(map(apply, suite.tasks)))


def task_splits(task: Task) -> tuple[str, ...]:
    """Returns the splits of a task, in the order of its `num_examples`."""
    if isinstance(task, FineTuneTask):
        return task.sweep_train_split, task.sweep_val_split, task.train_split, task.test_split
    return task.train_split, task.test_split


def to_json(suite: Suite) -> dict[str, Any]:
    """Converts a suite to plain data."""
    names = {task_type: name for name, task_type in _TASK_TYPES.items()}
    tasks = [{"type": names[type(task)], **dataclasses.asdict(task)} for task in suite.tasks]
    return {**dataclasses.asdict(suite), "tasks": tasks}


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
_RENAMED_GROUPS = {"specialised": "specialized"}


def from_json(data: dict[str, Any]) -> Suite:
    """Restores a suite from the result of `to_json`, or of an earlier version of it."""
    data = rename_keys(data, {"paper": "paper_column"})
    tasks = [_task_from_json(saved) for saved in data["tasks"]]
    return Suite(data["name"], data["title"], tasks, data["paper_column"])


def _task_from_json(saved: dict[str, Any]) -> Task:
    fields = rename_keys(saved, _RENAMED_TASK_FIELDS)
    for crop in ("train_crop", "eval_crop"):
        if crop in fields:
            fields[crop] = upgrade_value(f"preprocess.{crop}", fields[crop])
    if "config_overrides" in fields:
        fields["config_overrides"] = upgrade_overrides(fields["config_overrides"])
    if "group" in fields:
        fields["group"] = _RENAMED_GROUPS.get(fields["group"], fields["group"])
    return _TASK_TYPES[fields.pop("type")](**fields)


def rename_keys(data: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Renames the keys of a dict that have an entry in `names`, and keeps the others."""
    return {names.get(name, name): value for name, value in data.items()}


def check_suite(suite: Suite) -> None:
    """Validates a suite without looking at data.

    Raises:
        UserError: The first rule that is broken, naming the task, the field and its value.
    """
    _check_name("suite", suite.name)
    source = f"suite {suite.name}"
    _require(isinstance(suite.title, str), f"{source}: title", "be a string", suite.title)
    _check_paper_column(source, suite.paper_column)
    is_list = _is_list(suite.tasks, lambda task: isinstance(task, Task), unique=False)
    rule = "be a non-empty list of FineTuneTask and ProbeTask"
    _require(is_list, f"{source}: tasks", rule, suite.tasks)
    names = [task.name for task in suite.tasks]
    for task in suite.tasks:
        _check_name("task", task.name)
        is_unique = names.count(task.name) == 1
        _require(is_unique, f"{source}: names of tasks", "be unique", task.name, _OTHER_NAME)
        _check_task(task)


def _check_name(what: str, name: Any) -> None:
    is_valid = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name)
    rule = "consist of letters, digits, _, . and -, and not start with a dot"
    _require(is_valid, f"{what} name", rule, name)


def _check_task(task: Any) -> None:
    source = f"task {task.name}"

    def check(name: str, is_valid: Any, rule: str) -> None:
        _require(is_valid, f"{source}: {name}", rule, getattr(task, name))

    is_free = not _RESERVED_NAME.fullmatch(task.name)
    rule = "not be that of a file in the workdir of a suite"
    _require(is_free, f"{source}: name", rule, task.name, _OTHER_NAME)
    splits = [f.name for f in dataclasses.fields(task) if f.name.endswith("_split")]
    for name in ("dataset", *splits):
        value = getattr(task, name)
        check(name, isinstance(value, str) and value, "be a non-empty string")
    check("num_classes", _is_int(task.num_classes, 0), "be an integer >= 0")
    seeds = _is_list(task.seeds, lambda seed: _is_int(seed, 0) and seed <= FIELDS["seed"].max)
    check("seeds", seeds, "list distinct integers >= 0")
    counts = task.num_examples
    is_complete = _is_list(counts, _is_int, unique=False) and len(counts) == len(splits)
    rule = f"be empty or have one number for each of {', '.join(splits)}"
    check("num_examples", is_complete or counts == (), rule)
    crops = FIELDS["preprocess.eval_crop"].choices
    check("eval_crop", task.eval_crop in ("", *crops), f"be one of {', '.join(crops)}, or ''")
    if isinstance(task, ProbeTask):
        check("method", task.method in METHODS, f"be one of {', '.join(METHODS)}")
        check("shots", _is_list(task.shots, _is_int), "list distinct integers >= 1")
        return
    for name in ("num_steps", "batch_size"):
        check(name, _is_int(getattr(task, name)), "be an integer >= 1")
    warmup = _is_int(task.warmup_steps, 0) and task.warmup_steps <= task.num_steps
    check("warmup_steps", warmup, "be an integer from 0 to num_steps")
    rates = _is_list(task.learning_rates, _is_learning_rate)
    # Folders are named by the formatted learning rate.
    rates = rates and len({f"{rate:g}" for rate in task.learning_rates}) == len(task.learning_rates)
    check("learning_rates", rates, "list positive numbers that differ in their first six digits")
    for name in ("image_size", "resize_size"):
        check(name, _is_int(getattr(task, name), 0), "be an integer >= 0")
    if task.image_size and task.resize_size:
        check("resize_size", task.resize_size >= task.image_size, "be 0 or at least image_size")
    _check_paper_column(source, task.paper_column)
    check("group", isinstance(task.group, str), "be a string")
    is_dict = isinstance(task.config_overrides, dict)
    check("config_overrides", is_dict, "be a dict of config keys and values")
    is_dict = isinstance(task.extra_evals, dict)
    check("extra_evals", is_dict, "be a dict of names and (dataset, split)")
    for name, entry in task.extra_evals.items():
        names = f"{source}: names in extra_evals"
        # The name becomes a config key, so it must not contain dots.
        is_valid = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name)
        _require(is_valid, names, "consist of letters, digits, _ and -", name)
        is_free = name not in (VALIDATION, TEST)
        _require(is_free, names, f"not be {VALIDATION} or {TEST}", name, _OTHER_NAME)
        is_pair = _is_list(entry, lambda x: isinstance(x, str), unique=False) and len(entry) == 2
        _require(is_pair, f"{source}: extra_evals[{name!r}]", "be (dataset, split)", entry)
    is_dict = isinstance(task.model_overrides, dict)
    check("model_overrides", is_dict, "be a dict of names of models and dicts of fields")
    for name, fields in task.model_overrides.items():
        known = [*FAMILIES, *list_model_names()]
        _require(
            name in known, f"{source}: names in model_overrides", "be models or families", name
        )
        override = f"{source}: model_overrides[{name!r}]"
        is_allowed = isinstance(fields, dict) and set(fields) <= set(_OVERRIDABLE)
        _require(is_allowed, override, f"have only {', '.join(_OVERRIDABLE)}", fields)
        _check_task(dataclasses.replace(task, **fields, model_overrides={}))


def _check_paper_column(source: str, column: Any) -> None:
    rule = f"be one of {', '.join(_PAPER_COLUMNS)}, or ''"
    _require(column in ("", *_PAPER_COLUMNS), f"{source}: paper_column", rule, column)


def _require(is_valid: Any, name: str, rule: str, value: Any, fix: str = "") -> None:
    if not is_valid:
        raise UserError(f"{name} must {rule}, got {value!r}.{fix and ' ' + fix}")


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
