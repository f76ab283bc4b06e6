"""Tests of `--mode=resume`."""

import json
from pathlib import Path

import pytest

from mixer_jax import benchmark
from mixer_jax.errors import UserError
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions, raises


@pytest.mark.slow
def test_json_has_times_and_memory(tmp_path: Path) -> None:
    arguments = "--mode=resume", "--examples=12001", "--batch_size=16", "--rounds=1"
    done = run_cli("benchmark", *arguments, f"--folder={tmp_path}", "--json")
    report = json.loads(done.stdout)
    assert (report["examples"], report["files"]) == (18_000, 3)
    assert 0 <= report["steps"][0] < 300 * 18_000 / 16
    rows = report["measurements"]
    for row, part in zip(rows, ("open", "first batch", "every file"), strict=True):
        assert mentions(row["name"], part)
    for key in ("seconds", "cpu_seconds"):
        assert 0 < rows[0][key] < rows[1][key] < rows[2][key]
    # Of the batch and those that are loaded ahead: 16 images each.
    assert 0 < rows[1]["mebibytes"] < 300
    assert list(tmp_path.iterdir()) == []


def test_usage_errors(tmp_path: Path) -> None:
    for name in ("examples", "batch_size", "rounds"):
        with raises(UserError, f"--{name}", "0"):
            benchmark.main(["--mode=resume", f"--{name}=0"])
    folder = f"{tmp_path}/absent"
    with raises(UserError, "--folder", folder):
        benchmark.main(["--mode=resume", f"--folder={folder}"])
