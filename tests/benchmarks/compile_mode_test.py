"""Tests of `--mode=compile`: a real process, as a user starts it."""

import argparse
import json

import pytest

from mixer_jax.benchmarks.compiling import add_arguments
from tests.helpers.cli import run_cli

SMALL = ["--mode=compile", "--variant=S/32", "--image_size=64", "--num_classes=10", "--rounds=1"]


def test_json_has_compiling_and_the_first_step() -> None:
    few = ["--batch_size=1", "--unroll=1", "--peers=none"]
    done = run_cli("benchmark", *SMALL, *few, "--json")
    report = json.loads(done.stdout)
    assert (report["mode"], report["batch_size"], report["platform"]) == ("train", 1, "cpu")
    (row,) = report["contestants"]
    assert (row["name"], row["failed"]) == ("mixer_jax", "")
    assert row["first_step_seconds"] > row["compile_seconds"] > 0
    # The program is found, and only loaded.
    assert row["cached_first_step_seconds"] < row["first_step_seconds"]


def test_a_loop_is_compared_with_all_blocks_in_a_row() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args([]).unroll == "1,0"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--topology=v9:2x2", "--topology=v9:2x2: there is no chip 'v9'; choose of"),
        ("--topology=h100:8", "--topology=h100:8: programs can be compiled here for TPUs only"),
        ("--batch_size=-1", "--batch_size=-1 is out of range; pass 1 or more, or auto"),
        ("--peers=timm", "argument --peers: invalid choice: 'timm'"),
    ],
)
def test_bad_values(argument: str, message: str) -> None:
    done = run_cli("benchmark", "--mode=compile", argument, code=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert not done.stdout
