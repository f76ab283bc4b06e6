"""Tests of the built-in suites: the paper's protocol as data."""

import json

import pytest
import tensorflow_datasets as tfds

from mixer_jax.suites import tasks
from mixer_jax.suites.builtin import AVG5, DIGITS, IMAGENET, SUITES, few_shot_suite
from mixer_jax.suites.plan import check_task_overrides
from mixer_jax.suites.tasks import FineTuneTask, ProbeTask

# The paper, Section 3: fraction of the training split held out for the sweep.
HELD_OUT = {"imagenet": 0.01, "cifar10": 0.02, "cifar100": 0.02, "pets": 0.10, "flowers": 0.10}
# According to TFDS's catalog.
SPLITS = {
    "imagenet": {"train": 1_281_167, "validation": 50_000},
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "pets": {"train": 3_680, "test": 3_669},
    "flowers": {"train": 1_020, "validation": 1_020, "test": 6_149},
}


def count(split: str, sizes: dict[str, int]) -> int:
    """Counts the examples of a split with TFDS."""
    infos = [
        tfds.core.splits.SplitInfo(
            name=name,
            shard_lengths=[size],
            num_bytes=0,
            filename_template=tfds.core.ShardedFileTemplate(
                dataset_name="x", data_dir=".", filetype_suffix="array_record", split=name
            ),
        )
        for name, size in sizes.items()
    ]
    return tfds.core.splits.SplitDict(infos)[split].num_examples


@pytest.mark.parametrize("task", AVG5, ids=lambda task: task.name)
def test_avg5_splits(task: FineTuneTask) -> None:
    """Steps, warmup and preprocessing are those of the configs; see plan_test."""
    # Table 4 of arXiv 2010.11929.
    is_imagenet = task.name == "imagenet"
    grid = (0.003, 0.01, 0.03, 0.06) if is_imagenet else (0.001, 0.003, 0.01, 0.03)
    assert task.learning_rates == grid
    assert task.seeds == (0, 1, 2)
    splits = (task.sweep_train_split, task.sweep_val_split, task.train_split, task.test_split)
    assert tuple(count(split, SPLITS[task.name]) for split in splits) == task.num_examples
    sweep_train, sweep_val, train, _ = task.num_examples
    assert sweep_train + sweep_val == train
    assert sweep_val / train == pytest.approx(HELD_OUT[task.name], abs=1e-4)


def test_imagenet_is_also_evaluated_with_real_labels() -> None:
    assert IMAGENET.extra_evals == {"real": ("imagenet2012_real", "validation")}
    assert SUITES["imagenet"].tasks == (IMAGENET,)


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_suites_are_valid(suite: tasks.Suite) -> None:
    tasks.check_suite(suite)
    check_task_overrides(suite)


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_suites_round_trip_through_json(suite: tasks.Suite) -> None:
    assert tasks.from_json(json.loads(json.dumps(tasks.to_json(suite)))) == suite
    names = [task.name for task in suite.tasks]
    assert len(set(names)) == len(names)


def test_digits_suite_uses_unseen_classes() -> None:
    assert {task.dataset for task in DIGITS} == {"digits/high"}
    probes = [task for task in DIGITS if isinstance(task, ProbeTask)]
    assert {probe.method for probe in probes} == {"few_shot", "linear", "knn"}
    assert all(probe.compare_random_init for probe in probes)


def test_few_shot_suite_has_a_task_per_method() -> None:
    suite = few_shot_suite("cifar10", "train", "test", (1, 5), ("few_shot", "knn"))
    assert [(task.name, task.dataset) for task in suite.tasks] == [
        ("few_shot", "cifar10"),
        ("knn", "cifar10"),
    ]
