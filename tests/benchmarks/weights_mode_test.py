"""Tests of `--mode=weights`: a real process, real files."""

import json

from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions


def test_json_has_every_measurement() -> None:
    done = run_cli("benchmark", "--mode=weights", "--variant=S/32", "--rounds=1", "--json")
    result = json.loads(done.stdout)
    rows = result["measurements"]
    tasks = [
        [".npz", "read_bytes"],
        [".npz", "load_weights"],
        [".npz", "numpy.load"],
        [".safetensors", "read_bytes"],
        [".safetensors", "load_weights"],
        [".safetensors", "safetensors.numpy.load_file"],
        ["google", "timm"],
        ["timm", "google"],
        ["predict"],
        ["predict"],
    ]
    assert len({row["task"] for row in rows}) == len(tasks)
    for row, parts in zip(rows, tasks, strict=True):
        assert mentions(row["task"], *parts)
    # 19,104,624 parameters of four bytes.
    assert 72.8 < result["mebibytes"] < 73.2
    assert rows[0]["ratio"] == 1
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in rows)
    # Python and its libraries weigh as much as these small weights.
    assert 1 < rows[tasks.index(["timm", "google"])]["ratio"] < 6


def test_bad_values() -> None:
    done = run_cli("benchmark", "--mode=weights", "--rounds=0", code=2)
    (line,) = done.stderr.splitlines()
    assert mentions(line, "--rounds", "0", "1")
