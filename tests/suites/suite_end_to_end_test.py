"""Tests of whole suites: what is chosen, repeated, shared, reported, and what of failures."""

import dataclasses
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from mixer_jax import evaluate
from mixer_jax.checkpoints.resolve import resolve_checkpoint
from mixer_jax.errors import NonFiniteError, UserError
from mixer_jax.suites import protocol
from mixer_jax.suites.run import TransferOutcome, TransferRequest, run_suite
from mixer_jax.suites.tasks import Suite
from tests.helpers.lines import some_line_mentions
from tests.helpers.messages import mentions, raises
from tests.helpers.tiny_suite import HIGH, LOW, PROBE, SUITE, save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_weights(tmp_path_factory.mktemp("weights"))


def do(
    weights: str, workdir: Path, data_dir: str, suite: Suite = SUITE, **wish: Any
) -> TransferOutcome:
    usual: dict[str, Any] = {
        "overrides": (),
        "image_size": "native",
        "tasks": (),
        "shard": (1, 1),
        "dry_run": False,
        "keep_checkpoints": False,
        "throughput": False,
        "pretrain_dataset": "",
    }
    place = resolve_checkpoint(weights)
    return run_suite(
        TransferRequest(
            suite=suite, place=place, workdir=str(workdir), data_dir=data_dir, **(usual | wish)
        )
    )


def read(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "results.json").read_text())


def untimed(workdir: Path) -> list[dict[str, Any]]:
    rows = read(workdir)["rows"]
    return [{name: value for name, value in row.items() if name != "minutes"} for row in rows]


def result(workdir: Path, run: str) -> dict[str, Any]:
    return json.loads((workdir / run / "result.json").read_text())


