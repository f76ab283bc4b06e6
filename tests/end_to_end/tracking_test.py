"""Tests of Weights & Biases in runs that are killed, preempted and resumed."""

import functools
import os
import signal
from pathlib import Path

import pytest

from mixer_jax.training.metrics import read_metrics
from tests.helpers.processes import STEPS, finish, last_step, start, wait_until
from tests.helpers.wandb_records import read_offline_runs

pytestmark = pytest.mark.slow


def has_steps(workdir: Path, step: int) -> bool:
    return last_step(workdir) >= step and list(workdir.glob("wandb/*/*.wandb")) != []


def test_killed_and_preempted_run_continues_its_record(digits_dir: str, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    env = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "HOME": str(tmp_path)}
    run = functools.partial(start, digits_dir, workdir, env, wandb="demo", num_steps=STEPS)
    for step, number, code in ((12, signal.SIGKILL, -9), (30, signal.SIGTERM, 143)):
        process = run()
        wait_until(functools.partial(has_steps, workdir, step), process)
        os.kill(process.pid, number)
        process.communicate(timeout=120)
        assert process.returncode == code
    finish(run())
    killed, preempted, finished = records = read_offline_runs(workdir)
    assert len({record.run.run_id for record in records}) == 1
    assert [record.is_preempting for record in records] == [False, True, False]
    assert [record.exit_code for record in (preempted, finished)] == [143, 0]
    # The library's process ends by itself, and may still write an exit code of a failure.
    assert killed.exit_code != 0
    metrics = read_metrics(str(workdir))
    logged = [line for record in records for line in record.history if "loss" in line]
    # Steps that were repeated are logged again, with the same loss.
    assert {(line["step"], line["loss"]) for line in logged} == {
        (line["step"], line["loss"]) for line in metrics if "loss" in line
    }
    assert [line["step"] for line in finished.history if "test/top1" in line][-1] == STEPS
