"""Tests of `--mode=compile`: a real process, as a user starts it."""

import argparse
import json

import pytest

from mixer_jax.benchmarks.compiling import add_arguments
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions

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
    ("argument", "parts"),
    [
        ("--topology=v9:2x2", ["--topology", "v9:2x2", "v5e", "v6e"]),
        ("--topology=h100:8", ["--topology", "h100:8"]),
        ("--batch_size=-1", ["--batch_size", "-1", "auto"]),
        ("--peers=timm", ["--peers", "timm"]),
    ],
)
def test_bad_values(argument: str, parts: list[str]) -> None:
    done = run_cli("benchmark", "--mode=compile", argument, code=2)
    (line,) = done.stderr.splitlines()
    assert mentions(line, *parts)
    assert not done.stdout
