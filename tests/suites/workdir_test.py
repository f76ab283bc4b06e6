"""Tests of files in a suite's workdir: plan, results; changes between starts, concurrent writes."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from mixer_jax.errors import DiskFullError, OutputWriteError, RunError, UserError
from mixer_jax.files import file_lock
from mixer_jax.suites import workdir
from mixer_jax.suites.builtin import SUITES
from mixer_jax.suites.tasks import FineTuneTask, ProbeTask
from mixer_jax.suites.workdir import (
    RunResult,
    Throughput,
    check_not_run_workdir,
    lock_tasks,
    read_plan,
    read_result,
    read_throughput,
    save_plan,
    save_result,
    save_throughput,
    select_learning_rate,
)
from tests.helpers.file_size_limit import file_size_limit
from tests.helpers.lines import each_mentions
from tests.helpers.messages import raises
from tests.helpers.random_weights import random_weights
from tests.helpers.tiny_suite import LARGE_INFO, SUITE, make_plan

WEIGHTS = random_weights()


def test_save_plan_rejects_other_weights(tmp_path: Path) -> None:
    save_plan(str(tmp_path), make_plan(digest="1"))
    with raises(UserError, str(tmp_path), "runs/a", "--workdir"):
        save_plan(str(tmp_path), make_plan(digest="2"))
    with raises(UserError, str(tmp_path), "checkpoint", "runs/a", "runs/b", "--workdir"):
        save_plan(str(tmp_path), make_plan(checkpoint="runs/b", digest="2"))


# Written before tasks, plans and config keys were renamed.
OLD_PLAN: dict[str, Any] = json.loads("""
{"suite": {"name": "tiny", "title": "a tiny suite", "tasks": [{"kind": "fine_tune", "name": "low",
"dataset": "digits/low", "num_classes": 5, "choose_split": "train[:80%]", "validation_split":
"train[80%:]", "train_split": "train", "test_split": "test", "num_examples": [], "num_steps": 20,
"warmup_steps": 2, "learning_rates": [0.01, 0.03], "batch_size": 16, "seeds": [0, 1], "large": null,
"train_crop": "shift", "flip": false, "eval_crop": "whole", "also": {}, "paper": "", "group":
"specialised", "changes": {"recipe.accumulation_steps": 2, "preprocess.max_shift": 1}},
{"kind": "probe", "name": "few", "dataset": "digits/low", "method": "few_shot",
"train_split": "train", "test_split": "test", "num_classes": 0, "num_examples": [], "shots": [1, 5],
"seeds": [0], "large": null, "eval_crop": "", "beside_fresh": false}], "paper": ""},
"checkpoint": "runs/a", "about": {"variant": "custom", "widths": {"num_blocks": 1, "patch_size": 8,
"hidden_dim": 16, "tokens_mlp_dim": 8,
"channels_mlp_dim": 16}, "image_size": [16, 16], "num_classes": 5, "class_names": [], "gelu":
"tanh", "eval_crop": "whole", "exif_orientation": false, "loss": "softmax", "dtype": "auto",
"resolution": ""}, "data_dir": "", "overrides": {"loader.threads": "2", "optimizer.decay": "none"},
"image_sizes": {"low": 16, "few": 16}, "pretrained_on": "i21k", "device_days": 1.5, "digest": "abc",
"data_notes": ["a note"], "pretrained_on_assumed": true}
""")


def test_read_plan_translates_old_spellings(tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_text(json.dumps(OLD_PLAN))
    saved = read_plan(str(tmp_path))
    assert saved is not None
    low, probe = saved.suite.tasks
    assert isinstance(low, FineTuneTask)
    assert (low.train_crop, low.eval_crop, probe.eval_crop) == ("random_shift", "resize", "")
    assert low.config_overrides == {"recipe.grad_accum_steps": 2, "preprocess.max_shift": 1}
    assert saved.overrides == (
        ("loader.num_threads", "2"),
        ("optimizer.decay_type", "none"),
    )
    assert saved.model_info.eval_crop == "resize"
    assert low.group == "specialized"
    assert (saved.pretrain_dataset, saved.pretrain_dataset_assumed) == ("i21k", True)
    # The same suite can be resumed.
    assert save_plan(str(tmp_path), saved) == []
    assert saved.final_runs(low, 0.01)[0].config.optimizer.decay_type == "none"
    assert probe == ProbeTask(
        "few", "digits/low", "few_shot", "train", "test", shots=(1, 5), seeds=(0,)
    )
    # A change is saved in the present spelling.
    save_plan(str(tmp_path), saved._replace(data_notes=("another note",)))
    text = (tmp_path / "suite.json").read_text()
    assert "sweep_train_split" in text
    assert not {"choose_split", "beside_fresh", "about", "widths"} & set(re.findall(r"\w+", text))


def test_read_plan_restores_what_save_plan_wrote(tmp_path: Path) -> None:
    plan = make_plan(
        SUITES["vtab1k"],
        model_info=LARGE_INFO,
        overrides=(("batch_size", "64"),),
        device_days=1.5,
    )
    save_plan(str(tmp_path), plan)
    save_plan(str(tmp_path), plan)
    assert read_plan(str(tmp_path)) == plan


def test_save_plan_accepts_changes_of_resumable_keys(tmp_path: Path) -> None:
    first = (("optimizer.momentum", "0.5"), ("loader.num_threads", "2"))
    assert save_plan(str(tmp_path), make_plan(overrides=first)) == []
    then = (("optimizer.momentum", "0.5"), ("loader.num_threads", "3"), ("log_every_steps", "9"))
    changes = save_plan(str(tmp_path), make_plan(overrides=then))
    assert each_mentions(changes, ("loader.num_threads", "2", "3"), ("log_every_steps", "9"))
    saved = read_plan(str(tmp_path))
    assert saved is not None
    assert saved.overrides == then
    with raises(UserError, "overrides.optimizer.momentum", "0.5"):
        save_plan(str(tmp_path), make_plan())


def test_save_plan_merges_notes_and_accepts_another_data_dir(tmp_path: Path) -> None:
    save_plan(str(tmp_path), make_plan(device_days=1.0, data_notes=("a", "b")))
    suite = dataclasses.replace(SUITE, title="other words")
    later = make_plan(suite, data_dir="/data", data_notes=("b", "c"))
    assert save_plan(str(tmp_path), later) == []
    saved = read_plan(str(tmp_path))
    assert saved is not None
    # Every shard sees only the data of its own tasks.
    assert saved.data_notes == ("a", "b", "c")
    assert (saved.device_days, saved.data_dir) == (1.0, "/data")


@pytest.mark.parametrize("locks", [True, False])
def test_save_plan_waits_for_another_process(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two plans is kept; on file systems without locks, the last one."""
    other = make_plan(overrides=(("batch_size", "64"),))
    if not locks:
        monkeypatch.setattr(workdir, "file_lock", lambda path, wait: contextlib.nullcontext(False))
    with ThreadPoolExecutor() as pool:
        with file_lock(tmp_path / "suite.json.lock"):
            ours = pool.submit(save_plan, str(tmp_path), make_plan())
            done, _ = wait([ours], timeout=0.5)
            assert bool(done) != locks
            (tmp_path / "suite.json").write_text(json.dumps(workdir.to_json(other)))
        if locks:
            with raises(UserError, str(tmp_path), "overrides.batch_size", "64", "--workdir"):
                ours.result()
    saved = read_plan(str(tmp_path))
    assert saved is not None
    assert saved.overrides == other.overrides
    assert [path.name for path in tmp_path.iterdir()] == ["suite.json"]


