"""Tests of `--mode=weights` and `--mode=checkpoints`."""

import json
from pathlib import Path

import pytest

from mixer_jax import benchmark
from mixer_jax.errors import UserError
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions, raises


@pytest.mark.slow
def test_json_has_every_measurement() -> None:
    done = run_cli("benchmark", "--mode=weights", "--model=S/32", "--rounds=1", "--json")
    report = json.loads(done.stdout)
    rows = report["measurements"]
    tasks = [
        [".npz", "read_bytes"],
        [".npz", "load_checkpoint"],
        [".npz", "numpy.load"],
        [".safetensors", "read_bytes"],
        [".safetensors", "load_checkpoint"],
        [".safetensors", "safetensors.numpy.load_file"],
        ["google", "timm"],
        ["timm", "google"],
        ["predict"],
        ["predict"],
    ]
    assert len({row["name"] for row in rows}) == len(tasks)
    for row, parts in zip(rows, tasks, strict=True):
        assert mentions(row["name"], *parts)
    # 19,104,624 parameters of four bytes.
    assert 72.8 < report["mebibytes"] < 73.2
    assert rows[0]["ratio"] == 1
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in rows)
    # Python and its libraries take as much memory as these small weights.
    assert 1 < rows[tasks.index(["timm", "google"])]["ratio"] < 6


@pytest.mark.slow
def test_checkpoints_are_measured_with_and_without_checksums(tmp_path: Path) -> None:
    arguments = "--mode=checkpoints", "--model=S/32", "--rounds=1", f"--folder={tmp_path}"
    done = run_cli("benchmark", *arguments, "--json")
    report = json.loads(done.stdout)
    # Parameters and the two moments of Adam.
    assert 218.4 < report["mebibytes"] < 219.6
    rows = report["measurements"]
    assert len(rows) == 6
    assert [row["ratio"] for row in rows if mentions(row["name"], "without")] == [1, 1, 1]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in rows)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["weights", "checkpoints"])
def test_rounds_must_be_positive(mode: str) -> None:
    with raises(UserError, "--rounds", "0"):
        benchmark.main([f"--mode={mode}", "--rounds=0"])


def test_the_folder_must_exist(tmp_path: Path) -> None:
    folder = f"{tmp_path}/absent"
    with raises(UserError, "--folder", folder):
        benchmark.main(["--mode=checkpoints", f"--folder={folder}"])


def test_absent_devices_are_a_usage_error() -> None:
    preamble = "import os; os.environ['JAX_PLATFORMS'] = 'none_such'"
    done = run_cli("benchmark", "--mode=checkpoints", code=2, preamble=preamble)
    (line,) = done.stderr.splitlines()
    assert mentions(line, "JAX_PLATFORMS", "none_such")
