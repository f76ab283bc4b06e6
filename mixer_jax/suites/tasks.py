"""What a suite is made of, as plain data: tasks that a checkpoint is judged by."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from mixer_jax.config.compat import upgrade_overrides, upgrade_value
from mixer_jax.config.schema import EVAL_FIELDS, FIELDS
from mixer_jax.errors import UserError

# Learning rates that the paper chose among (Section 3; arXiv 2010.11929, B.1.1).
LEARNING_RATES = (0.003, 0.01, 0.03, 0.06)
# Image sizes that are no number of pixels: the weights' own, and that by the size of the images.
NATIVE, AUTO = "native", "auto"
METHODS = EVAL_FIELDS["type"].choices[1:]
# What a suite's folder holds beside its tasks, and what that of a run is known by.
_TAKEN = re.compile(r"(suite|results|throughput|config)\..*|checkpoints")
# Of the paper's tables, those with scores.
_COLUMNS = ("imagenet", "real", "avg5", "vtab")
# Splits that a task scores itself.
_OWN_SCORES = ("validation", "test")


@dataclasses.dataclass(frozen=True)
class FineTuneTask:
    """A data set to fine-tune on, and the protocol for it.

    Every learning rate is trained on `choose_split` and scored on `validation_split`; the best one
    is trained on `train_split` with every seed and scored on `test_split`.

    Attributes:
        name: of the task, unique in its suite; a folder of that name holds its runs.
        dataset: as `config.dataset.name`.
        num_classes: of the data set.
        choose_split: in TFDS syntax.
        validation_split: likewise.
        train_split: likewise.
        test_split: likewise.
        num_examples: of these four splits, in their order, as TFDS's metadata have them; checked
            where the data are there. Empty: not known before.
        num_steps: of every run.
        warmup_steps: of these.
        learning_rates: to choose among.
        batch_size: images a step.
        seeds: of the final runs; the first is that of the choosing ones.
        large: whether the images are 96 × 96 px or more, which `--image_size=auto` asks; None: it
            looks at some of them.
        train_crop: as `config.preprocess.train_crop`.
        flip: whether half of the training images are mirrored.
        eval_crop: as `config.preprocess.eval_crop`; empty: of the paper's tables, "shorter_side"
            at the size of the checkpoint and "square" at a larger one.
        also: other data sets to score the final runs on, by name: data set and split; ReaL.
        paper: the column of the paper's tables that has this score; empty: none. What stands in
            `also` is compared with the column of its name.
        group: of tasks that are averaged by themselves too; empty: none.
        changes: further keys of the configuration, by dotted path.
    """

    name: str
    dataset: str
    num_classes: int
    choose_split: str
    validation_split: str
    train_split: str
    test_split: str
    num_examples: Sequence[int]
    num_steps: int
    warmup_steps: int
    learning_rates: Sequence[float] = LEARNING_RATES
    batch_size: int = 512
    seeds: Sequence[int] = (0, 1, 2)
    large: bool | None = None
    train_crop: str = "random_crop"
    flip: bool = True
    eval_crop: str = ""
    also: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    paper: str = ""
    group: str = ""
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _make_tuples(self)


@dataclasses.dataclass(frozen=True)
class ProbeTask:
    """A data set on which the features are judged as they are; nothing is trained by gradients.

    Attributes:
        name: of the task, unique in its suite.
        dataset: as `config.dataset.name`.
        method: "few_shot", "linear" or "knn", as `evaluation.probes` has them.
        train_split: in TFDS syntax; the probe learns from it.
        test_split: likewise.
        num_classes: of the data set; 0: not known before.
        num_examples: of these two splits, as of `FineTuneTask`.
        shots: of few_shot, images a class.
        seeds: of few_shot.
        large: as of `FineTuneTask`.
        eval_crop: as `config.preprocess.eval_crop`; empty: the weights' own.
        beside_fresh: whether the same is done with a freshly initialised network, to compare.
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
    large: bool | None = None
    eval_crop: str = ""
    beside_fresh: bool = False

    def __post_init__(self) -> None:
        _make_tuples(self)


Task = FineTuneTask | ProbeTask


@dataclasses.dataclass(frozen=True)
class Suite:
    """Tasks whose mean judges a checkpoint.

    Attributes:
        name: of the suite.
        title: one line for people.
        tasks: in the order of the table.
        paper: the column of the paper's tables that has the mean of the fine-tuned tasks; empty:
            none.
    """

    name: str
    title: str
    tasks: Sequence[Task]
    paper: str = ""

    def __post_init__(self) -> None:
        _make_tuples(self)


def _make_tuples(made: Any) -> None:
    """Makes tuples of the lists and ranges that a suite may be written with."""
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        if isinstance(value, list | range):
            object.__setattr__(made, field.name, tuple(value))
        elif field.name == "also" and isinstance(value, dict):
            places = {n: tuple(v) if isinstance(v, list) else v for n, v in value.items()}
            object.__setattr__(made, field.name, places)


_KINDS: dict[str, type[FineTuneTask] | type[ProbeTask]] = {
    "fine_tune": FineTuneTask,
    "probe": ProbeTask,
}


def to_json(suite: Suite) -> dict[str, Any]:
    """Returns a suite as plain data."""
    names = {kind: name for name, kind in _KINDS.items()}
    tasks = [{"kind": names[type(task)], **dataclasses.asdict(task)} for task in suite.tasks]
    return {"name": suite.name, "title": suite.title, "tasks": tasks, "paper": suite.paper}


