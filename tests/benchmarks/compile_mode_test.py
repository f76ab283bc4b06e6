"""Tests of `--mode=compile`."""

import argparse
import json

import pytest

from mixer_jax import benchmark
from mixer_jax.benchmarks.candidates import Workload
from mixer_jax.benchmarks.compile import add_arguments, candidates_to_compile
from mixer_jax.errors import UserError
from tests.helpers.cli import run_cli
from tests.helpers.messages import raises


@pytest.mark.slow
def test_json_has_compilation_and_first_step() -> None:
    workload = ["--model=S/32", "--image_size=64", "--num_classes=10", "--batch_size=1"]
    flags = ["--rounds=1", "--scan_unroll=1", "--baselines=none", "--json"]
    done = run_cli("benchmark", "--mode=compile", *workload, *flags)
    report = json.loads(done.stdout)
    assert (report["mode"], report["batch_size"], report["platform"]) == ("train", 1, "cpu")
    (row,) = report["candidates"]
    assert (row["name"], row["failed"]) == ("mixer_jax", "")
    assert row["first_step_seconds"] > row["compile_seconds"] > 0
    # The program is found in the cache.
    assert row["cached_first_step_seconds"] < row["first_step_seconds"]


def test_default_compares_with_and_without_a_scan() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    # A BiT has no blocks to scan over.
    for model, expected in (("Mixer-S/32", [1, 0]), ("ViT-S/32", [1, 0]), ("BiT-R50x1", [-1])):
        workload = Workload("train", model, 224, 1000, "float32", 8)
        candidates = candidates_to_compile(parser.parse_args([]), workload)
        assert [candidate.overrides["scan_unroll"] for candidate in candidates] == expected


def test_usage_errors() -> None:
    for argument, parts in [
        ("--topology=v9:2x2", ["--topology", "v9:2x2", "v5e", "v6e"]),
        ("--topology=h100:8", ["--topology", "h100:8"]),
        ("--batch_size=-1", ["--batch_size", "-1", "auto"]),
        ("--baselines=timm", ["--baselines", "timm"]),
        ("--rounds=0", ["--rounds", "0"]),
    ]:
        with raises(UserError, *parts):
            benchmark.main(["--mode=compile", argument])
