"""Tests of the cost of a suite: dry run, search for the batch size, duration of training."""

import dataclasses
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax.suites import cost
from mixer_jax.suites.builtin import AVG5, SUITES
from mixer_jax.suites.cost import format_dry_run
from mixer_jax.suites.datasets import choose_image_size, open_task_data
from mixer_jax.suites.tasks import FineTuneTask
from tests.helpers.lines import some_line_mentions
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import random_weights
from tests.helpers.tiny_suite import LARGE_INFO, LOW, SUITE, make_plan


@pytest.mark.parametrize(("name", "count", "runs"), [("vtab1k", 19, 114), ("avg5", 5, 35)])
def test_format_dry_run_lists_every_run(name: str, count: int, runs: int, tmp_path: Path) -> None:
    suite = SUITES[name]
    plan = make_plan(suite, model_info=LARGE_INFO)
    for task in suite.tasks:
        plan.image_sizes[task.name] = choose_image_size(task, "auto", LARGE_INFO, [])
    data = open_task_data(suite.tasks, str(tmp_path))
    text = format_dry_run(plan, suite.tasks, data)
    assert some_line_mentions(text, str(count), str(runs))
    # Missing data are marked in the first line of a task.
    nothing_missing = format_dry_run(plan, suite.tasks, data._replace(missing={})).split("\n")
    num_lines = 0
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
            splits = (task.sweep_train_split, task.sweep_val_split)
            assert mentions(line, f"{rate:g}", str(task.num_steps), *splits)
        for seed, line in enumerate(block[-3:]):
            assert re.search(rf"\bseed\W*{seed}\b", line)
            assert mentions(line, task.train_split, task.test_split)
        num_lines += len(block)
    assert num_lines == runs


def test_format_dry_run_estimates_time_by_formula(
    digits_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "measure_matmul_flops", lambda: 2e9)
    suite = dataclasses.replace(SUITE, tasks=(LOW,))
    data = open_task_data((LOW,), digits_dir)
    text = format_dry_run(make_plan(suite), suite.tasks, data)
    assert some_line_mentions(text, "1", "0 s", "50%")
    assert not data.missing
    assert "mixer_jax.prepare" not in text
    # At 1 GFLOP/s: 20,000 steps of 512 images at three forward passes of 89.1 GFLOP, and the
    # evaluations.
    plan = make_plan(SUITES["imagenet"], 224, model_info=LARGE_INFO)
    text = format_dry_run(plan, AVG5[:1], open_task_data((), "")._replace(missing={"imagenet": ""}))
    days = (7 * 3 * 20_000 * 512 + 3 * 100_000 + 4 * 12_812) * 89.1 / 86_400
    # Once for the task and once for the suite.
    found = [float(number.replace(",", "")) for number in re.findall(r"([\d,.]+) days\b", text)]
    assert found == [pytest.approx(days, rel=1e-3)] * 2


def test_format_dry_run_counts_flops_of_the_resized_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four times the patches take more than four times the FLOPs: the token MLPs are wider too."""
    monkeypatch.setattr(cost, "measure_matmul_flops", lambda: 2e9)
    texts = [
        format_dry_run(
            make_plan(SUITES["imagenet"], size, model_info=LARGE_INFO),
            AVG5[:1],
            open_task_data((), "")._replace(missing={"imagenet": ""}),
        )
        for size in (224, 448)
    ]
    first, second = (
        float(re.findall(r"([\d,.]+) days\b", text)[-1].replace(",", "")) for text in texts
    )
    assert second > 4 * first


def fake_seconds(capacity: int, message: str) -> Callable[..., float]:
    """Returns a replacement of `_median_seconds` that fails above a batch size."""

    def median_seconds(compute: Any, params: Any, images: jax.Array, min_seconds: float) -> float:
        if len(images) > capacity:
            raise jax.errors.JaxRuntimeError(message)
        return 0.25

    return median_seconds


@pytest.mark.parametrize(
    ("capacity", "expected"), [(0, (0.0, 0)), (1, (4.0, 1)), (40, (128.0, 32)), (99, (128.0, 32))]
)
def test_measure_throughput_stops_when_memory_is_full(
    capacity: int, expected: tuple[float, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "RESOURCE_EXHAUSTED: Out of memory allocating 12288 bytes."
    monkeypatch.setattr(cost, "_median_seconds", fake_seconds(capacity, message))
    monkeypatch.setattr(cost, "_MAX_BATCH_SIZE", 32)
    assert cost.measure_throughput(random_weights())[:2] == expected


def test_measure_throughput_has_a_result_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_median_seconds", fake_seconds(2, "RESOURCE_EXHAUSTED"))
    monkeypatch.setattr(cost, "_SEARCH_SECONDS", -1.0)
    assert cost.measure_throughput(random_weights())[:2] == (8.0, 2)


@pytest.mark.parametrize("capacity", [0, 20])
def test_measure_throughput_raises_other_errors(
    capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_median_seconds", fake_seconds(capacity, "INTERNAL: no such kernel"))
    with raises(jax.errors.JaxRuntimeError, "no such kernel"):
        cost.measure_throughput(random_weights())


def test_measure_throughput_of_a_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_MAX_BATCH_SIZE", 16)
    measured = cost.measure_throughput(random_weights())
    assert measured.images_per_second > 100
    assert np.log2(measured.batch_size) % 1 == 0
    assert measured[2:] == ("cpu", (16, 16))


def test_training_seconds_extrapolates_to_steps_without_a_rate() -> None:
    lines = [
        # The first line after a start has no rate, because it compiled.
        {"step": 10, "loss": 1.0},
        {"step": 20, "loss": 1.0, "images_per_second": 100.0, "images_per_second_per_device": 25.0},
        {"step": 20, "test/top1": 0.5},
        {"step": 40, "loss": 1.0, "images_per_second": 50.0, "images_per_second_per_device": 12.5},
    ]
    # 30 steps of 10 images: 10 at 100 images/s, 20 at 50; the other 10 at their mean.
    assert cost.training_seconds(lines, 10) == pytest.approx((1 + 4) * 40 / 30)
    assert cost.device_days(lines, 10) == pytest.approx((1 + 4) * 40 / 30 * 4 / 86_400)
    assert cost.training_seconds(lines[:1], 10) == cost.device_days(lines[:1], 10) == 0
