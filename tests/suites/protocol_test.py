"""Tests of running tasks: errors, locks and signals on one host and several; probe inputs."""

import dataclasses
import errno
import re
import signal
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import multihost_utils

from mixer_jax.data.registry import open_dataset
from mixer_jax.errors import (
    DiskFullError,
    NonFiniteError,
    OutputWriteError,
    UserError,
    WriteFailureError,
)
from mixer_jax.evaluation.probes import ProbeMetrics
from mixer_jax.suites import protocol, workdir
from mixer_jax.suites.protocol import (
    TaskContext,
    TaskInterruptedError,
    run_probe_task,
    run_tasks,
)
from mixer_jax.suites.tasks import Suite
from mixer_jax.suites.workdir import RunResult, read_result, save_result
from mixer_jax.training.loop import TrainResult
from mixer_jax.training.metrics import CURVES_FILE
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import random_weights
from tests.helpers.tiny_suite import HIGH, LOW, PROBE, make_plan

SUITE = Suite("two", "two", (LOW, HIGH))


class FakeMetrics:
    """Substitute for metrics, with the values that tasks need."""

    def as_dict(self) -> dict[str, float]:
        return {"top1": 0.5, "log_likelihood": -1.0, "num_examples": 10.0}


def train(config: Any, workdir: str, weights: Any, **options: Any) -> TrainResult:
    Path(workdir).mkdir(parents=True, exist_ok=True)
    scores: Any = {name: FakeMetrics() for name in config.evals}
    return TrainResult(6, 6, scores, None)


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskContext:
    weights = random_weights()
    monkeypatch.setattr(protocol, "train_and_evaluate", train)
    return TaskContext(make_plan(SUITE), str(tmp_path), weights, False, lambda text: None)


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch, folder: str = "") -> None:
    def fail(config: Any, workdir: str, weights: Any, **options: Any) -> TrainResult:
        if folder in workdir:
            raise error
        return train(config, workdir, weights)

    monkeypatch.setattr(protocol, "train_and_evaluate", fail)


def test_run_tasks_label_runs_and_draw_their_curves_within_training(
    context: TaskContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, dict[str, Any]] = {}

    def record(config: Any, workdir: str, weights: Any, **options: Any) -> TrainResult:
        calls[workdir] = options
        return train(config, workdir, weights)

    monkeypatch.setattr(protocol, "train_and_evaluate", record)
    assert run_tasks(context, SUITE.tasks) == {}
    assert len(calls) > len(SUITE.tasks)
    for folder, options in calls.items():
        name = Path(folder).relative_to(context.workdir).as_posix()
        assert options["label"] == (name, Path(context.workdir).name)
        assert options["plot"] is protocol.save_curves
        assert not Path(folder, CURVES_FILE).exists()


def simulate_two_hosts(monkeypatch: pytest.MonkeyPatch, other: bool = False) -> None:
    """Makes this process the first of two hosts, the second of which answers `other`."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(protocol, "any_host", lambda flag: flag or other)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda tree: tree)


@pytest.mark.parametrize("error", [MemoryError("no room"), UserError("bad image")])
def test_run_tasks_raises_errors_that_may_be_local_to_a_host(
    error: Exception, context: TaskContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(error, monkeypatch, folder="/low/")
    assert list(run_tasks(context, SUITE.tasks)) == ["low"]
    simulate_two_hosts(monkeypatch)
    with pytest.raises(type(error), match=str(error)):
        run_tasks(context, SUITE.tasks)


def test_run_tasks_continues_after_divergence_on_several_hosts(
    context: TaskContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate_two_hosts(monkeypatch)
    fail_with(NonFiniteError("loss is nan"), monkeypatch, folder="/low/")
    failures = run_tasks(context, SUITE.tasks)
    assert list(failures) == ["low"]
    assert re.search(r"\bseed\W*0\b", failures["low"])
    assert mentions(failures["low"], "loss is nan")
    assert read_result(f"{context.workdir}/high/final/seed=1") is not None


def test_run_tasks_retries_a_diverged_final_run(
    context: TaskContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(NonFiniteError("loss is nan"), monkeypatch, folder="/final/")
    assert set(run_tasks(context, SUITE.tasks)) == {"low", "high"}
    assert read_result(f"{context.workdir}/low/final/seed=0") is None
    # Earlier versions recorded it.
    save_result(f"{context.workdir}/low/final/seed=0", RunResult({}, 1.0, "loss is nan"))
    monkeypatch.setattr(protocol, "train_and_evaluate", train)
    assert run_tasks(context, SUITE.tasks) == {}


@pytest.mark.parametrize(
    ("error", "error_type"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError),
        (OSError(errno.EROFS, "Read-only file system"), OutputWriteError),
        (OSError(errno.EIO, "Input/output error"), WriteFailureError),
    ],
)
def test_run_tasks_raises_if_a_result_cannot_be_written(
    error: OSError,
    error_type: type[Exception],
    context: TaskContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: Any, text: str) -> None:
        raise error

    monkeypatch.setattr(workdir, "atomic_write", refuse)
    with raises(error_type, f"{context.workdir}/low/final/seed=0", str(error.strerror)):
        run_tasks(context, SUITE.tasks)


@pytest.mark.parametrize("other", [False, True])
def test_run_tasks_stops_all_hosts_after_a_signal_in_the_last_step(
    other: bool, context: TaskContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal arrives during the first run of the second task, here or on the other host."""

    def receive(config: Any, workdir: str, weights: Any, **options: Any) -> TrainResult:
        result = train(config, workdir, weights)
        received = "learning_rate=0.01" in workdir
        if other and received:
            monkeypatch.setattr(protocol, "any_host", lambda flag: True)
        return result._replace(stopped_by=signal.SIGTERM if received and not other else None)

    simulate_two_hosts(monkeypatch)
    monkeypatch.setattr(protocol, "train_and_evaluate", receive)
    with pytest.raises(TaskInterruptedError) as stopped:
        run_tasks(context, SUITE.tasks)
    assert stopped.value.received == (None if other else signal.SIGTERM)
    # Completed runs are recorded, and no other run was started.
    done = sorted(path.parent.name for path in Path(context.workdir).rglob("result.json"))
    assert done == ["learning_rate=0.01", "seed=0"]


