"""Tests of `--mode=weights`."""

import json

import pytest

from mixer_jax import benchmark
from mixer_jax.errors import UserError
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions, raises


@pytest.mark.slow
def test_json_has_every_measurement() -> None:
    done = run_cli("benchmark", "--mode=weights", "--variant=S/32", "--rounds=1", "--json")
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


def test_rounds_must_be_positive() -> None:
    with raises(UserError, "--rounds", "0"):
        benchmark.main(["--mode=weights", "--rounds=0"])
