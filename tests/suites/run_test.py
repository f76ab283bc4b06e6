"""Tests of whole suites: selection, resumption, failures, the plan and its provenance."""

import dataclasses
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from mixer_jax import evaluate
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.resolve import resolve_checkpoint
from mixer_jax.checkpoints.weights import params_digest
from mixer_jax.errors import NonFiniteError, UserError
from mixer_jax.models.bit_config import BitConfig
from mixer_jax.models.vit_config import VitConfig
from mixer_jax.suites import protocol
from mixer_jax.suites import run as run_lib
from mixer_jax.suites.datasets import open_task_data
from mixer_jax.suites.plan import TransferPlan
from mixer_jax.suites.run import (
    TransferOutcome,
    TransferRequest,
    make_plan,
    run_suite,
)
from mixer_jax.suites.tasks import Suite
from mixer_jax.suites.workdir import read_plan
from tests.helpers.lines import each_mentions, some_line_mentions
from tests.helpers.messages import mentions, raises
from tests.helpers.random_weights import random_weights, save_run
from tests.helpers.tiny_suite import HIGH, LOW, PROBE, SUITE, save_weights
from tests.suites.datasets_test import make_folder
from tests.suites.tasks_test import replace_fields


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_weights(tmp_path_factory.mktemp("weights"))


def make_request(
    checkpoint: str, workdir: Path, data_dir: str, suite: Suite = SUITE, **fields: Any
) -> TransferRequest:
    defaults: dict[str, Any] = {
        "overrides": (),
        "image_size": "native",
        "tasks": (),
        "shard": (1, 1),
        "dry_run": False,
        "keep_checkpoints": False,
        "throughput": False,
        "pretrain_dataset": "",
    }
    return TransferRequest(
        suite=suite,
        checkpoint=resolve_checkpoint(checkpoint),
        workdir=str(workdir),
        data_dir=data_dir,
        **(defaults | fields),
    )


def run(*args: Any, **fields: Any) -> TransferOutcome:
    return run_suite(make_request(*args, **fields))


def read_results(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "results.json").read_text())


def rows_without_minutes(workdir: Path) -> list[dict[str, Any]]:
    rows = read_results(workdir)["rows"]
    return [{name: value for name, value in row.items() if name != "minutes"} for row in rows]


def read_run(workdir: Path, folder: str) -> dict[str, Any]:
    return json.loads((workdir / folder / "result.json").read_text())


