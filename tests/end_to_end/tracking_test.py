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
    env = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    run = functools.partial(start, digits_dir, workdir, env, wandb="demo", num_steps=STEPS)
    for step, number, code in ((12, signal.SIGKILL, -9), (30, signal.SIGTERM, 143)):
        process = run()
        wait_until(functools.partial(has_steps, workdir, step), process)
        os.kill(process.pid, number)
        process.communicate(timeout=120)
        assert process.returncode == code
    finish(run())
    check_records(workdir)


def check_records(workdir: Path) -> None:
    """Checks the records of a run that was killed, then preempted, then finished."""
    killed, *resumed = read_offline_runs(workdir)
    assert len(resumed) == 2
    (run_id,) = {record.run.run_id for record in resumed}
    assert killed.folder.name.endswith(f"-{run_id}")
    assert [record.is_preempting for record in resumed] == [True, False]
    assert [record.exit_code for record in resumed] == [143, 0]
    # What the killed process had logged may not have been written; the others lose nothing, and
    # have the same losses.
    logged = [
        (line["step"], line["loss"])
        for record in resumed
        for line in record.history
        if "loss" in line
    ]
    assert logged == [
        (line["step"], line["loss"])
        for line in read_metrics(str(workdir))
        if "loss" in line and line["step"] >= logged[0][0]
    ]
    assert [line["step"] for line in resumed[1].history if "test/top1" in line][-1] == STEPS
