"""Tests of `--mode=loop`."""

import json

import pytest

from mixer_jax import benchmark
from mixer_jax.errors import UserError
from tests.helpers.cli import run_cli
from tests.helpers.messages import raises


@pytest.mark.slow
def test_json_compares_both_loops() -> None:
    done = run_cli("benchmark", "--mode=loop", "--steps=60", "--rounds=2", "--json")
    report = json.loads(done.stdout)
    bare, loop = report["measurements"]
    assert (bare["name"], bare["ratio"]) == ("bare loop", 1)
    assert 0 < loop["lower_quartile"] <= loop["ratio"] <= loop["upper_quartile"]
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 for row in (bare, loop))
    assert abs(report["overhead_seconds"]) < bare["seconds"] + loop["seconds"]


@pytest.mark.parametrize("name", ["steps", "rounds"])
def test_steps_and_rounds_must_be_positive(name: str) -> None:
    with raises(UserError, f"--{name}", "0"):
        benchmark.main(["--mode=loop", f"--{name}=0"])
