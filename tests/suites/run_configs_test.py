"""Tests of what a suite is going to do: sizes, crops, runs, shares, data, the time it takes."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax.config.config import flatten
from mixer_jax.config.loading import load_config
from mixer_jax.data.registry import open_dataset
from mixer_jax.errors import UserError
from mixer_jax.suites import throughput
from mixer_jax.suites.builtin import AVG5, SUITES
from mixer_jax.suites.datasets import check_available, choose_image_size, open_task_data
from mixer_jax.suites.dry_run import format_dry_run
from mixer_jax.suites.plan import TransferPlan, select_tasks, validate_run_configs
from mixer_jax.suites.run_configs import SuiteSettings, check_overrides
from mixer_jax.suites.tasks import FineTuneTask
from tests.helpers.images import encode, photograph
from tests.helpers.lines import each_mentions, some_line_mentions
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import random_weights
from tests.helpers.tiny_suite import HIGH, LOW, SUITE
from tests.suites.table_test import ABOUT

SQUARE = random_weights().model_info


def plan_of(suite: Any, wish: str, about: Any = ABOUT) -> TransferPlan:
    sizes = {task.name: choose_image_size(task, wish, about, []) for task in suite.tasks}
    return TransferPlan(suite, SuiteSettings("Mixer-L_16.npz", about), sizes)


def test_auto_sees_large_images_at_twice_the_size() -> None:
    sizes = plan_of(SUITES["vtab1k"], "auto").image_sizes
    small = {name for name, side in sizes.items() if side == 224}
    assert small == {"cifar100", "svhn", "eurosat", "dsprites_position", "dsprites_orientation"}
    assert {side for name, side in sizes.items() if name not in small} == {448}
    assert set(plan_of(SUITES["vtab1k"], "native").image_sizes.values()) == {224}
    assert set(plan_of(SUITES["vtab1k"], "384").image_sizes.values()) == {384}


def test_auto_looks_at_images_that_nobody_knows(tmp_path: Path) -> None:
    for size in (95, 96):
        for split in ("train", "test"):
            folder = tmp_path / str(size) / split / "a"
            folder.mkdir(parents=True)
            for number in range(3):
                image = photograph()[number : number + size, :size]
                (folder / f"{number}.png").write_bytes(encode(image, "PNG"))
    task = dataclasses.replace(LOW, large=None)
    sides = {
        size: choose_image_size(
            task, "auto", SQUARE, [open_dataset(f"folder:{tmp_path}/{size}", "train")]
        )
        for size in (95, 96)
    }
    assert sides == {95: 16, 96: 32}


@pytest.mark.parametrize(
    ("wish", "about", "parts"),
    [
        ("230", ABOUT, ("image_size", "230", "patch_size", "16", "224", "240")),
        (
            "native",
            dataclasses.replace(SQUARE, image_size=(16, 32)),
            ("16", "32", "--image_size=16"),
        ),
    ],
)
def test_sizes_that_cannot_be(wish: str, about: Any, parts: tuple[str, ...]) -> None:
    with raises(UserError, *parts):
        choose_image_size(LOW, wish, about, [])


def test_runs_differ_in_what_the_protocol_varies() -> None:
    plan = plan_of(SUITES["avg5"], "native")
    task = AVG5[1]
    choosing, final = plan.choosing(task), plan.final(task, 0.03)
    assert list(choosing) == [0.003, 0.01, 0.03, 0.06]
    assert list(final) == [0, 1, 2]
    for rate, run in choosing.items():
        assert run.config.optimizer.learning_rate == rate
        assert (run.config.seed, run.config.dataset.train_split) == (0, "train[:98%]")
        assert {k: v.split for k, v in run.config.evals.items()} == {"validation": "train[98%:]"}
    for seed, run in final.items():
        assert (run.config.seed, run.config.optimizer.learning_rate) == (seed, 0.03)
        assert run.config.dataset.train_split == "train"
        assert {k: v.split for k, v in run.config.evals.items()} == {"test": "test"}
    folders = [run.folder for run in [*choosing.values(), *final.values()]]
    assert len(set(folders)) == 7
    # One rate needs no choosing.
    assert plan_of(SUITE, "native", SQUARE).choosing(LOW) == {}


def test_the_runs_are_those_of_the_fine_tuning_configs() -> None:
    for task in AVG5:
        for size in (224, 448):
            config = flatten(load_config(f"configs/finetune_{task.name}.py:{size}"))
            run = plan_of(SUITES["avg5"], str(size)).final(task, 0.01)[0]
            ours = flatten(run.config)
            differing = {key for key in config.keys() & ours.keys() if config[key] != ours[key]}
            assert differing <= {
                "init_from",
                "checkpoint.every_steps",
                "checkpoint.keep",
                "tensorboard",
                "evals.test.every_steps",
                # Nominal: for synthetic data.
                "dataset.num_classes",
                "dataset.num_examples",
            }, (task.name, size)


def test_real_is_scored_in_the_final_runs() -> None:
    (run, *_) = plan_of(SUITES["imagenet"], "native").final(AVG5[0], 0.03).values()
    assert {k: (v.dataset, v.split) for k, v in run.config.evals.items()} == {
        "test": ("", "validation"),
        "real": ("imagenet2012_real", "validation"),
    }


@pytest.mark.parametrize("key", ["seed", "optimizer.learning_rate", "evals.test.split"])
def test_keys_that_a_suite_sets_cannot_be_changed(key: str) -> None:
    with raises(UserError, f"--config.{key}=1"):
        check_overrides(((key, "1"),))


def test_rules_between_keys_are_checked_for_every_run() -> None:
    plan = plan_of(SUITE, "native", SQUARE)
    validate_run_configs(plan, SUITE.tasks)
    wrong = plan._replace(setting=plan.setting._replace(overrides=(("num_stepz", "1"),)))
    with raises(UserError, "config.num_stepz", "num_steps"):
        validate_run_configs(wrong, SUITE.tasks)
    wrong = plan._replace(setting=plan.setting._replace(overrides=(("num_steps", "0"),)))
    with raises(UserError, "config.num_steps", "config.num_epochs", "0"):
        validate_run_configs(wrong, SUITE.tasks)


def test_shares_are_disjoint_and_complete() -> None:
    suite = SUITES["vtab1k"]
    for count in (1, 2, 5, 19):
        shares = [select_tasks(suite, (), (number, count)) for number in range(1, count + 1)]
        names = sorted(task.name for share in shares for task in share)
        assert names == sorted(task.name for task in suite.tasks)
    with raises(UserError, "--shard=20/20", "19"):
        select_tasks(suite, (), (20, 20))
    with raises(UserError, "--tasks", "dtdd", "vtab1k", *(task.name for task in suite.tasks)):
        select_tasks(suite, ("dtd", "dtdd"), (1, 1))
    assert [task.name for task in select_tasks(suite, ("pets", "dtd"), (1, 1))] == ["dtd", "pets"]


def test_missing_data_are_told_before_anything_begins(tmp_path: Path, digits_dir: str) -> None:
    tasks = SUITES["avg5"].tasks
    data = open_task_data(tasks, str(tmp_path))
    with raises(UserError, "5", *(task.name for task in tasks), "--dry_run"):
        check_available(tasks, data)
    text = "\n".join(data.advice)
    assert mentions(text, f"python -m mixer_jax.prepare imagenet2012 --data_dir={tmp_path}")
    assert mentions(text, f"python -m mixer_jax.prepare cifar10 --data_dir={tmp_path}")
    # ImageNet's own words, on the files to put there.
    assert "ILSVRC2012_img_val.tar" in text
    mixed = (HIGH, AVG5[1])
    with raises(UserError, "1", "2", "cifar10", "--dry_run", "--tasks=high"):
        check_available(mixed, open_task_data(mixed, digits_dir))
    with raises(
        UserError, "cifar10", f"python -m mixer_jax.prepare cifar10 --data_dir={digits_dir}"
    ):
        check_available(mixed[1:], open_task_data(mixed[1:], digits_dir))


def test_data_of_another_size_are_noted_and_of_other_classes_refused(digits_dir: str) -> None:
    task = dataclasses.replace(HIGH, num_examples=(656, 73, 729, 168))
    data = open_task_data((task,), digits_dir)
    assert each_mentions(data.notes, ("digits/high", "test", "167", "168"))
    with raises(UserError, "high", "digits/high", "5", "6"):
        open_task_data((dataclasses.replace(HIGH, num_classes=6),), digits_dir)


@pytest.mark.parametrize(("name", "count", "runs"), [("vtab1k", 19, 114), ("avg5", 5, 35)])
def test_a_dry_run_tells_every_run(name: str, count: int, runs: int, tmp_path: Path) -> None:
    suite = SUITES[name]
    plan = plan_of(suite, "auto")
    data = open_task_data(suite.tasks, str(tmp_path))
    text = format_dry_run(plan, suite.tasks, data)
    assert some_line_mentions(text, str(count), str(runs))
    # Data that are missing are marked in the head of their task.
    nothing_missing = format_dry_run(plan, suite.tasks, data._replace(missing={})).split("\n")
    lines_of_runs = 0
    for task in suite.tasks:
        assert isinstance(task, FineTuneTask)
        (head,) = re.findall(rf"^{task.name}\b.*", text, re.MULTILINE)
        assert head not in nothing_missing
        test = (task.test_split, str(task.num_examples[3]))
        size = plan.image_sizes[task.name]
        assert mentions(head, task.dataset, str(task.num_classes), str(size), *test)
        # Lines of runs are indented.
        block = list(
            itertools.takewhile(
                lambda line: line.startswith(" "), text.split(f"\n{head}\n")[1].split("\n")
            )
        )
        assert len(block) == len(task.learning_rates) + 3
        for line, rate in zip(block, task.learning_rates, strict=False):
            splits = (task.choose_split, task.validation_split)
            assert mentions(line, f"{rate:g}", str(task.num_steps), *splits)
        for seed, line in enumerate(block[-3:]):
            assert re.search(rf"\bseed\W*{seed}\b", line)
            assert mentions(line, task.train_split, task.test_split)
        lines_of_runs += len(block)
    assert lines_of_runs == runs


def test_time_is_reckoned_by_formula(digits_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixer_jax.suites.dry_run.measure_matmul_flops", lambda: 2e9)
    suite = dataclasses.replace(SUITE, tasks=(LOW,))
    data = open_task_data((LOW,), digits_dir)
    text = format_dry_run(plan_of(suite, "native", SQUARE), suite.tasks, data)
    assert some_line_mentions(text, "1", "0 s", "50%")
    assert not data.missing
    assert "mixer_jax.prepare" not in text
    # At 1 GFLOP/s: 20,000 steps of 512 at three forwards of 89.1 GFLOP each, and what is scored.
    plan = plan_of(SUITES["imagenet"], "native")
    head = format_dry_run(plan, AVG5[:1], open_task_data((), "")._replace(missing={"imagenet": ""}))
    days = (7 * 3 * 20_000 * 512 + 3 * 100_000 + 4 * 12_812) * 89.1 / 86_400
    # Of the one task, and of all.
    told = [float(number.replace(",", "")) for number in re.findall(r"([\d,.]+) days\b", head)]
    assert told == [pytest.approx(days, rel=1e-3)] * 2


def test_training_time_is_read_off_the_metrics() -> None:
    lines = [
        # The first line after a start has no rate: it compiled.
        {"step": 10, "loss": 1.0},
        {"step": 20, "loss": 1.0, "images_per_second": 100.0, "images_per_second_per_device": 25.0},
        {"step": 20, "test/top1": 0.5},
        {"step": 40, "loss": 1.0, "images_per_second": 50.0, "images_per_second_per_device": 12.5},
    ]
    # Of 30 steps of 10 images: 10 at 100 images/s, 20 at 50; the 10 others like them.
    assert throughput.training_seconds(lines, 10) == pytest.approx((1 + 4) * 40 / 30)
    assert throughput.device_days(lines, 10) == pytest.approx((1 + 4) * 40 / 30 * 4 / 86_400)
    assert throughput.training_seconds(lines[:1], 10) == throughput.device_days(lines[:1], 10) == 0


def test_throughput_is_measured_at_the_best_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0, 32: 1.9, 64: 4.0, 128: 8.0}
    seen = []

    def time(classify: Any, params: Any, images: Any) -> float:
        seen.append(len(images))
        return seconds[len(images)]

    monkeypatch.setattr(throughput, "_time", time)
    measured = throughput.measure_throughput(random_weights())
    assert measured == throughput.Throughput(32 / 1.9, 32, "cpu", (16, 16))
    assert seen == [1, 2, 4, 8, 16, 32, 64]


def test_throughput_of_a_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_LARGEST_BATCH", 2)
    measured = throughput.measure_throughput(random_weights())
    assert measured.images_per_second > 100
    assert np.log2(measured.batch_size) % 1 == 0
