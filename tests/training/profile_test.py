"""Tests of profiles of training runs."""

import socket
from pathlib import Path
from typing import Any

import jax
import pytest

from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.training.loop import train_and_evaluate
from mixer_jax.training.metrics import TIMINGS, Progress, read_metrics
from mixer_jax.training.profile import StepProfiler
from tests.helpers.messages import mentions
from tests.helpers.object_store import BUCKET, object_store
from tests.helpers.random_weights import assert_params_equal
from tests.helpers.tiny_run import NO_REGULARIZATION, small_config


def profiled_steps(workdir: Path) -> set[int]:
    """Returns the steps in the only trace of a run, read as XProf reads them."""
    (path,) = workdir.glob(f"profile/plugins/profile/*/{socket.gethostname()}.xplane.pb")
    return {
        value
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
        for name, value in event.stats
        if name == "step_num"
    }


def untimed_metrics(workdir: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name not in TIMINGS}
        for line in read_metrics(str(workdir))
    ]


def profile_constant(folder: str, steps: range, last_step: int) -> None:
    """Profiles steps that do nothing."""
    profiler = StepProfiler(steps, folder, Progress(0, last_step, is_primary=True))
    for step in range(1, last_step + 1):
        profiler.before_step(step, jax.numpy.zeros(()))
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            pass
        profiler.after_step(step, jax.numpy.zeros(()))
    profiler.close()


def test_profiled_run_writes_a_trace_of_these_steps_and_trains_identically(
    digits_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = NO_REGULARIZATION | {"num_steps": 6}
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    train_and_evaluate(small_config(digits_dir, **settings), str(plain))
    assert not (plain / "profile").exists()
    capsys.readouterr()
    config = small_config(digits_dir, profile_steps="3:5", **settings)
    train_and_evaluate(config, str(profiled))
    assert profiled_steps(profiled) == {3, 4}
    lines = capsys.readouterr().out.splitlines()
    assert [mentions(line, "3", "4") for line in lines if f"{profiled}/profile" in line] == [True]
    assert untimed_metrics(profiled) == untimed_metrics(plain)
    expected, actual = (load_checkpoint(str(path)).params for path in (plain, profiled))
    assert_params_equal(expected, actual)


def test_a_run_that_starts_after_the_steps_prints_that_it_writes_no_trace(
    digits_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = NO_REGULARIZATION | {"num_steps": 6}
    train_and_evaluate(small_config(digits_dir, **settings), str(tmp_path))
    capsys.readouterr()
    config = small_config(digits_dir, profile_steps="3:5", **settings)
    train_and_evaluate(config, str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert [mentions(line, "6", "3:5") for line in lines if "profile_steps" in line] == [True]
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(("steps", "is_missed"), [(range(3, 6), True), (range(3, 7), False)])
def test_steps_are_missed_if_the_last_one_is_completed(
    steps: range, is_missed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    StepProfiler(steps, str(tmp_path), Progress(5, 8, is_primary=True), start_step=5).close()
    assert ("config.profile_steps" in capsys.readouterr().out) == is_missed


def test_a_run_that_stops_within_the_steps_writes_those_that_it_took(tmp_path: Path) -> None:
    profile_constant(str(tmp_path), range(2, 100), last_step=3)
    assert profiled_steps(tmp_path) == {2, 3}


def test_trace_is_written_to_an_object_store(tmp_path: Path) -> None:
    with object_store(tmp_path):
        profile_constant(BUCKET, range(1, 2), last_step=3)
    assert profiled_steps(tmp_path) == {1}


def test_a_failed_upload_names_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(profiler: StepProfiler) -> None:
        raise OSError("no such bucket")

    monkeypatch.setattr(StepProfiler, "_upload", fail)
    with object_store(tmp_path):
        profile_constant(BUCKET, range(1, 2), last_step=2)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert mentions(captured.out, "profile", "gs://", "no such bucket")


def test_an_error_of_the_profiler_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trace").mkdir()
    with jax.profiler.trace(str(tmp_path / "trace")):
        profile_constant(str(tmp_path / "run"), range(1, 2), last_step=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").touch()
    profile_constant(str(tmp_path / "run"), range(1, 2), last_step=2)
    assert not (tmp_path / "run" / "profile" / "plugins").exists()
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert [mentions(line, str(tmp_path / "run" / "profile")) for line in lines] == [True, True]
