"""Tests of transfer suites as real processes: killed at any moment, shared, told in every form."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixer_jax.training.metrics import read_metrics
from tests.helpers.messages import mentions
from tests.helpers.processes import finish, wait_until
from tests.helpers.tiny_suite import save_weights

RUNS = [
    "high/choose/learning_rate=0.01",
    "high/choose/learning_rate=0.1",
    "high/final/seed=0",
    "low/final/seed=0",
    "probe/checkpoint",
    "probe/fresh",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A folder with weights, and the suite of the documentation."""
    place = tmp_path_factory.mktemp("suites")
    (code,) = re.findall(r"```python\n(.*?)```", (root / "docs/transfer.md").read_text(), re.DOTALL)
    (place / "mine.py").write_text(code)
    save_weights(place)
    return place


def begin(place: Path, workdir: Path, data_dir: str, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "mixer_jax.transfer"]
    command += [f"--checkpoint={place}/weights", f"--suite={place}/mine.py", "--no_throughput"]
    command += [f"--workdir={workdir}", f"--data_dir={data_dir}", *more]
    command += ["--config.log_every_steps=1", "--config.checkpoint.every_steps=5"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def rows(workdir: Path) -> list[dict[str, Any]]:
    told = json.loads((workdir / "results.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name != "minutes"} for row in told]


@pytest.fixture(scope="module")
def at_once(place: Path, digits_dir: str) -> Path:
    """The folder of a suite that nothing interrupted."""
    workdir = place / "at_once"
    out = finish(begin(place, workdir, digits_dir))
    assert mentions(out, "mean", "mine")
    return workdir


def reaches(workdir: Path, run: str, step: int) -> bool:
    steps = [line["step"] for line in read_metrics(f"{workdir}/{run}")]
    return max(steps, default=0) >= step


def exists(path: Path) -> bool:
    return path.exists()


def finished(workdir: Path) -> dict[str, tuple[int, int]]:
    """When the files of runs that have ended were last changed."""
    times = {}
    for run in RUNS:
        result, metrics = workdir / run / "result.json", workdir / run / "metrics.jsonl"
        if result.exists():
            written = metrics.stat().st_mtime_ns if metrics.exists() else 0
            times[run] = (result.stat().st_mtime_ns, written)
    return times


def test_killed_at_several_moments_the_table_is_the_same(
    place: Path, at_once: Path, digits_dir: str, tmp_path: Path
) -> None:
    first, second, third, last = RUNS[0], RUNS[1], RUNS[2], RUNS[-2]
    moments: list[Callable[[], bool]] = [
        # In the middle of a run, past its first checkpoint.
        functools.partial(reaches, tmp_path, first, 12),
        # When one has just ended, before or after its checkpoint is dropped.
        functools.partial(exists, tmp_path / second / "result.json"),
        # In a final run, and between the halves of a probe.
        functools.partial(reaches, tmp_path, third, 3),
        functools.partial(exists, tmp_path / last / "result.json"),
    ]
    done: dict[str, tuple[int, int]] = {}
    for moment in moments:
        process = begin(place, tmp_path, digits_dir)
        wait_until(moment, process)
        process.kill()
        process.communicate()
        now = finished(tmp_path)
        assert done.items() <= now.items()
        done = now
    assert {first, second, third, last} <= done.keys()
    process = begin(place, tmp_path, digits_dir)
    out = finish(process)
    assert done.items() <= finished(tmp_path).items()
    assert f"\n{first}\n" not in out
    assert rows(tmp_path) == rows(at_once)
    assert not list(tmp_path.rglob("checkpoints"))


def test_sigterm_saves_the_run_under_way(place: Path, digits_dir: str, tmp_path: Path) -> None:
    process = begin(place, tmp_path, digits_dir, "--tasks=low")
    wait_until(lambda: reaches(tmp_path, "low/final/seed=0", 3), process)
    process.send_signal(signal.SIGTERM)
    out = finish(process, code=143)
    # No table, but a line of its own.
    (_,) = out.rpartition("\n\n")[2].splitlines()
    assert not mentions(out, "mean")
    assert not (tmp_path / "low/final/seed=0/result.json").exists()
    saved = [int(path.name) for path in (tmp_path / "low/final/seed=0/checkpoints").iterdir()]
    assert max(saved) >= 3


def test_two_shares_at_the_same_time_make_the_table_of_one(
    place: Path, at_once: Path, digits_dir: str, tmp_path: Path
) -> None:
    both = [begin(place, tmp_path, digits_dir, f"--shard={number}/2") for number in (1, 2)]
    for process in both:
        finish(process)
    command = [sys.executable, "-m", "mixer_jax.transfer", "--report", f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert mentions(done.stdout, "mean", "mine")
    assert rows(tmp_path) == rows(at_once)