def from_json(data: dict[str, Any]) -> Suite:
    """Returns what `to_json` gave, after a way through a file."""
    tasks = []
    for saved in data["tasks"]:
        fields = dict(saved)
        for crop in ("train_crop", "eval_crop"):
            if crop in fields:
                fields[crop] = upgrade_value(f"preprocess.{crop}", fields[crop])
        if "changes" in fields:
            fields["changes"] = upgrade_overrides(fields["changes"])
        if "also" in fields:
            fields["also"] = {name: tuple(place) for name, place in fields["also"].items()}
        tasks.append(_KINDS[fields.pop("kind")](**fields))
    return Suite(data["name"], data["title"], tuple(tasks), data["paper"])


def check_suite(suite: Suite) -> None:
    """Checks what a person may have got wrong in a suite; looks at no data.

    Raises:
        UserError: the first rule broken, naming the task, the field and its value.
    """
    _check_name("suite", suite.name)
    where = f"suite {suite.name}"
    _check(isinstance(suite.title, str), where, suite, "title", "pass a text")
    _check(_is_column(suite.paper), where, suite, "paper", f"choose {', '.join(_COLUMNS)}, or ''")
    kinds = tuple(_KINDS.values())
    if not _is_all(suite.tasks, lambda task: isinstance(task, kinds), once=False):
        raise UserError(f"{where}: tasks is no list of FineTune and Probe; give at least one")
    names = [task.name for task in suite.tasks]
    for task in suite.tasks:
        _check_name("task", task.name)
        if names.count(task.name) > 1:
            raise UserError(f"{where} has several tasks {task.name!r}; give each its own name")
        if _TAKEN.fullmatch(task.name):
            raise UserError(f"task {task.name}: files of a suite are called so; choose another")
        _check_both(task, f"task {task.name}")
        check = _check_fine_tune if isinstance(task, FineTuneTask) else _check_probe
        check(task, f"task {task.name}")


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name):
        raise UserError(
            f"{what} {name!r} cannot be the name of a folder; use letters, digits, _, . and -, and "
            "no dot at the beginning"
        )


def _check_both(task: Task, where: str) -> None:
    """Checks what both kinds of task have."""
    splits = [f.name for f in dataclasses.fields(task) if f.name.endswith("_split")]
    for name in ("dataset", *splits):
        value = getattr(task, name)
        _check(isinstance(value, str) and value, where, task, name, "pass a name")
    _check(_is_whole(task.num_classes, 0), where, task, "num_classes", "pass a whole number")
    seeds = _is_all(task.seeds, lambda seed: _is_whole(seed, 0) and seed <= FIELDS["seed"].max)
    _check(seeds, where, task, "seeds", "list whole numbers from 0, each once")
    counts = task.num_examples
    counted = _is_all(counts, _is_whole, once=False) and len(counts) == len(splits)
    fix = f"list one for each of {', '.join(splits)}, or none"
    _check(counted or counts == (), where, task, "num_examples", fix)
    crops = FIELDS["preprocess.eval_crop"].choices
    fix = f"choose {', '.join(crops)}, or ''"
    _check(task.eval_crop in ("", *crops), where, task, "eval_crop", fix)


def _check_fine_tune(task: Any, where: str) -> None:
    for name in ("num_steps", "batch_size"):
        _check(_is_whole(getattr(task, name)), where, task, name, "pass 1 or more")
    warmup = _is_whole(task.warmup_steps, 0) and task.warmup_steps <= task.num_steps
    _check(warmup, where, task, "warmup_steps", "pass 0 to num_steps")
    rates = _is_all(task.learning_rates, _is_rate)
    fix = "list numbers above 0, each once, that differ in six digits"
    # Folders are called by the rates as text.
    rates = rates and len({f"{rate:g}" for rate in task.learning_rates}) == len(task.learning_rates)
    _check(rates, where, task, "learning_rates", fix)
    _check(_is_column(task.paper), where, task, "paper", f"choose {', '.join(_COLUMNS)}, or ''")
    _check(isinstance(task.group, str), where, task, "group", "pass a text")
    _check(isinstance(task.changes, dict), where, task, "changes", "pass keys and values")
    _check(isinstance(task.also, dict), where, task, "also", "pass names, each with a place")
    for name, place in task.also.items():
        # A key of the configuration, so without dots.
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(f"{where}: also has {name!r}; use letters, digits, _ and -")
        if name in _OWN_SCORES:
            raise UserError(f"{where}: also has {name!r}, as a split of its own; name it otherwise")
        if not _is_all(place, lambda text: isinstance(text, str), once=False) or len(place) != 2:
            raise UserError(f"{where}: also has {name}={place!r}; pass (data set, split)")


def _check_probe(task: Any, where: str) -> None:
    known = ", ".join(METHODS)
    _check(task.method in METHODS, where, task, "method", f"choose {known}")
    _check(_is_all(task.shots, _is_whole), where, task, "shots", "list numbers from 1, each once")


def _check(fine: Any, where: str, of: Any, name: str, fix: str) -> None:
    if not fine:
        raise UserError(f"{where}: {name}={getattr(of, name)!r} cannot be; {fix}")


def _is_all(values: Any, fits: Callable[[Any], bool], *, once: bool = True) -> bool:
    """Returns whether this is a tuple, not empty, of what fits, and nothing twice."""
    if not isinstance(values, tuple) or not values or not all(map(fits, values)):
        return False
    return not once or len(set(values)) == len(values)


def _is_whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_rate(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0


def _is_column(name: Any) -> bool:
    return name in ("", *_COLUMNS)
