"""Tests of `--mode=step`: real processes, as a user starts them."""

import json

import pytest

from tests.door import run_door

SMALL = ["--variant=S/32", "--image_size=64", "--batch_size=2", "--unroll=1", "--rounds=2"]


def test_json_has_a_measurement_for_every_setting() -> None:
    done = run_door("benchmark", *SMALL, "--mode=step", "--remat=none,full", "--json")
    result = json.loads(done.stdout)
    rows = result["measurements"]
    assert [(row["unroll"], row["remat"]) for row in rows] == [(1, "none"), (1, "full")]
    assert rows[0]["ratio"] == 1
    for row in rows:
        assert row["images_per_second"] == pytest.approx(2 / row["step_seconds"])
        assert row["compile_seconds"] > 0
        assert row["temporary_bytes"] > 0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--batch_size=0", "error: --batch_size=0 is out of range; pass 1 or more"),
        ("--unroll=99", "error: --unroll=99 is no list of whole numbers from 0 to 12"),
        ("--image_size=50", "error: image_size 50"),
        ("--mode=sideways", "argument --mode: invalid choice: 'sideways'"),
        ("--threads=2", "unrecognized arguments: --threads=2"),
    ],
)
def test_bad_values(argument: str, message: str) -> None:
    done = run_door("benchmark", argument, code=2)
    assert message in done.stderr.splitlines()[-1]
    assert not done.stdout