@pytest.fixture(scope="module")
def done(weights: str, digits_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a suite that was done at once."""
    workdir = tmp_path_factory.mktemp("suite")
    assert do(weights, workdir, digits_dir, keep_checkpoints=True) == TransferOutcome({})
    return workdir


def test_the_best_rate_is_chosen_and_every_seed_scored(done: Path) -> None:
    scores = {}
    for rate in HIGH.learning_rates:
        found = result(done, f"high/choose/learning_rate={rate:g}")["scores"]["validation"]
        assert found["num_examples"] == 73
        scores[rate] = (found["top1"], found["log_likelihood"])
    row = read(done)["rows"][0]
    assert row["task"] == "high"
    assert row["learning_rate"] == max(scores, key=lambda rate: scores[rate])
    final = [result(done, f"high/final/seed={seed}")["scores"]["test"] for seed in HIGH.seeds]
    shares = [100 * one["top1"] for one in final]
    assert row["mean"] == pytest.approx(statistics.mean(shares), abs=1e-12)
    assert row["deviation"] == pytest.approx(statistics.stdev(shares), abs=1e-12)
    assert [row["runs"], row["num_examples"]] == [2, 167]
    assert shares[0] != shares[1]


def test_runs_are_the_protocols(done: Path) -> None:
    for run, split, seed in [
        ("high/choose/learning_rate=0.01", "train[:90%]", 0),
        ("high/final/seed=1", "train", 1),
    ]:
        config = json.loads((done / run / "config.json").read_text())
        assert config["dataset"]["train_split"] == split
        assert config["seed"] == seed
        assert (config["num_steps"], config["init_head"]) == (6, "new")


def test_a_score_is_what_evaluate_says_of_the_runs_checkpoint(
    done: Path, digits_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = "high/final/seed=1"
    arguments = [f"--checkpoint={done / run}", f"--data_dir={digits_dir}", "--json"]
    assert evaluate.main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    scores = result(done, run)["scores"]["test"]
    assert told["top1"] == scores["top1"]
    assert told["num_examples"] == 167


def test_what_is_done_is_not_repeated_and_checkpoints_are_dropped(
    weights: str, digits_dir: str, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = untimed(done)
    checkpoints = [path for path in done.rglob("checkpoints") if path.is_dir()]
    assert len(checkpoints) == 5

    def refuse(*arguments: object) -> None:
        pytest.fail("a finished run is repeated")

    monkeypatch.setattr(protocol, "train_and_evaluate", refuse)
    monkeypatch.setattr("mixer_jax.suites.probe_tasks.run_probe", refuse)
    kept = [done, *done.rglob("*.json")]
    assert kept
    assert do(weights, done, digits_dir, keep_checkpoints=True) == TransferOutcome({})
    assert untimed(done) == before
    assert all(path.exists() for path in checkpoints)
    copy = done.parent / f"{done.name}_copy"
    shutil.copytree(done, copy)
    assert do(weights, copy, digits_dir) == TransferOutcome({})
    assert untimed(copy) == before
    assert not list(copy.rglob("checkpoints"))


def test_the_folder_of_another_suite_is_refused(weights: str, digits_dir: str, done: Path) -> None:
    before = (done / "suite.json").read_text()
    longer = dataclasses.replace(SUITE, tasks=(dataclasses.replace(HIGH, num_steps=7), LOW, PROBE))
    with raises(UserError, str(done), "suite.tasks.high.num_steps", "6", "7", "--workdir"):
        do(weights, done, digits_dir, suite=longer)
    with raises(UserError, str(done), "image_sizes.high", "16", "32"):
        do(weights, done, digits_dir, image_size="32")
    changed = (("optimizer.momentum", "0.5"),)
    with raises(UserError, str(done), "overrides.optimizer.momentum", "0.5"):
        do(weights, done, digits_dir, overrides=changed)
    assert (done / "suite.json").read_text() == before


def test_keys_that_do_no_harm_may_be_changed_later(
    weights: str,
    digits_dir: str,
    done: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(done, copy)
    threads = (("loader.num_threads", "1"),)
    # Nothing is left to do, so this costs nothing.
    assert do(
        weights, copy, digits_dir, overrides=threads, keep_checkpoints=True
    ) == TransferOutcome({})
    assert some_line_mentions(capsys.readouterr().out, "loader.num_threads", "1")
    assert untimed(copy) == untimed(done)


def test_a_rate_that_diverges_is_not_chosen(
    weights: str, digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = dataclasses.replace(HIGH, seeds=(0,), learning_rates=(0.01, 1e30))
    suite = dataclasses.replace(SUITE, tasks=(task,))
    assert do(weights, tmp_path, digits_dir, suite=suite) == TransferOutcome({})
    failed = result(tmp_path, "high/choose/learning_rate=1e+30")["failed"]
    assert re.search(r"\b(loss|\w+_norm)\b.*\b(nan|inf)\b.*\bstep\W*\d\b", failed)
    (row,) = read(tmp_path)["rows"]
    assert row["learning_rate"] == 0.01
    assert row["deviation"] is None
    # It is not tried again: it would diverge again.
    monkeypatch.setattr(protocol, "train_and_evaluate", lambda *_: pytest.fail("repeated"))
    assert do(weights, tmp_path, digits_dir, suite=suite) == TransferOutcome({})


def test_a_failed_task_leaves_the_others_and_is_tried_again(
    weights: str,
    digits_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = protocol.train_and_evaluate
    other = dataclasses.replace(LOW, name="high", dataset="digits/high")
    suite = dataclasses.replace(SUITE, tasks=(other, LOW))

    def fail(config: Any, workdir: str, weights: Any) -> Any:
        if config.dataset.name == "digits/high":
            raise MemoryError("no room\nfor it")
        return train(config, workdir, weights)

    monkeypatch.setattr(protocol, "train_and_evaluate", fail)
    failures = do(weights, tmp_path, digits_dir, suite=suite).failures
    assert list(failures) == ["high"]
    assert mentions(failures["high"], "MemoryError", "no room for it")
    assert some_line_mentions(capsys.readouterr().out, "high", failures["high"])
    assert "Traceback" in (tmp_path / "high" / "failed.txt").read_text()
    high, low, mean = read(tmp_path)["rows"]
    assert (high["mean"], high["failed"]) == (None, failures["high"])
    assert low["mean"] is not None
    assert mean["mean"] is None
    monkeypatch.setattr(protocol, "train_and_evaluate", train)
    assert do(weights, tmp_path, digits_dir, suite=suite) == TransferOutcome({})
    assert [row["mean"] is None for row in read(tmp_path)["rows"]] == [False] * 3
    assert not list(tmp_path.rglob("failed.txt"))


def test_a_task_without_a_rate_that_trains_fails(
    weights: str, digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*arguments: Any) -> None:
        raise NonFiniteError("loss is nan at step 1")

    monkeypatch.setattr(protocol, "train_and_evaluate", diverge)
    suite = dataclasses.replace(SUITE, tasks=(HIGH, PROBE))
    failures = do(weights, tmp_path, digits_dir, suite=suite).failures
    assert mentions(failures["high"], "0.01", "0.1", "loss is nan at step 1")
    high, *probe = read(tmp_path)["rows"]
    assert high["failed"] == failures["high"]
    assert [row["mean"] is None for row in probe] == [False, False]


def test_one_task_alone_with_changed_keys(weights: str, digits_dir: str, tmp_path: Path) -> None:
    changed = (("num_steps", "3"), ("optimizer.momentum", "0.5"))
    arguments: dict[str, Any] = {"tasks": ("low",), "overrides": changed, "image_size": "32"}
    assert do(weights, tmp_path, digits_dir, **arguments) == TransferOutcome({})
    config = json.loads((tmp_path / "low" / "final" / "seed=0" / "config.json").read_text())
    assert (config["num_steps"], config["image_size"]) == (3, 32)
    assert config["optimizer"]["momentum"] == 0.5
    notes = "\n".join(read(tmp_path)["notes"])
    assert some_line_mentions(notes, "num_steps", "3")
    assert some_line_mentions(notes, "optimizer.momentum", "0.5")
