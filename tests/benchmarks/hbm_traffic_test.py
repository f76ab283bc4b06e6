"""Tests of `--mode=hbm_traffic`, with a tiny Mixer compiled for a TPU that is not attached."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixer_jax import benchmark
from mixer_jax.benchmarks.candidates import Workload
from mixer_jax.benchmarks.hbm_traffic import (
    add_ratios,
    lower_bounds,
    measure_traffic,
    print_traffic,
)
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import VARIANTS, MixerConfig
from mixer_jax.models.mixer_costs import REGIONS
from mixer_jax.planning.aot_compile import OutOfMemory
from mixer_jax.planning.hlo_costs import OPTIMIZER, OTHER
from mixer_jax.planning.topology import ENVIRONMENT, GIB, parse_topology
from tests.helpers.messages import mentions, raises
from tests.helpers.tpu_compiler import tpu_device

MODE = "--mode=hbm_traffic"
TINY = [MODE, "--model=tiny", "--image_size=64", "--num_classes=10", "--quick"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Adds a variant that compiles in seconds; skips the test without the compiler."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, ENVIRONMENT[name])
    monkeypatch.setitem(VARIANTS, "tiny", MixerConfig(2, 16, 128, 64, 256))
    with tpu_device("v6e:2x2"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_training_next_to_the_reference(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--batch_size=8", "--scan_unroll=1", "--remat=dots", f"--dump={tmp_path}", "--json"]
    assert benchmark.main([*TINY, *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["topology"], report["mode"], report["batch_size"]) == ("v6e:2x2", "train", 8)
    reference, ours, unfused, fused = report["steps"]
    assert [reference["name"], ours["name"]] == ["reference", "mixer_jax"]
    for row in (reference, ours):
        assert list(row["bytes_by_region"]) == [*REGIONS, OPTIMIZER, OTHER]
        assert row["num_bytes"] == pytest.approx(sum(row["bytes_by_region"].values()))
        assert row["num_bytes"] > fused["num_bytes"]
        assert sum(row["flops_by_region"].values()) == sum(unfused["flops_by_region"].values())
        assert row["memory_seconds"] == pytest.approx(row["num_bytes"] / 1640e9)
        assert row["bound_seconds"] == max(row["memory_seconds"], row["arithmetic_seconds"])
        assert row["temporary_bytes"] > 0
        assert row["compile_seconds"] > 0
        assert row["unknown_trip_count_loops"] == 0
    assert reference["bound_ratio"] == reference["bytes_ratio"] == 1
    assert ours["bytes_ratio"] == ours["num_bytes"] / reference["num_bytes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixer_jax.hlo", "reference.hlo"]
    assert (tmp_path / "reference.hlo").read_text().startswith("HloModule")


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_inference_with_several_settings(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--step=infer", "--batch_size=4", "--model.gelu=tanh,exact", "--baselines=none"]
    assert benchmark.main([*TINY, *flags]) == 0
    captured = capsys.readouterr()
    settings = ("Mixer-tiny", "64", "10", "4", "bfloat16")
    assert any(mentions(line, *settings) for line in captured.out.splitlines())
    rows = [line for line in captured.out.splitlines() if line.startswith("mixer_jax")]
    for gelu in ("tanh", "exact"):
        assert any(mentions(line, "mixer_jax", gelu) for line in captured.err.splitlines())
        assert sum(mentions(row, "gelu", gelu) for row in rows) == 2
    assert "reference" not in captured.out
    assert max(map(len, captured.out.splitlines())) <= 100


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_a_step_that_does_not_fit_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--step=infer", "--batch_size=4000000", "--baselines=none"]
    assert benchmark.main([*TINY, *flags]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "31.2" in line]
    assert any(row.startswith("mixer_jax") and mentions(row, "GiB") for row in rows)


def test_measure_traffic_reports_how_much_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    topology = parse_topology("v6e:2x2")
    workload = Workload("train", "Mixer-B/16", 224, 10, "bfloat16", 8)
    failures = [
        (OutOfMemory(3.0, 40 * GIB, 0.0, "", False), ["40.00 GiB", "31.25"]),
        (OutOfMemory(3.0, 33 * GIB, 31 * GIB, "", True), ["33.00 GiB", "31.00"]),
        (OutOfMemory(3.0, None, 0.0, "no room", False), ["no room"]),
    ]
    rows = [measure_traffic("ours", failure, workload, topology) for failure, _ in failures]
    for row, (_, parts) in zip(rows, failures, strict=True):
        assert mentions(row["failed"], *parts)
    rows += lower_bounds(workload, topology)
    add_ratios(rows)
    assert rows[0] == {"name": "ours", "failed": rows[0]["failed"], "compile_seconds": 3.0}
    assert rows[3]["bound_ratio"] == 1
    print_traffic(rows)
    assert rows[2]["failed"] in capsys.readouterr().out


def test_lower_bounds_of_b16() -> None:
    workload = Workload("train", "Mixer-B/16", 224, 1000, "bfloat16", 128)
    unfused, fused = lower_bounds(workload, parse_topology("v6e:2x2"))
    assert unfused["num_bytes"] / 1e6 == pytest.approx(236, abs=0.5)
    assert fused["num_bytes"] / 1e6 == pytest.approx(57, abs=0.5)
    # On this chip, one is bound by memory and the other by arithmetic.
    assert unfused["bound_seconds"] == unfused["memory_seconds"] > unfused["arithmetic_seconds"]
    assert fused["bound_seconds"] == fused["arithmetic_seconds"] > fused["memory_seconds"]


def test_the_compiler_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, ENVIRONMENT[name])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with raises(UserError, "pip install"):
        benchmark.main([MODE])


def test_usage_errors_of_topologies() -> None:
    for argument, parts in [
        ("--topology=v9:2x2", ["--topology", "v9:2x2", "v2", "v3"]),
        ("--topology=v6e:2", ["--topology", "v6e:2"]),
        ("--topology=h100:8", ["--topology", "h100:8"]),
    ]:
        with raises(UserError, *parts):
            benchmark.main([MODE, argument])
