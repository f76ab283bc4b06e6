"""What a suite is made of, as plain data: tasks that a checkpoint is judged by."""

import dataclasses
from typing import Any

# Learning rates that the paper chose among (Section 3; arXiv 2010.11929, B.1.1).
GRID = (0.003, 0.01, 0.03, 0.06)


@dataclasses.dataclass(frozen=True)
class FineTune:
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
    num_examples: tuple[int, ...]
    num_steps: int
    warmup_steps: int
    learning_rates: tuple[float, ...] = GRID
    batch_size: int = 512
    seeds: tuple[int, ...] = (0, 1, 2)
    large: bool | None = None
    train_crop: str = "random_crop"
    flip: bool = True
    eval_crop: str = ""
    also: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    paper: str = ""
    group: str = ""
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Probe:
    """A data set on which the features are judged as they are; nothing is trained by gradients.

    Attributes:
        name: of the task, unique in its suite.
        dataset: as `config.dataset.name`.
        method: "few_shot", "linear" or "knn", as `evaluation.probes` has them.
        train_split: in TFDS syntax; the probe learns from it.
        test_split: likewise.
        num_classes: of the data set; 0: not known before.
        num_examples: of these two splits, as of `FineTune`.
        shots: of few_shot, images a class.
        seeds: of few_shot.
        large: as of `FineTune`.
        eval_crop: likewise.
        beside_fresh: whether the same is done with a freshly initialised network, to compare.
    """

    name: str
    dataset: str
    method: str
    train_split: str
    test_split: str
    num_classes: int = 0
    num_examples: tuple[int, ...] = ()
    shots: tuple[int, ...] = (1, 5, 10, 25)
    seeds: tuple[int, ...] = (0, 1, 2)
    large: bool | None = None
    eval_crop: str = ""
    beside_fresh: bool = False


Task = FineTune | Probe


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
    tasks: tuple[Task, ...]
    paper: str = ""


_KINDS: dict[str, type[FineTune] | type[Probe]] = {"fine_tune": FineTune, "probe": Probe}


def to_json(suite: Suite) -> dict[str, Any]:
    """Returns a suite as plain data."""
    names = {kind: name for name, kind in _KINDS.items()}
    tasks = [{"kind": names[type(task)], **dataclasses.asdict(task)} for task in suite.tasks]
    return {"name": suite.name, "title": suite.title, "tasks": tasks, "paper": suite.paper}


def from_json(data: dict[str, Any]) -> Suite:
    """Returns what `to_json` gave, after a way through a file."""
    tasks = []
    for saved in data["tasks"]:
        fields: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()
        }
        if "also" in fields:
            fields["also"] = {name: tuple(place) for name, place in fields["also"].items()}
        tasks.append(_KINDS[fields.pop("kind")](**fields))
    return Suite(data["name"], data["title"], tuple(tasks), data["paper"])
