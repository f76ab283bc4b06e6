"""Tests of the folder of a run."""

import dataclasses
import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mixer_jax import main
from mixer_jax.checkpoints.resolve import INDEX
from mixer_jax.config.config import parse
from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.config.schema import (
    EVAL_FIELDS,
    CheckpointConfig,
    EvalConfig,
    MeshConfig,
    MixtureConfig,
    OptimizerConfig,
    RunConfig,
)
from mixer_jax.errors import RunError, UserError, WriteFailureError
from mixer_jax.files import file_lock
from mixer_jax.training.workdir import (
    check_workdir,
    config_diff,
    lock_workdir,
    resolve_workdir,
    save_config,
    to_json,
)
from tests.helpers.lines import each_mentions
from tests.helpers.messages import raises


@pytest.fixture
def config() -> RunConfig:
    return RunConfig(num_steps=20_000)


def add_checkpoint(workdir: Path) -> None:
    (workdir / "checkpoints" / "5").mkdir(parents=True)
    (workdir / "checkpoints" / "5" / INDEX).write_text("{}")


def run_in_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_lock_workdir_excludes_others_and_may_be_nested(tmp_path: Path) -> None:
    workdir = tmp_path / "new" / "run"

    def start_another() -> None:
        with raises(RunError, str(workdir), str(os.getpid()), "--workdir"):
            lock_workdir(str(workdir)).__enter__()
        refused.append(True)

    refused: list[bool] = []
    with lock_workdir(str(workdir)):
        with lock_workdir(str(workdir)):
            pass
        run_in_thread(start_another)
        with lock_workdir(str(tmp_path / "other")):
            pass
    assert refused == [True]
    # Nothing is left, so that a usage error leaves no empty folder.
    assert list(tmp_path.iterdir()) == []
    workdir.mkdir(parents=True)
    with lock_workdir(str(workdir)):
        (workdir / "file").touch()
    assert [path.name for path in workdir.iterdir()] == ["file"]


def test_lock_workdir_is_released_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock_workdir(str(tmp_path)):
        raise KeyError
    with file_lock(tmp_path / ".lock") as held:
        assert held


def test_lock_workdir_removes_what_killed_writes_of_a_run_left(tmp_path: Path) -> None:
    abandoned = "0" * 32
    names = {f"{name}.{abandoned}.tmp" for name in ("config.json", "bad_images_1.jsonl", ".probe")}
    others = {"config.json", f"page.html.{abandoned}.tmp", "config.json.mine.tmp"}
    for name in names | others:
        (tmp_path / name).touch()
    with lock_workdir(str(tmp_path)):
        assert {path.name for path in tmp_path.iterdir()} == {*others, ".lock"}


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.EIO, WriteFailureError), (errno.EROFS, UserError)]
)
def test_lock_workdir_tells_failing_file_systems_from_those_it_must_not_write(
    code: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code), f"{tmp_path}/run")

    monkeypatch.setattr(os, "mkdir", fail)
    with raises(kind, f"{tmp_path}/run", os.strerror(code)), lock_workdir(f"{tmp_path}/run"):
        pass


def test_lock_workdir_ignores_object_stores_and_rejects_folders_it_cannot_write(
    tmp_path: Path,
) -> None:
    with lock_workdir("gs://bucket/run"), lock_workdir("gs://bucket/run"):
        pass
    (tmp_path / "file").touch()
    with (
        raises(UserError, f"{tmp_path}/file/run", "--workdir"),
        lock_workdir(f"{tmp_path}/file/run"),
    ):
        pass


def test_config_diff_separates_resumable_from_incompatible_changes(config: RunConfig) -> None:
    saved = json.loads(to_json(config))
    assert config_diff(saved, config) == ([], [])
    config = dataclasses.replace(
        config,
        checkpoint=CheckpointConfig(every_steps=5),
        mesh=MeshConfig(fsdp=8),
        optimizer=OptimizerConfig(learning_rate=0.5),
    )
    resumable, incompatible = config_diff(saved, config)
    changes = ("checkpoint.every_steps", "1000", "5"), ("mesh.fsdp", "1", "8")
    assert each_mentions(resumable, *changes)
    assert each_mentions(incompatible, ("optimizer.learning_rate", "0.001", "0.5"))


def test_config_diff_reads_missing_keys_as_their_defaults(config: RunConfig) -> None:
    saved = json.loads(to_json(config))
    del saved["seed"]
    assert config_diff(saved, config) == ([], [])
    saved["unknown"] = 1
    incompatible = config_diff(saved, dataclasses.replace(config, seed=3))[1]
    assert each_mentions(incompatible, ("seed", "0", "3"), ("unknown", "1"))


