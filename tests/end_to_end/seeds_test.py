"""Test of runs with several seeds in a real process that is stopped and killed."""

import functools
import json
import signal
from pathlib import Path

import pytest

from mixer_jax.checkpoints.resolve import list_steps
from tests.helpers.messages import mentions
from tests.helpers.processes import (
    finish,
    has_reached,
    last_step,
    start,
    untimed_metrics,
    wait_until,
)
from tests.helpers.tiny_run import NO_REGULARIZATION

pytestmark = pytest.mark.slow

SETTINGS = NO_REGULARIZATION | {"num_steps": 40, "log_every_steps": 1}


def test_seeds_are_stopped_killed_and_resumed(digits_dir: str, tmp_path: Path) -> None:
    workdir, alone = tmp_path / "seeds", tmp_path / "alone"
    command = functools.partial(start, digits_dir, workdir, arguments=["--seeds=0,1"], **SETTINGS)

    # Preempted in the first run: the second one is not started.
    process = command()
    wait_until(lambda: has_reached(workdir / "seed0", 12), process)
    process.terminate()
    out = finish(process, code=143)
    assert mentions(out, "SIGTERM", "the same command resumes")
    assert 12 <= list_steps(f"{workdir}/seed0")[-1] < 40
    assert not (workdir / "seed1").exists()

    # Killed in the second run.
    process = command()
    wait_until(lambda: has_reached(workdir / "seed1", 25), process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert json.loads((workdir / "seeds.json").read_text())["seeds"] == [0]

    out = finish(command())
    assert mentions(out, "seed 0", "seed 1", "mean ± std", f"{workdir}/seeds.json")
    finish(start(digits_dir, alone, seed=1, **SETTINGS))
    assert untimed_metrics(workdir / "seed1") == untimed_metrics(alone)
    assert last_step(workdir / "seed0") == 40
    results = json.loads((workdir / "seeds.json").read_text())
    assert results["runs"]["1"]["metrics"]["test/top1"] == untimed_metrics(alone)[-1]["test/top1"]
