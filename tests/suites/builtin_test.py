"""Tests of the suites as data: the paper's protocol, and its tables."""

import json

import pytest
import tensorflow_datasets as tfds

from mixer_jax.config.loading import load_config
from mixer_jax.suites import tasks
from mixer_jax.suites.builtin import AVG5, DIGITS, IMAGENET, SUITES, few_shot_suite
from mixer_jax.suites.paper_results import PAPER, find_row, infer_pretrain_dataset
from mixer_jax.suites.tasks import FineTuneTask, ProbeTask

# PAPER, Section 3: steps, warmup, share held out of the training split to choose by.
PROTOCOL = {
    "imagenet": (20_000, 500, 0.01),
    "cifar10": (10_000, 500, 0.02),
    "cifar100": (10_000, 500, 0.02),
    "pets": (500, 100, 0.10),
    "flowers": (500, 100, 0.10),
}
# Of TFDS's catalog.
SPLITS = {
    "imagenet": {"train": 1_281_167, "validation": 50_000},
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "pets": {"train": 3_680, "test": 3_669},
    "flowers": {"train": 1_020, "validation": 1_020, "test": 6_149},
}


def count(split: str, sizes: dict[str, int]) -> int:
    """How many examples TFDS itself finds in a split."""
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
def test_avg5_is_the_papers_protocol(task: FineTuneTask) -> None:
    steps, warmup, held_out = PROTOCOL[task.name]
    assert (task.num_steps, task.warmup_steps, task.batch_size) == (steps, warmup, 512)
    assert task.learning_rates == (0.003, 0.01, 0.03, 0.06)
    assert task.seeds == (0, 1, 2)
    splits = (task.choose_split, task.validation_split, task.train_split, task.test_split)
    assert tuple(count(split, SPLITS[task.name]) for split in splits) == task.num_examples
    choose, validation, train, _ = task.num_examples
    assert choose + validation == train
    assert validation / train == pytest.approx(held_out, abs=1e-4)


@pytest.mark.parametrize("task", AVG5, ids=lambda task: task.name)
def test_avg5_agrees_with_the_configs(task: FineTuneTask) -> None:
    config = load_config(f"configs/finetune_{task.name}.py:448")
    assert (config.dataset.name, config.dataset.train_split) == (task.dataset, task.train_split)
    assert [entry.split for entry in config.evals.values()] == [task.test_split]
    assert config.dataset.num_classes == task.num_classes
    assert config.dataset.num_examples == task.num_examples[2]
    assert (config.preprocess.train_crop, config.preprocess.flip) == (task.train_crop, task.flip)


def test_real_is_scored_with_imagenet() -> None:
    assert IMAGENET.also == {"real": ("imagenet2012_real", "validation")}
    assert SUITES["imagenet"].tasks == (IMAGENET,)
    assert {row.real > row.imagenet for row in PAPER} == {True}


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_suites_survive_a_file(suite: tasks.Suite) -> None:
    assert tasks.from_json(json.loads(json.dumps(tasks.to_json(suite)))) == suite
    names = [task.name for task in suite.tasks]
    assert len(set(names)) == len(names)


def test_digits_are_judged_on_classes_not_trained_on() -> None:
    assert {task.dataset for task in DIGITS} == {"digits/high"}
    probes = [task for task in DIGITS if isinstance(task, ProbeTask)]
    assert {probe.method for probe in probes} == {"few_shot", "linear", "knn"}
    assert all(probe.beside_fresh for probe in probes)


def test_few_shot_suites_are_made_of_arguments() -> None:
    suite = few_shot_suite("cifar10", "train", "test", (1, 5), ("few_shot", "knn"))
    assert [(task.name, task.dataset) for task in suite.tasks] == [
        ("few_shot", "cifar10"),
        ("knn", "cifar10"),
    ]


def test_the_papers_rows() -> None:
    row = find_row("i21k", "L/16", 448)
    assert row is not None
    # Table 2, where VTAB-1k was measured, not Table 3.
    assert (row.table, row.imagenet, row.avg5, row.vtab) == (2, 84.15, 93.91, 74.95)
    row = find_row("i21k", "B/16", 224)
    assert row is not None
    assert (row.table, row.imagenet, row.real, row.avg5, row.vtab) == (3, 80.64, 85.8, 92.5, None)
    assert (row.images_per_second, row.core_days) == (1384, 150)
    for absent in [("i21k", "S/16", 224), ("", "B/16", 224), ("i21k", "B/16", 448)]:
        assert find_row(*absent) is None
    keys = [(row.table, row.data, row.variant, row.image_size) for row in PAPER]
    assert len(set(keys)) == len(keys) == 14


def test_pretraining_data_are_told_by_the_run_or_the_classes() -> None:
    assert infer_pretrain_dataset("imagenet21k", "", 21_843) == "i21k"
    assert infer_pretrain_dataset("imagenet2012:5.1.0", "", 1_000) == "i1k"
    assert infer_pretrain_dataset("digits/low", "", 5) == ""
    assert infer_pretrain_dataset("", "", 21_843) == "i21k"
    assert infer_pretrain_dataset("", "", 1_000) == "i1k"
    assert infer_pretrain_dataset("", "", 37) == ""
    # Of a run that began with other weights nothing is known.
    assert infer_pretrain_dataset("imagenet2012", "Mixer-L_16.npz", 1_000) == ""