def test_config_diff_of_entries_is_resumable_for_evals_only(config: RunConfig) -> None:
    evals = dataclasses.replace(config, evals={"val": EvalConfig(split="validation")})
    values = {name: field.default for name, field in EVAL_FIELDS.items()} | {"split": "validation"}
    added = [(f"evals.val.{name}", str(value) or "''") for name, value in sorted(values.items())]
    resumable, incompatible = config_diff(json.loads(to_json(config)), evals)
    assert each_mentions(resumable, *added)
    assert incompatible == []
    both = dataclasses.replace(evals, mixture={"more": MixtureConfig("digits")})
    resumable, incompatible = config_diff(json.loads(to_json(evals)), both)
    assert resumable == []
    values = {"dataset": "digits", "split": "train", "weight": "1.0"}
    added = [(f"mixture.more.{name}", value) for name, value in values.items()]
    assert each_mentions(incompatible, *added)
    # Removed again.
    resumable, incompatible = config_diff(json.loads(to_json(both)), config)
    assert each_mentions(resumable, *((f"evals.val.{key}",) for key in sorted(EVAL_FIELDS)))
    assert each_mentions(incompatible, *((f"mixture.more.{key}",) for key in sorted(values)))


def test_check_workdir_creates_no_folder(tmp_path: Path, config: RunConfig) -> None:
    assert check_workdir(str(tmp_path / "a" / "b"), config) == []
    assert list(tmp_path.iterdir()) == []


def test_check_workdir_returns_resumable_changes(tmp_path: Path, config: RunConfig) -> None:
    save_config(str(tmp_path), config)
    add_checkpoint(tmp_path)
    config = dataclasses.replace(config, log_every_steps=7)
    assert each_mentions(check_workdir(str(tmp_path), config), ("log_every_steps", "50", "7"))


def test_check_workdir_rejects_another_experiment(tmp_path: Path, config: RunConfig) -> None:
    save_config(str(tmp_path), config)
    add_checkpoint(tmp_path)
    config = dataclasses.replace(config, batch_size=512)
    with raises(UserError, str(tmp_path), "batch_size", "4096", "512", "--workdir"):
        check_workdir(str(tmp_path), config)


def test_check_workdir_allows_any_change_before_the_first_checkpoint(
    tmp_path: Path, config: RunConfig
) -> None:
    save_config(str(tmp_path), config)
    config = dataclasses.replace(config, batch_size=512)
    assert each_mentions(check_workdir(str(tmp_path), config), ("batch_size", "4096", "512"))


def test_check_workdir_rejects_checkpoints_without_a_config(
    tmp_path: Path, config: RunConfig
) -> None:
    add_checkpoint(tmp_path)
    with raises(UserError, str(tmp_path), "config.json", "--workdir"):
        check_workdir(str(tmp_path), config)


def test_check_workdir_knows_checkpoints_that_have_lost_their_index(
    tmp_path: Path, config: RunConfig
) -> None:
    add_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "5" / INDEX).unlink()
    with raises(UserError, str(tmp_path), "config.json", "--workdir"):
        check_workdir(str(tmp_path), config)
    save_config(str(tmp_path), config)
    with raises(UserError, str(tmp_path), "num_steps"):
        check_workdir(str(tmp_path), dataclasses.replace(config, num_steps=10_000))


def test_main_does_not_resolve_init_from_if_checkpoints_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppedError(Exception):
        """Ends the command once its arguments are checked."""

    def stop(cache: str) -> None:
        raise StoppedError

    monkeypatch.setattr(main.common, "configure_jax", stop)
    argv = ["--config=digits", f"--workdir={tmp_path}", "--config.init_from=gone.npz"]
    argv += ["--config.distributed=no"]
    with raises(UserError, "gone.npz"):
        main.main(argv)
    save_config(str(tmp_path), parse(load_config_with_overrides("digits", argv[2:])))
    add_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "5" / INDEX).unlink()
    with pytest.raises(StoppedError):
        main.main(argv)


def test_check_workdir_rejects_a_folder_it_cannot_write(tmp_path: Path, config: RunConfig) -> None:
    (tmp_path / "file").write_text("")
    reason = os.strerror(errno.ENOTDIR)
    with raises(UserError, f"{tmp_path}/file/run", reason, "--workdir"):
        check_workdir(str(tmp_path / "file" / "run"), config)


def test_resolve_workdir_keeps_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_workdir("gs://bucket/run") == "gs://bucket/run"
    assert resolve_workdir("runs/x") == f"{tmp_path}/runs/x"
    assert resolve_workdir(".") == str(tmp_path)


def test_resolve_workdir_rejects_an_empty_text() -> None:
    with raises(UserError, "workdir", "''", "runs/mine"):
        resolve_workdir("")


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"model": 1, "a": {}}'])
def test_check_workdir_rejects_a_config_it_cannot_read(
    tmp_path: Path, config: RunConfig, text: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    add_checkpoint(tmp_path)
    with raises(UserError, str(tmp_path), "config.json", "--workdir"):
        check_workdir(str(tmp_path), config)


def test_check_workdir_rejects_checkpoints_that_are_a_file(
    tmp_path: Path, config: RunConfig
) -> None:
    (tmp_path / "checkpoints").write_text("")
    with raises(UserError, f"{tmp_path}/checkpoints", "--workdir"):
        check_workdir(str(tmp_path), config)


def test_check_workdir_rejects_unknown_file_systems(config: RunConfig) -> None:
    with raises(UserError, "foo://bucket/run", "--workdir"):
        check_workdir("foo://bucket/run", config)
