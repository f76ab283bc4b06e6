"""Tests of the result store of a suite."""

import json
from pathlib import Path

import pytest

from mixer_jax.errors import UserError
from mixer_jax.suites.results import (
    RunResult,
    Throughput,
    read_result,
    read_throughput,
    save_result,
    save_throughput,
    select_learning_rate,
)
from tests.helpers.messages import raises


def test_select_learning_rate_by_accuracy_then_likelihood_then_lower_rate() -> None:
    def run(top1: float, likelihood: float = -1.0, failed: str = "") -> RunResult:
        return RunResult(
            {"validation": {"top1": top1, "log_likelihood": likelihood, "num_examples": 100}},
            1.0,
            failed,
        )

    assert select_learning_rate({0.1: run(0.5), 0.2: run(0.6), 0.3: run(0.4)}) == 0.2
    assert select_learning_rate({0.1: run(0.5, -2.0), 0.2: run(0.5, -1.0)}) == 0.2
    assert select_learning_rate({0.2: run(0.5), 0.1: run(0.5)}) == 0.1
    assert select_learning_rate({0.1: run(0.4), 0.2: run(0.9, failed="diverged")}) == 0.1
    assert select_learning_rate({0.1: run(0.4, failed="diverged")}) is None


def test_read_result_restores_what_save_result_wrote(tmp_path: Path) -> None:
    scores = {"test": {"top1": 0.5, "log_likelihood": -1.0, "num_examples": 10.0}}
    folder = f"{tmp_path}/task/final/seed=0"
    assert read_result(folder) is None
    save_result(folder, RunResult(scores, 1.5))
    assert read_result(folder, ["test"]) == RunResult(scores, 1.5)


def test_read_throughput_restores_what_save_throughput_wrote(tmp_path: Path) -> None:
    assert read_throughput(str(tmp_path)) is None
    throughput = Throughput(1234.5, 64, "TPU v4", (224, 448))
    save_throughput(str(tmp_path), throughput)
    assert read_throughput(str(tmp_path)) == throughput


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps({"scores": {}, "seconds": 1.0}),
        json.dumps({"scores": {"test": {"top1": 0.5}}, "seconds": 1.0}),
        json.dumps({"scores": {"test": 0.5}, "seconds": 1.0}),
        json.dumps({"scores": {"test": {"top1": "a"}}, "seconds": 1.0}),
        json.dumps({"scores": {}, "seconds": None, "failed": "loss is nan"}),
    ],
)
def test_read_result_rejects_damaged_or_incomplete_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with raises(UserError, f"{tmp_path}/result.json"):
        read_result(str(tmp_path), ["test"])