@pytest.fixture(scope="module")
def completed(weights: str, digits_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workdir of a completed suite."""
    workdir = tmp_path_factory.mktemp("suite")
    assert run(weights, workdir, digits_dir, keep_checkpoints=True) == TransferOutcome({})
    return workdir


@pytest.mark.slow
def test_run_suite_selects_the_best_rate_and_evaluates_every_seed(completed: Path) -> None:
    sweep = {}
    for rate in HIGH.learning_rates:
        found = read_run(completed, f"high/choose/learning_rate={rate:g}")["scores"]["validation"]
        assert found["num_examples"] == 73
        sweep[rate] = (found["top1"], found["log_likelihood"])
    row = read_results(completed)["rows"][0]
    assert row["task"] == "high"
    assert row["learning_rate"] == max(sweep, key=lambda rate: sweep[rate])
    final = [
        read_run(completed, f"high/final/seed={seed}")["scores"]["test"] for seed in HIGH.seeds
    ]
    accuracies = [100 * scores["top1"] for scores in final]
    assert row["mean"] == pytest.approx(statistics.mean(accuracies), abs=1e-12)
    assert row["std"] == pytest.approx(statistics.stdev(accuracies), abs=1e-12)
    assert [row["runs"], row["num_examples"]] == [2, 167]
    assert accuracies[0] != accuracies[1]


@pytest.mark.slow
def test_run_suite_trains_with_the_protocol(completed: Path) -> None:
    for folder, split, seed in [
        ("high/choose/learning_rate=0.01", "train[:90%]", 0),
        ("high/final/seed=1", "train", 1),
    ]:
        config = json.loads((completed / folder / "config.json").read_text())
        assert config["dataset"]["train_split"] == split
        assert config["seed"] == seed
        assert (config["num_steps"], config["init_head"]) == (6, "new")


BIT_FIELDS: dict[str, Any] = {
    "num_steps": 4,
    "learning_rates": (0.003,),
    "train_crop": "bilinear_crop",
    "image_size": 12,
    "resize_size": 16,
    "config_overrides": {
        "recipe.mixup": 0.1,
        "optimizer.decay_type": "staircase",
        "optimizer.decay_points": "0.4,0.8",
        "optimizer.clip_norm": 0.0,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (VitConfig(1, 4, 16, 24, 2, pre_logits=True), (6, "cosine", 0.0, 16, "random_shift")),
        (BitConfig("1,1", 8, "3x3"), (4, "staircase", 0.1, 12, "bilinear_crop")),
    ],
    ids=["vit", "bit"],
)
def test_run_suite_of_another_family(
    config: Any, expected: tuple[Any, ...], digits_dir: str, tmp_path: Path
) -> None:
    """Fine-tunes by the family's protocol, and fits every probe."""
    task = replace_fields(LOW, model_overrides={"bit": BIT_FIELDS})
    probes = [
        replace_fields(PROBE, name=method, method=method)
        for method in ("few_shot", "linear", "knn")
    ]
    suite = Suite("tiny", "digits, quickly", (task, *probes))
    checkpoint = save_run(random_weights(config), tmp_path / "weights")
    assert run(checkpoint, tmp_path / "suite", digits_dir, suite) == TransferOutcome({})
    rows = read_results(tmp_path / "suite")["rows"]
    assert [row["task"] for row in rows if row["mean"] is None] == []
    assert len(rows) == 5  # The few-shot probe has two.
    saved = json.loads((tmp_path / "suite" / "low/final/seed=0/config.json").read_text())
    assert (
        saved["num_steps"],
        saved["optimizer"]["decay_type"],
        saved["recipe"]["mixup"],
        saved["image_size"],
        saved["preprocess"]["train_crop"],
    ) == expected
    # The saved suite has the protocol that was used, and is completed.
    assert run(checkpoint, tmp_path / "suite", digits_dir, suite) == TransferOutcome({})
    with raises(UserError, "low.num_steps", "7"):
        other = replace_fields(LOW, num_steps=7)
        run(
            checkpoint,
            tmp_path / "suite",
            digits_dir,
            Suite(suite.name, suite.title, (other, *probes)),
        )


@pytest.mark.slow
def test_scores_equal_those_of_the_evaluate_command(
    completed: Path, digits_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = "high/final/seed=1"
    arguments = [f"--checkpoint={completed / folder}", f"--data_dir={digits_dir}", "--json"]
    assert evaluate.main(arguments) == 0
    evaluated = json.loads(capsys.readouterr().out)
    scores = read_run(completed, folder)["scores"]["test"]
    assert evaluated["top1"] == scores["top1"]
    assert evaluated["num_examples"] == 167


@pytest.mark.slow
def test_run_suite_skips_completed_runs_and_deletes_checkpoints(
    weights: str, digits_dir: str, completed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows_without_minutes(completed)
    checkpoints = [path for path in completed.rglob("checkpoints") if path.is_dir()]
    assert len(checkpoints) == 5

    def refuse(*arguments: object, **options: object) -> None:
        pytest.fail("a completed run is repeated")

    monkeypatch.setattr(protocol, "train_and_evaluate", refuse)
    monkeypatch.setattr("mixer_jax.suites.protocol.run_probe", refuse)
    assert run(weights, completed, digits_dir, keep_checkpoints=True) == TransferOutcome({})
    assert rows_without_minutes(completed) == before
    assert all(path.exists() for path in checkpoints)
    copy = completed.parent / f"{completed.name}_copy"
    shutil.copytree(completed, copy)
    assert run(weights, copy, digits_dir) == TransferOutcome({})
    assert rows_without_minutes(copy) == before
    assert not list(copy.rglob("checkpoints"))


@pytest.mark.slow
def test_run_suite_rejects_the_workdir_of_another_suite(
    weights: str, digits_dir: str, completed: Path
) -> None:
    before = (completed / "suite.json").read_text()
    longer = dataclasses.replace(SUITE, tasks=(dataclasses.replace(HIGH, num_steps=7), LOW, PROBE))
    with raises(UserError, str(completed), "suite.tasks.high.num_steps", "6", "7", "--workdir"):
        run(weights, completed, digits_dir, suite=longer)
    with raises(UserError, str(completed), "image_sizes.high", "16", "32"):
        run(weights, completed, digits_dir, image_size="32")
    overrides = (("optimizer.momentum", "0.5"),)
    with raises(UserError, str(completed), "overrides.optimizer.momentum", "0.5"):
        run(weights, completed, digits_dir, overrides=overrides)
    assert (completed / "suite.json").read_text() == before


@pytest.mark.slow
def test_run_suite_reports_changes_of_resumable_keys(
    weights: str,
    digits_dir: str,
    completed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(completed, copy)
    threads = (("loader.num_threads", "1"),)
    # All runs are complete.
    assert run(
        weights, copy, digits_dir, overrides=threads, keep_checkpoints=True
    ) == TransferOutcome({})
    assert some_line_mentions(capsys.readouterr().out, "loader.num_threads", "1")
    assert rows_without_minutes(copy) == rows_without_minutes(completed)


@pytest.mark.slow
def test_run_suite_does_not_select_a_diverging_rate(
    weights: str, digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = dataclasses.replace(HIGH, seeds=(0,), learning_rates=(0.01, 1e30))
    suite = dataclasses.replace(SUITE, tasks=(task,))
    assert run(weights, tmp_path, digits_dir, suite=suite) == TransferOutcome({})
    failed = read_run(tmp_path, "high/choose/learning_rate=1e+30")["failed"]
    assert re.search(r"\b(loss|\w+_norm)\b.*\b(nan|inf)\b.*\bstep\W*\d\b", failed)
    (row,) = read_results(tmp_path)["rows"]
    assert row["learning_rate"] == 0.01
    assert row["std"] is None
    # It is not retried, because it would diverge again.
    monkeypatch.setattr(protocol, "train_and_evaluate", lambda *_, **__: pytest.fail("repeated"))
    assert run(weights, tmp_path, digits_dir, suite=suite) == TransferOutcome({})


@pytest.mark.slow
def test_run_suite_continues_after_a_failed_task_and_retries_it(
    weights: str,
    digits_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = protocol.train_and_evaluate
    other = dataclasses.replace(LOW, name="high", dataset="digits/high")
    suite = dataclasses.replace(SUITE, tasks=(other, LOW))

    def fail(config: Any, workdir: str, weights: Any, **options: Any) -> Any:
        if config.dataset.name == "digits/high":
            raise MemoryError("no room\nfor it")
        return train(config, workdir, weights, **options)

    monkeypatch.setattr(protocol, "train_and_evaluate", fail)
    failures = run(weights, tmp_path, digits_dir, suite=suite).failures
    assert list(failures) == ["high"]
    assert mentions(failures["high"], "MemoryError", "no room for it")
    assert some_line_mentions(capsys.readouterr().out, "high", failures["high"])
    assert "Traceback" in (tmp_path / "high" / "failed.txt").read_text()
    high, low, mean = read_results(tmp_path)["rows"]
    assert (high["mean"], high["failed"]) == (None, failures["high"])
    assert low["mean"] is not None
    assert mean["mean"] is None
    monkeypatch.setattr(protocol, "train_and_evaluate", train)
    assert run(weights, tmp_path, digits_dir, suite=suite) == TransferOutcome({})
    assert [row["mean"] is None for row in read_results(tmp_path)["rows"]] == [False] * 3
    assert not list(tmp_path.rglob("failed.txt"))


@pytest.mark.slow
def test_run_suite_fails_a_task_if_every_rate_diverges(
    weights: str, digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*arguments: Any, **options: Any) -> None:
        raise NonFiniteError("loss is nan at step 1")

    monkeypatch.setattr(protocol, "train_and_evaluate", diverge)
    suite = dataclasses.replace(SUITE, tasks=(HIGH, PROBE))
    failures = run(weights, tmp_path, digits_dir, suite=suite).failures
    assert mentions(failures["high"], "0.01", "0.1", "loss is nan at step 1")
    high, *probe = read_results(tmp_path)["rows"]
    assert high["failed"] == failures["high"]
    assert [row["mean"] is None for row in probe] == [False, False]


@pytest.mark.slow
def test_run_suite_applies_overrides_to_one_task(
    weights: str, digits_dir: str, tmp_path: Path
) -> None:
    overrides = (("num_steps", "3"), ("optimizer.momentum", "0.5"))
    arguments: dict[str, Any] = {"tasks": ("low",), "overrides": overrides, "image_size": "32"}
    assert run(weights, tmp_path, digits_dir, **arguments) == TransferOutcome({})
    config = json.loads((tmp_path / "low" / "final" / "seed=0" / "config.json").read_text())
    assert (config["num_steps"], config["image_size"]) == (3, 32)
    assert config["optimizer"]["momentum"] == 0.5
    notes = "\n".join(read_results(tmp_path)["notes"])
    assert some_line_mentions(notes, "num_steps", "3")
    assert some_line_mentions(notes, "optimizer.momentum", "0.5")


class EnoughError(Exception):
    """Ends a suite as soon as the test has what it needs."""


def test_run_suite_records_the_digest_of_the_weights(
    digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise EnoughError

    monkeypatch.setattr(run_lib, "run_tasks", stop)
    source, workdir = save_weights(tmp_path), tmp_path / "suite"
    with pytest.raises(EnoughError):
        run(source, workdir, digits_dir)
    saved = read_plan(str(workdir))
    assert saved is not None
    assert saved.digest == params_digest(load_checkpoint(source).params)
    shutil.rmtree(source)
    save_run(random_weights(seed=1), Path(source))
    with raises(UserError, str(workdir), source, "--workdir"):
        run(source, workdir, digits_dir)


def test_run_suite_initializes_distributed_as_configured(
    weights: str, digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def initialize(mode: str, timeout_seconds: int) -> None:
        assert timeout_seconds == 300
        modes.append(mode)
        raise EnoughError

    monkeypatch.setattr(run_lib.multihost, "initialize_distributed", initialize)
    for overrides in ((), (("distributed", "no"),)):
        with pytest.raises(EnoughError):
            run(weights, tmp_path, digits_dir, overrides=overrides)
    assert modes == ["auto", "no"]


@pytest.mark.parametrize("dry_run", [False, True])
def test_run_suite_checks_shots_before_anything_is_written(
    dry_run: bool, weights: str, digits_dir: str, tmp_path: Path
) -> None:
    suite = dataclasses.replace(SUITE, tasks=(dataclasses.replace(PROBE, shots=(1, 500)),))
    with raises(UserError, "probe", "digits/high", "500"):
        run(weights, tmp_path / "suite", digits_dir, suite, dry_run=dry_run)
    assert not (tmp_path / "suite").exists()


@pytest.mark.parametrize(
    ("dataset", "requested", "expected", "assumed"),
    [
        ("", "", "i1k", True),
        ("", "i1k", "i1k", False),
        ("", "none", "", False),
        ("imagenet2012", "", "i1k", False),
    ],
)
def test_make_plan_marks_assumed_pretraining_data(
    dataset: str, requested: str, expected: str, assumed: bool, weights: str, tmp_path: Path
) -> None:
    names = tuple(map(str, range(1_000)))
    thousand = random_weights(class_names=names)._replace(
        train_config={"dataset": {"name": dataset}, "init_from": ""}
    )
    request = make_request(weights, tmp_path, "", pretrain_dataset=requested)
    request = request._replace(checkpoint=request.checkpoint._replace(format="npz"))
    plan = make_plan(request, thousand, open_task_data((), ""))
    assert (plan.pretrain_dataset, plan.pretrain_dataset_assumed) == (expected, assumed)


def test_run_suite_plans_with_data_notes_and_absolute_folders(
    weights: str, digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "images", {"a": 2, "b": 2})
    monkeypatch.chdir(tmp_path)
    plans: list[TransferPlan] = []

    def save(workdir: str, plan: TransferPlan) -> Any:
        plans.append(plan)
        raise EnoughError

    monkeypatch.setattr(run_lib, "save_plan", save)
    tasks = (
        dataclasses.replace(PROBE, num_examples=(729, 168)),
        dataclasses.replace(PROBE, name="mine", dataset="folder:images", shots=(1,)),
    )
    suite = dataclasses.replace(SUITE, tasks=tasks)
    with pytest.raises(EnoughError):
        run(weights, tmp_path / "suite", digits_dir, suite)
    (plan,) = plans
    assert each_mentions(plan.data_notes, ("digits/high", "test", "167", "168"))
    # The pre-training data of a run with ten classes are unknown.
    assert (plan.pretrain_dataset, plan.pretrain_dataset_assumed) == ("", False)
    assert plan.suite.tasks[1].dataset == f"folder:{tmp_path}/images"


def test_notes_of_the_data_are_printed_once(
    weights: str,
    digits_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = make_folder(tmp_path / "images", {"a": 2, "b": 2})
    (tmp_path / "images" / "train" / "a" / "list.txt").touch()

    def stop(*args: Any) -> None:
        raise EnoughError

    monkeypatch.setattr(run_lib, "run_tasks", stop)
    first = dataclasses.replace(PROBE, dataset=dataset, shots=(1,))
    second = dataclasses.replace(first, name="again")
    suite = dataclasses.replace(SUITE, tasks=(first, second))
    with pytest.raises(EnoughError):
        run(weights, tmp_path / "suite", digits_dir, suite)
    lines = [line for line in capsys.readouterr().out.splitlines() if ".txt" in line]
    assert each_mentions(lines, (f"{tmp_path}/images/train", "1 .txt"))
