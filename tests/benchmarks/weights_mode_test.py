"""Tests of `--mode=weights`: a real process, real files."""

import json

from tests.helpers.cli import run_cli


def test_json_has_every_measurement() -> None:
    done = run_cli("benchmark", "--mode=weights", "--variant=S/32", "--rounds=1", "--json")
    result = json.loads(done.stdout)
    rows = {row.pop("task"): row for row in result["measurements"]}
    assert list(rows) == [
        "load .npz: read_bytes",
        "load .npz: load_weights",
        "load .npz: numpy.load",
        "load .safetensors: read_bytes",
        "load .safetensors: load_weights",
        "load .safetensors: safetensors.numpy.load_file",
        "convert google to timm",
        "convert timm to google",
        "predict one photograph, nothing compiled yet",
        "predict one photograph, program in the cache",
    ]
    # 19,104,624 parameters of four bytes.
    assert 72.8 < result["mebibytes"] < 73.2
    assert rows["load .npz: read_bytes"]["ratio"] == 1
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in rows.values())
    # Python and its libraries weigh as much as these small weights.
    assert 1 < rows["convert timm to google"]["ratio"] < 6


def test_bad_values() -> None:
    done = run_cli("benchmark", "--mode=weights", "--rounds=0", code=2)
    assert done.stderr == "error: --rounds=0 is out of range; pass 1 or more\n"
