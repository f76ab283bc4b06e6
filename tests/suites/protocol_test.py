"""Tests of what ends a suite, or a task alone: errors, locks, signals, on one host and several."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import jax
import pytest

from mixer_jax.errors import NonFiniteError, OutputWriteError, UserError
from mixer_jax.files import file_lock
from mixer_jax.suites import protocol, results
from mixer_jax.suites.plan import TransferPlan
from mixer_jax.suites.protocol import TaskContext, TaskInterruptedError, run_tasks
from mixer_jax.suites.results import read_result, save_result
from mixer_jax.suites.run_configs import SuiteSettings
from mixer_jax.suites.tasks import Suite
from mixer_jax.training.loop import TrainResult
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import random_weights
from tests.helpers.tiny_suite import HIGH, LOW

SUITE = Suite("two", "two", (LOW, HIGH))


class FakeScores:
    """Stands in for scores, which only their values matter of."""

    def as_dict(self) -> dict[str, float]:
        return {"top1": 0.5, "log_likelihood": -1.0, "num_examples": 10.0}


def train(config: Any, workdir: str, weights: Any) -> TrainResult:
    scores: Any = {name: FakeScores() for name in config.evals}
    return TrainResult(6, 6, scores, None)


@pytest.fixture
def doing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskContext:
    weights = random_weights()
    sizes = {task.name: 16 for task in SUITE.tasks}
    plan = TransferPlan(SUITE, SuiteSettings("weights", weights.model_info), sizes)
    monkeypatch.setattr(protocol, "train_and_evaluate", train)
    return TaskContext(plan, str(tmp_path), weights, False, lambda text: None)


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch, of: str = "") -> None:
    def fail(config: Any, workdir: str, weights: Any) -> TrainResult:
        if of in workdir:
            raise error
        return train(config, workdir, weights)

    monkeypatch.setattr(protocol, "train_and_evaluate", fail)


def be_one_of_two(monkeypatch: pytest.MonkeyPatch, other: bool = False) -> None:
    """Makes this process the first of two hosts, whose second answers `other`."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(protocol, "any_host", lambda flag: flag or other)


@pytest.mark.parametrize("error", [MemoryError("no room"), UserError("bad image")])
def test_an_error_that_other_hosts_may_not_have_met_ends_the_program(
    error: Exception, doing: TaskContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(error, monkeypatch, of="/low/")
    assert list(run_tasks(doing, SUITE.tasks)) == ["low"]
    be_one_of_two(monkeypatch)
    with pytest.raises(type(error), match=str(error)):
        run_tasks(doing, SUITE.tasks)


def test_divergence_is_known_to_all_hosts(
    doing: TaskContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_one_of_two(monkeypatch)
    fail_with(NonFiniteError("loss is nan"), monkeypatch, of="/low/")
    failures = run_tasks(doing, SUITE.tasks)
    assert list(failures) == ["low"]
    assert re.search(r"\bseed\W*0\b", failures["low"])
    assert mentions(failures["low"], "loss is nan")
    assert read_result(f"{doing.workdir}/high/final/seed=1") is not None


def test_a_final_run_that_diverged_is_tried_again(
    doing: TaskContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(NonFiniteError("loss is nan"), monkeypatch, of="/final/")
    assert set(run_tasks(doing, SUITE.tasks)) == {"low", "high"}
    assert read_result(f"{doing.workdir}/low/final/seed=0") is None
    # As an earlier version kept it.
    save_result(f"{doing.workdir}/low/final/seed=0", results.RunResult({}, 1.0, "loss is nan"))
    monkeypatch.setattr(protocol, "train_and_evaluate", train)
    assert run_tasks(doing, SUITE.tasks) == {}


def test_a_result_that_cannot_be_written_ends_the_program(
    doing: TaskContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Any, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "atomic_write", refuse)
    with raises(OutputWriteError, f"{doing.workdir}/low/final/seed=0", "No space left on device"):
        run_tasks(doing, SUITE.tasks)


@pytest.mark.parametrize("other", [False, True])
def test_a_signal_in_the_last_step_stops_all_hosts(
    other: bool, doing: TaskContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run of the second task is ended by it, here or on the other host."""

    def hear(config: Any, workdir: str, weights: Any) -> TrainResult:
        ended = train(config, workdir, weights)
        heard = "learning_rate=0.01" in workdir
        if other and heard:
            monkeypatch.setattr(protocol, "any_host", lambda flag: True)
        return ended._replace(stopped_by=signal.SIGTERM if heard and not other else None)

    be_one_of_two(monkeypatch)
    monkeypatch.setattr(protocol, "train_and_evaluate", hear)
    with pytest.raises(TaskInterruptedError) as stopped:
        run_tasks(doing, SUITE.tasks)
    assert stopped.value.received == (None if other else signal.SIGTERM)
    # What had ended stays, and nothing else was begun.
    done = sorted(path.parent.name for path in Path(doing.workdir).rglob("result.json"))
    assert done == ["learning_rate=0.01", "seed=0"]


def test_a_task_that_another_program_does_is_left_alone(doing: TaskContext, tmp_path: Path) -> None:
    failed = tmp_path / "low" / "failed.txt"
    with file_lock(tmp_path / "low" / ".lock"):
        failed.write_text("the other's\n")
        failures = run_tasks(doing, SUITE.tasks)
        assert list(failures) == ["low"]
        assert mentions(failures["low"], "--workdir", "--shard")
        assert failed.read_text() == "the other's\n"
        assert not (tmp_path / "low" / "final").exists()
    assert run_tasks(doing, SUITE.tasks) == {}
    assert not failed.exists()
    assert not list(tmp_path.rglob(".lock"))


def test_a_task_that_is_locked_on_the_first_host_is_left_by_all(
    doing: TaskContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_one_of_two(monkeypatch, other=True)
    monkeypatch.setattr(protocol, "is_primary_process", lambda: False)
    assert set(run_tasks(doing, SUITE.tasks)) == {"low", "high"}


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
def test_a_result_without_what_is_needed(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with raises(UserError, f"{tmp_path}/result.json"):
        read_result(str(tmp_path), ["test"])
