"""Tests of what may happen in a run's folder."""

import errno
import json
import os
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mixer_jax.checkpoints.resolve import INDEX
from mixer_jax.config import config as config_lib
from mixer_jax.config.schema import EVAL_FIELDS
from mixer_jax.errors import UserError
from mixer_jax.training.metrics import MetricsWriter, read_metrics
from mixer_jax.training.workdir import (
    check_workdir,
    config_diff,
    resolve_workdir,
    save_config,
    to_json,
)
from tests.helpers.lines import each_mentions
from tests.helpers.messages import raises


@pytest.fixture
def config() -> ConfigDict:
    config = config_lib.get_default()
    config.num_steps = 20_000
    return config


def add_checkpoint(workdir: Path) -> None:
    (workdir / "checkpoints" / "5").mkdir(parents=True)
    (workdir / "checkpoints" / "5" / INDEX).write_text("{}")


def test_differences_tell_harm_from_convenience(config: ConfigDict) -> None:
    saved = json.loads(to_json(config))
    assert config_diff(saved, config) == ([], [])
    config.checkpoint.every_steps = 5
    config.mesh.fsdp = 8
    config.optimizer.learning_rate = 0.5
    harmless, harmful = config_diff(saved, config)
    assert each_mentions(harmless, ("checkpoint.every_steps", "1000", "5"), ("mesh.fsdp", "1", "8"))
    assert each_mentions(harmful, ("optimizer.learning_rate", "0.001", "0.5"))
    del saved["seed"]
    # A run of before there was such a key did what is its default now.
    assert not any("seed" in line for line in config_diff(saved, config)[1])
    config.seed = 3
    rate = ("optimizer.learning_rate",)
    assert each_mentions(config_diff(saved, config)[1], rate, ("seed", "0", "3"))
    saved["forgotten"] = 1
    found = config_diff(saved, config)[1]
    assert each_mentions(found, ("forgotten", "1"), rate, ("seed", "0", "3"))


def test_an_entry_of_the_mixture_makes_another_experiment_and_one_of_evals_does_not(
    config: ConfigDict,
) -> None:
    without = json.loads(to_json(config))
    config.evals = config_lib.evals(val={"split": "validation"})
    values = {name: key.default for name, key in EVAL_FIELDS.items()} | {"split": "validation"}
    added = [(f"evals.val.{name}", str(value) or "''") for name, value in sorted(values.items())]
    harmless, harmful = config_diff(without, config)
    assert each_mentions(harmless, *added)
    assert harmful == []
    with_evals = json.loads(to_json(config))
    config.mixture = config_lib.mixture(more={"dataset": "digits"})
    harmless, harmful = config_diff(with_evals, config)
    assert harmless == []
    values = {"dataset": "digits", "split": "train", "weight": "1.0"}
    added = [(f"mixture.more.{name}", value) for name, value in values.items()]
    assert each_mentions(harmful, *added)
    # Taken out again, likewise.
    with_both = json.loads(to_json(config))
    config.evals, config.mixture = config_lib.evals(), config_lib.mixture()
    harmless, harmful = config_diff(with_both, config)
    assert each_mentions(harmless, *((f"evals.val.{key}",) for key in sorted(EVAL_FIELDS)))
    names = ("dataset", "split", "weight")
    assert each_mentions(harmful, *((f"mixture.more.{key}",) for key in names))


def test_a_new_folder_is_made(tmp_path: Path, config: ConfigDict) -> None:
    workdir = tmp_path / "a" / "b"
    assert check_workdir(str(workdir), config) == []
    assert workdir.is_dir()
    assert list(workdir.iterdir()) == []


def test_a_harmless_change_is_told(tmp_path: Path, config: ConfigDict) -> None:
    save_config(str(tmp_path), config)
    add_checkpoint(tmp_path)
    config.log_every_steps = 7
    assert each_mentions(check_workdir(str(tmp_path), config), ("log_every_steps", "50", "7"))


def test_another_experiment_is_refused(tmp_path: Path, config: ConfigDict) -> None:
    save_config(str(tmp_path), config)
    add_checkpoint(tmp_path)
    config.batch_size = 512
    with raises(UserError, str(tmp_path), "batch_size", "4096", "512", "--workdir"):
        check_workdir(str(tmp_path), config)


def test_before_the_first_checkpoint_anything_may_change(
    tmp_path: Path, config: ConfigDict
) -> None:
    save_config(str(tmp_path), config)
    config.batch_size = 512
    assert each_mentions(check_workdir(str(tmp_path), config), ("batch_size", "4096", "512"))


def test_checkpoints_without_a_config_are_somebody_elses(
    tmp_path: Path, config: ConfigDict
) -> None:
    add_checkpoint(tmp_path)
    with raises(UserError, str(tmp_path), "config.json", "--workdir"):
        check_workdir(str(tmp_path), config)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, config: ConfigDict) -> None:
    (tmp_path / "file").write_text("")
    reason = os.strerror(errno.ENOTDIR)
    with raises(UserError, f"{tmp_path}/file/run", reason, "--workdir"):
        check_workdir(str(tmp_path / "file" / "run"), config)


def test_urls_stay_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_workdir("gs://bucket/run") == "gs://bucket/run"
    assert resolve_workdir("runs/x") == f"{tmp_path}/runs/x"


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    text = '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"ste'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [1, 2, 3]
    writer = MetricsWriter(str(tmp_path), first_step=2, active=True)
    writer.close()
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [1, 2]


def test_a_passive_writer_writes_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(str(tmp_path), first_step=0, active=False)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"model": 1, "a": {}}'])
def test_a_config_that_cannot_be_read_is_refused(
    tmp_path: Path, config: ConfigDict, text: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    add_checkpoint(tmp_path)
    with raises(UserError, str(tmp_path), "config.json", "--workdir"):
        check_workdir(str(tmp_path), config)


def test_checkpoints_must_be_a_folder(tmp_path: Path, config: ConfigDict) -> None:
    (tmp_path / "checkpoints").write_text("")
    with raises(UserError, f"{tmp_path}/checkpoints", "--workdir"):
        check_workdir(str(tmp_path), config)


def test_file_systems_that_nobody_knows(config: ConfigDict) -> None:
    with raises(UserError, "foo://bucket/run", "--workdir"):
        check_workdir("foo://bucket/run", config)


def test_metrics_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("hello\n")
    with raises(UserError, f"{tmp_path}/metrics.jsonl"):
        read_metrics(str(tmp_path))
