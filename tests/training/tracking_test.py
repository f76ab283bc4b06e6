"""Tests of runs of Weights & Biases, recorded by its library in offline mode."""

import importlib.util
import signal
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image

from mixer_jax import main
from mixer_jax.errors import NonFiniteError, UserError
from mixer_jax.training import tracking
from mixer_jax.training.loop import TrainResult, train_and_evaluate
from mixer_jax.training.metrics import read_metrics
from mixer_jax.training.tracking import RunLabel, WandbRun
from mixer_jax.visualization.curves import save_curves
from tests.helpers.messages import mentions, raises
from tests.helpers.tiny_run import NO_REGULARIZATION, small_config, to_flags
from tests.helpers.wandb_records import OfflineRun, read_offline_runs

TOKENS = {
    "HF_TOKEN": "hf_0123456789abcdef",
    "WANDB_API_KEY": "fedcba98" * 5,
    "AWS_SECRET_ACCESS_KEY": "aws-0123456789abcdef",
}
UNREACHABLE = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Makes W&B online, without an account, and ends its processes."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_NAME", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    # No errors are reported to W&B.
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    # W&B replaces them.
    monkeypatch.setattr(sys, "exit", sys.exit)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield home
    wandb.teardown()


@pytest.fixture
def offline(wandb_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes W&B offline."""
    monkeypatch.setenv("WANDB_MODE", "offline")


def open_run(workdir: Path, project: str = "demo", **config: Any) -> WandbRun:
    workdir.mkdir(exist_ok=True)
    return WandbRun(project, str(workdir), config)


def start_own_run(folder: Path) -> Any:
    """Starts a run of the caller, as in a notebook, in its folder."""
    folder.mkdir()
    settings = wandb.Settings(mode="offline", console="off", silent=True)
    return wandb.init(project="own", dir=str(folder), settings=settings)


def read_run(workdir: Path) -> OfflineRun:
    (run,) = read_offline_runs(workdir)
    return run


def test_run_has_config_metrics_scores_and_curves_but_no_tokens(
    offline: None,
    digits_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in TOKENS.items():
        monkeypatch.setenv(name, value)
    workdir = tmp_path / "run"
    settings = NO_REGULARIZATION | {"num_steps": 6, "evals__test__every_steps": 3}
    config = small_config(digits_dir, wandb="demo", **settings)
    result = train_and_evaluate(config, str(workdir), plot=save_curves)
    assert result.has_curves
    run = read_run(workdir)
    assert (run.run.project, run.run.display_name) == ("demo", "run")
    assert (workdir / "wandb_run_id.txt").read_text().strip() == run.run.run_id
    assert run.config["optimizer"] == config.to_dict()["optimizer"]
    assert run.config["workdir"] == str(workdir)
    *metrics, curves = run.history
    assert metrics == read_metrics(str(workdir))
    assert [line["step"] for line in metrics if "test/top1" in line] == [3, 6]
    assert curves["step"] == 6
    image = run.folder / "files" / curves["curves.path"]
    with Image.open(image) as logged, Image.open(workdir / "curves.png") as drawn:
        np.testing.assert_array_equal(np.asarray(logged), np.asarray(drawn))
    assert (run.exit_code, run.is_preempting) == (0, False)
    captured = capfd.readouterr()
    assert mentions(captured.err, "wandb", "sync", str(run.folder))
    files = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert files.keys() > {"config.json", "starts.jsonl", "metrics.jsonl", "debug-internal.log"}
    files["output"] = (captured.out + captured.err).encode()
    for name, content in files.items():
        assert not any(token.encode() in content for token in TOKENS.values()), name


def test_resumed_run_continues_the_same_run_and_repeats_steps(
    offline: None, tmp_path: Path
) -> None:
    for first in (1, 3):
        with open_run(tmp_path) as run:
            for step in range(first, first + 4):
                run.log(step, {"loss": 1 / step})
        if first == 1:
            # Its name has the time in seconds.
            folder = read_run(tmp_path).folder
            folder.rename(folder.with_name("offline-run-1"))
    earlier, later = read_offline_runs(tmp_path)
    assert earlier.run.run_id == later.run.run_id
    # Users rename runs, and a resumed run keeps that.
    assert earlier.run.display_name == tmp_path.name
    assert later.run.display_name == ""
    for record, first in ((earlier, 1), (later, 3)):
        expected = [{"step": step, "loss": 1 / step} for step in range(first, first + 4)]
        assert record.history == expected


def test_a_sweep_chooses_the_id(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    with open_run(tmp_path):
        pass
    assert read_run(tmp_path).run.run_id == "chosen"
    assert (tmp_path / "wandb_run_id.txt").read_text() == "chosen\n"


def test_a_chosen_id_belongs_to_one_run(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "chosen-once")
    for name in ("first", "second", "first"):
        with open_run(tmp_path / name):
            pass
    ids = [(tmp_path / name / "wandb_run_id.txt").read_text() for name in ("first", "second")]
    assert ids[0] == "chosen-once\n" != ids[1]


@pytest.mark.parametrize("chosen_group", ["", "chosen"])
def test_runs_of_a_suite_have_their_names_and_a_group(
    chosen_group: str, offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_NAME", "same")
    monkeypatch.setenv("WANDB_RUN_ID", "same")
    monkeypatch.setenv("WANDB_RUN_GROUP", chosen_group)
    label = RunLabel("cifar10/final/seed=0", "vtab")
    with WandbRun("demo", str(tmp_path), {}, label):
        pass
    run = read_run(tmp_path).run
    assert (run.display_name, run.run_group) == (label.name, chosen_group or "vtab")
    assert run.run_id != "same"


def test_a_run_of_the_caller_remains_active(offline: None, tmp_path: Path) -> None:
    own = start_own_run(tmp_path / "own")
    with open_run(tmp_path / "run") as run:
        run.log(1, {"loss": 1.0})
    assert wandb.run is not None
    assert wandb.run.id == own.id
    own.log({"own": 2.0})
    own.finish()
    assert read_run(tmp_path / "own").history == [{"own": 2.0}]
    assert read_run(tmp_path / "run").history == [{"step": 1, "loss": 1.0}]


def test_a_run_is_finished_after_an_error(
    offline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_run(tmp_path) as run:
        run.log(1, {"loss": 1.0})
        run.log_image(1, "curves", str(tmp_path / "missing.png"))
        run.log(2, {"loss": 0.5})
        run.exit_code = 3
    assert wandb.setup().most_recent_active_run is None
    record = read_run(tmp_path)
    assert (record.exit_code, record.history) == (3, [{"step": 1, "loss": 1.0}])
    assert mentions(capsys.readouterr().err, "missing.png")


# Other hosts wait for the end of this one after a failure, but not after a usage error.
@pytest.mark.parametrize(
    ("error", "is_short"),
    [(None, False), (UserError("data"), False), (NonFiniteError("loss"), True)],
)
def test_waits_only_briefly_after_a_failure(
    error: Exception | None,
    is_short: bool,
    offline: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = open_run(tmp_path)
    join, timeouts = run._thread.join, list[float]()

    def record_timeout(timeout: float) -> None:
        timeouts.append(timeout)
        join()

    monkeypatch.setattr(run._thread, "join", record_timeout)
    run.__exit__(type(error) if error else None, error, None)
    (timeout,) = timeouts
    assert (timeout < 10) == is_short


@pytest.mark.parametrize(
    ("error", "code"),
    [(NonFiniteError("loss"), 1), (UserError("data"), 2), (KeyboardInterrupt(), 130)],
)
def test_exit_code_of_an_error(
    error: BaseException, code: int, offline: None, tmp_path: Path
) -> None:
    def fail() -> None:
        with open_run(tmp_path) as run:
            run.log(1, {"loss": 1.0})
            raise error

    with pytest.raises(type(error)):
        fail()
    record = read_run(tmp_path)
    assert (record.exit_code, record.is_preempting) == (code, False)
    assert record.history == [{"step": 1, "loss": 1.0}]


def test_preempted_run_is_marked(offline: None, tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.is_preempted, run.exit_code = True, 143
    record = read_run(tmp_path)
    assert (record.exit_code, record.is_preempting) == (143, True)


@pytest.mark.parametrize(
    ("environment", "parts", "has_own_run"),
    [
        ({}, ["wandb", "login"], False),
        (UNREACHABLE, ["127.0.0.1:9"], False),
        (UNREACHABLE, ["127.0.0.1:9"], True),
    ],
)
def test_run_is_recorded_without_an_account_or_a_network(
    environment: dict[str, str],
    parts: list[str],
    has_own_run: bool,
    wandb_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracking, "_INIT_TIMEOUT", 2.0)
    # Terminals are not asked for an account.
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    own = start_own_run(tmp_path / "own") if has_own_run else None
    capsys.readouterr()
    workdir = tmp_path / "run"
    with open_run(workdir) as run:
        run.log(1, {"loss": 1.0})
    assert wandb.setup().most_recent_active_run is own
    record = read_run(workdir)
    assert record.history == [{"step": 1, "loss": 1.0}]
    assert record.exit_code == 0
    *others, line = capsys.readouterr().err.splitlines()
    # W&B prints lines of its own if the caller's run has started it.
    assert has_own_run or not others
    assert mentions(line, *parts, str(record.folder))


def test_an_error_of_the_library_does_not_end_a_run(
    offline: None,
    digits_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken\nlibrary")

    monkeypatch.setattr(wandb, "init", fail)
    settings = NO_REGULARIZATION | {"num_steps": 3}
    config = small_config(digits_dir, wandb="demo", **settings)
    result = train_and_evaluate(config, str(tmp_path / "run"))
    assert (result.step, result.exit_code) == (3, 0)
    (line,) = capsys.readouterr().err.splitlines()
    assert mentions(line, "Weights & Biases", "broken library")


def test_without_the_key_nothing_is_started(tmp_path: Path) -> None:
    with open_run(tmp_path, project="") as run:
        run.log(1, {"loss": 1.0})
        run.log_image(1, "curves", str(tmp_path / "curves.png"))
    assert list(tmp_path.iterdir()) == []


# A folder named wandb in the working directory can be imported too.
@pytest.mark.parametrize("spec", [None, ModuleSpec("wandb", None, is_package=True)])
def test_a_missing_library_is_a_usage_error_before_anything_is_created(
    spec: ModuleSpec | None, digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: spec if name == "wandb" else find_spec(name, *args),
    )
    workdir = tmp_path / "run"
    flags = ["--config=configs/digits.py", f"--workdir={workdir}"]
    with raises(UserError, "config.wandb", "demo", "pip install wandb"):
        main.main([*flags, *to_flags(digits_dir, wandb="demo")])
    with raises(UserError, "pip install wandb"):
        train_and_evaluate(small_config(digits_dir, wandb="demo"), str(workdir))
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("step", "stopped_by", "code"),
    [(5, signal.SIGTERM, 143), (5, signal.SIGINT, 130), (9, signal.SIGTERM, 0), (9, None, 0)],
)
def test_exit_code_of_a_result(step: int, stopped_by: signal.Signals | None, code: int) -> None:
    assert TrainResult(step, 9, {}, stopped_by).exit_code == code
