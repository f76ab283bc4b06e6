"""Tests of transfer suites as real processes: killed at several moments, stopped, sharded."""

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

pytestmark = pytest.mark.slow

RUNS = [
    "high/choose/learning_rate=0.01",
    "high/choose/learning_rate=0.1",
    "high/final/seed=0",
    "low/final/seed=0",
    "probe/checkpoint",
    "probe/fresh",
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Folder with weights and the suite of the documentation."""
    workspace = tmp_path_factory.mktemp("suites")
    page = (root / "docs" / "reference" / "transfer_protocol.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (workspace / "mine.py").write_text(code)
    save_weights(workspace)
    return workspace


def start(workspace: Path, workdir: Path, data_dir: str, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "mixer_jax.transfer"]
    command += [
        f"--checkpoint={workspace}/weights",
        f"--suite={workspace}/mine.py",
        "--no_throughput",
    ]
    command += [f"--workdir={workdir}", f"--data_dir={data_dir}", *flags]
    command += ["--config.log_every_steps=1", "--config.checkpoint.every_steps=5"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    rows = json.loads((workdir / "results.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name != "minutes"} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted_suite(workspace: Path, digits_dir: str) -> Path:
    """Workdir of a suite that ran without interruption."""
    workdir = workspace / "uninterrupted"
    out = finish(start(workspace, workdir, digits_dir))
    assert mentions(out, "mean", "mine")
    return workdir


def reaches(workdir: Path, run: str, step: int) -> bool:
    steps = [line["step"] for line in read_metrics(f"{workdir}/{run}")]
    return max(steps, default=0) >= step


def exists(path: Path) -> bool:
    return path.exists()


def modification_times(workdir: Path) -> dict[str, tuple[int, int]]:
    """Returns when the files of completed runs were last modified, by run."""
    times = {}
    for run in RUNS:
        result, metrics = workdir / run / "result.json", workdir / run / "metrics.jsonl"
        if result.exists():
            written = metrics.stat().st_mtime_ns if metrics.exists() else 0
            times[run] = (result.stat().st_mtime_ns, written)
    return times


def test_kill_and_resume_gives_the_same_table(
    workspace: Path, uninterrupted_suite: Path, digits_dir: str, tmp_path: Path
) -> None:
    first, second, third, last = RUNS[0], RUNS[1], RUNS[2], RUNS[-2]
    moments: list[Callable[[], bool]] = [
        # In the middle of a run, past its first checkpoint.
        functools.partial(reaches, tmp_path, first, 12),
        # Just after the end of a run, before or after its checkpoint is deleted.
        functools.partial(exists, tmp_path / second / "result.json"),
        # In a final run, and between the two networks of a probe.
        functools.partial(reaches, tmp_path, third, 3),
        functools.partial(exists, tmp_path / last / "result.json"),
    ]
    completed: dict[str, tuple[int, int]] = {}
    for moment in moments:
        process = start(workspace, tmp_path, digits_dir)
        wait_until(moment, process)
        process.kill()
        process.communicate()
        now = modification_times(tmp_path)
        assert completed.items() <= now.items()
        completed = now
    assert {first, second, third, last} <= completed.keys()
    process = start(workspace, tmp_path, digits_dir)
    out = finish(process)
    assert completed.items() <= modification_times(tmp_path).items()
    assert f"\n{first}\n" not in out
    assert read_rows(tmp_path) == read_rows(uninterrupted_suite)
    assert not list(tmp_path.rglob("checkpoints"))


def test_sigterm_saves_the_current_run(workspace: Path, digits_dir: str, tmp_path: Path) -> None:
    process = start(workspace, tmp_path, digits_dir, "--tasks=low")
    wait_until(lambda: reaches(tmp_path, "low/final/seed=0", 3), process)
    process.send_signal(signal.SIGTERM)
    out = finish(process, code=143)
    # One line instead of the table.
    (_,) = out.rpartition("\n\n")[2].splitlines()
    assert not mentions(out, "mean")
    assert not (tmp_path / "low/final/seed=0/result.json").exists()
    saved = [int(path.name) for path in (tmp_path / "low/final/seed=0/checkpoints").iterdir()]
    assert max(saved) >= 3


def test_two_concurrent_shards_give_the_same_table(
    workspace: Path, uninterrupted_suite: Path, digits_dir: str, tmp_path: Path
) -> None:
    both = [start(workspace, tmp_path, digits_dir, f"--shard={index}/2") for index in (1, 2)]
    for process in both:
        finish(process)
    command = [sys.executable, "-m", "mixer_jax.transfer", "--report", f"--workdir={tmp_path}"]
    report = subprocess.run(command, capture_output=True, text=True, check=True)
    assert mentions(report.stdout, "mean", "mine")
    assert read_rows(tmp_path) == read_rows(uninterrupted_suite)