@pytest.mark.parametrize(
    "save",
    [
        lambda folder: save_plan(folder, make_plan()),
        lambda folder: save_throughput(folder, Throughput(1234.5, 64, "TPU v4", (224, 224))),
    ],
)
def test_save_on_a_full_disk_may_be_retried(save: Callable[[str], Any], tmp_path: Path) -> None:
    folder = tmp_path / "suite"
    folder.mkdir()
    with raises(DiskFullError, str(folder), "File too large"), file_size_limit(10):
        save(str(folder))
    assert list(folder.iterdir()) == []
    save(str(folder))
    (tmp_path / "file").touch()
    with raises(OutputWriteError, f"{tmp_path}/file/suite"):
        save(f"{tmp_path}/file/suite")


def test_lock_tasks_excludes_processes_with_a_task_in_common(tmp_path: Path) -> None:
    workdir = tmp_path / "suite"
    with lock_tasks(str(workdir), ["a", "b"]):
        with raises(RunError, "b", str(workdir), str(os.getpid()), "--shard"):
            lock_tasks(str(workdir), ["c", "b"]).__enter__()
        # The refused process has released what it had locked before.
        with lock_tasks(str(workdir), ["c"]):
            pass
    assert list(tmp_path.iterdir()) == []
    with lock_tasks("gs://bucket/suite", ["a"]), lock_tasks("gs://bucket/suite", ["a"]):
        pass


def test_lock_tasks_rejects_folders_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with raises(OutputWriteError, f"{tmp_path}/file/suite"):
        lock_tasks(f"{tmp_path}/file/suite", ["a"]).__enter__()


@pytest.mark.parametrize("inside", ["config.json", "checkpoints"])
def test_check_not_run_workdir_rejects_that_of_a_run(inside: str, tmp_path: Path) -> None:
    check_not_run_workdir(str(tmp_path))
    (tmp_path / inside).mkdir()
    with raises(UserError, str(tmp_path), "mixer_jax.main", "--workdir"):
        check_not_run_workdir(str(tmp_path))


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