def test_run_tasks_leaves_no_empty_folder_if_a_dataset_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tuple(dataclasses.replace(task, dataset="cifar10") for task in (LOW, PROBE))
    plan = make_plan(Suite("missing", "", tasks), data_dir=str(tmp_path / "data"))
    one, two = tmp_path / "one", tmp_path / "two"
    context = TaskContext(plan, str(one), random_weights(), False, lambda text: None)
    assert set(run_tasks(context, tasks)) == {"low", "probe"}
    left = sorted(path.relative_to(one).as_posix() for path in one.rglob("*"))
    assert left == ["low", "low/failed.txt", "probe", "probe/failed.txt"]
    # Several hosts end with the first error.
    simulate_two_hosts(monkeypatch)
    with raises(UserError, "cifar10"):
        run_tasks(context._replace(workdir=str(two)), tasks)
    assert not list(two.rglob("*"))


OVERRIDES = (
    ("loader.num_threads", "3"),
    ("loader.prefetch_batches", "5"),
    ("eval_batch_size", "24"),
    ("bad_images.skip_in_evaluation", "true"),
    ("mesh.fsdp", "2"),
)


@pytest.mark.parametrize(
    ("overrides", "expected", "fsdp"),
    [
        ((), {"batch_size": 256, "skip_bad": False, "num_threads": 0, "prefetch_batches": 2}, 1),
        (
            OVERRIDES,
            {"batch_size": 24, "skip_bad": True, "num_threads": 3, "prefetch_batches": 5},
            2,
        ),
    ],
)
def test_run_probe_task_obeys_overrides(
    overrides: Any,
    expected: Any,
    fsdp: int,
    digits_dir: str,
    context: TaskContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Any, ...]] = []

    def run_probe(*args: Any) -> ProbeMetrics:
        calls.append(args)
        return ProbeMetrics("few_shot", {"1_shot": 0.5}, {}, None, 10, 20)

    monkeypatch.setattr(protocol, "run_probe", run_probe)
    plan = make_plan(data_dir=digits_dir, overrides=overrides)
    run_probe_task(context._replace(plan=plan), PROBE)
    ((*_, mesh, input_config),) = calls
    found = input_config._asdict()
    assert {name: found[name] for name in expected} == expected
    assert mesh.shape["fsdp"] == fsdp


def test_run_probe_task_lists_the_images_once_for_all_hosts(
    digits_dir: str, context: TaskContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process is the second of two hosts, and the data are those of the first."""
    plan = make_plan(data_dir=digits_dir)
    splits = (PROBE.train_split, PROBE.test_split)
    results = [["checkpoint"], [open_dataset(PROBE.dataset, split, digits_dir) for split in splits]]
    expected = results[1]
    monkeypatch.setattr(protocol, "compute_once", lambda compute: results.pop(0))
    monkeypatch.setattr(protocol, "is_primary_process", lambda: False)
    monkeypatch.delattr(protocol, "open_dataset")
    probed: list[Any] = []

    def run_probe(*args: Any) -> ProbeMetrics:
        probed.extend(args[3:5])
        return ProbeMetrics("few_shot", {"1_shot": 0.5}, {}, None, 10, 20)

    monkeypatch.setattr(protocol, "run_probe", run_probe)
    run_probe_task(context._replace(plan=plan), PROBE)
    assert probed == expected
