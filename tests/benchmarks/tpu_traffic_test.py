"""Tests of `--mode=hbm_traffic`: a tiny Mixer compiled for a TPU that is not here, and mistakes."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixer_jax import benchmark
from mixer_jax.benchmarks.compiled_steps import read_step
from mixer_jax.benchmarks.contestants import Setting
from mixer_jax.benchmarks.traffic_rows import as_json, floors, print_steps
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import VARIANTS, MixerConfig
from mixer_jax.planning.aot_compile import OutOfMemory
from mixer_jax.planning.hlo.attribution import OPTIMIZER, OTHER
from mixer_jax.planning.mixer_costs import REGIONS
from mixer_jax.planning.topology import ENVIRONMENT, GIB, parse_topology
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions, raises
from tests.helpers.tpu_compiler import tpu_device

MODE = "--mode=hbm_traffic"
TINY = [MODE, "--variant=tiny", "--image_size=64", "--num_classes=10", "--quick"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A variant that compiles in seconds, and the compiler."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, ENVIRONMENT[name])
    monkeypatch.setitem(VARIANTS, "tiny", MixerConfig(2, 16, 128, 64, 256))
    with tpu_device("v6e:2x2"):
        yield


@pytest.mark.usefixtures("tiny")
def test_training_beside_the_reference(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--batch_size=8", "--unroll=1", "--remat=dots", f"--dump={tmp_path}", "--json"]
    assert benchmark.main([*TINY, *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["topology"], report["mode"], report["batch_size"]) == ("v6e:2x2", "train", 8)
    reference, ours, apart, fused = report["steps"]
    names = [row["name"] for row in report["steps"]]
    assert names[:2] == ["reference", "mixer_jax"]
    assert len(set(names)) == 4
    for row in (reference, ours):
        assert list(row["bytes_by_part"]) == [*REGIONS, OPTIMIZER, OTHER]
        assert row["num_bytes"] == pytest.approx(sum(row["bytes_by_part"].values()))
        assert row["num_bytes"] > fused["num_bytes"]
        assert sum(row["flops_by_part"].values()) == sum(apart["flops_by_part"].values())
        assert row["memory_seconds"] == pytest.approx(row["num_bytes"] / 1640e9)
        assert row["bound_seconds"] == max(row["memory_seconds"], row["arithmetic_seconds"])
        assert row["temporary_bytes"] > 0
        assert row["compile_seconds"] > 0
        assert row["uncounted_loops"] == 0
    assert reference["bound_ratio"] == reference["bytes_ratio"] == 1
    assert ours["bytes_ratio"] == ours["num_bytes"] / reference["num_bytes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixer_jax.hlo", "reference.hlo"]
    assert (tmp_path / "reference.hlo").read_text().startswith("HloModule")


@pytest.mark.usefixtures("tiny")
def test_inference_with_settings_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--step=infer", "--batch_size=4", "--model.gelu=tanh,exact", "--peers=none"]
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


@pytest.mark.usefixtures("tiny")
def test_what_does_not_fit_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--step=infer", "--batch_size=4000000", "--peers=none"]
    assert benchmark.main([*TINY, *flags]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "31.2" in line]
    assert any(row.startswith("mixer_jax") and mentions(row, "GiB") for row in rows)


def test_how_much_is_too_large(capsys: pytest.CaptureFixture[str]) -> None:
    topology, setting = parse_topology("v6e:2x2"), Setting("train", "B/16", 224, 10, "bfloat16", 8)
    refusals = [
        (OutOfMemory(3.0, 40 * GIB, 0.0, "", False), ["40.00 GiB", "31.25"]),
        (OutOfMemory(3.0, 33 * GIB, 31 * GIB, "", True), ["33.00 GiB", "31.00"]),
        (OutOfMemory(3.0, None, 0.0, "no room", False), ["no room"]),
    ]
    steps = [read_step("ours", refused, setting, topology) for refused, _ in refusals]
    for step, (_, parts) in zip(steps, refusals, strict=True):
        assert mentions(step.failed or "", *parts)
    rows = as_json([*steps, *floors(setting, topology)])
    assert rows[0] == {"name": "ours", "failed": steps[0].failed, "compile_seconds": 3.0}
    assert rows[3]["bound_ratio"] == 1
    print_steps(rows)
    assert str(steps[2].failed) in capsys.readouterr().out


def test_floors_of_b16() -> None:
    setting = Setting("train", "B/16", 224, 1000, "bfloat16", 128)
    apart, fused = floors(setting, parse_topology("v6e:2x2"))
    assert apart.num_bytes / 1e6 == pytest.approx(236, abs=0.5)
    assert fused.num_bytes / 1e6 == pytest.approx(57, abs=0.5)
    # On this chip the one is bound by memory, the other by arithmetic.
    assert apart.bound_seconds == apart.memory_seconds > apart.arithmetic_seconds
    assert fused.bound_seconds == fused.arithmetic_seconds > fused.memory_seconds


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, ENVIRONMENT[name])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with raises(UserError, "pip install"):
        benchmark.main([MODE])


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--topology=v9:2x2", ["--topology", "v9:2x2", "v2", "v3"]),
        ("--topology=v6e:2", ["--topology", "v6e:2"]),
        ("--topology=h100:8", ["--topology", "h100:8"]),
        ("--remat=sideways", ["--remat", "sideways", "auto", "none", "dots"]),
        ("--unroll=13", ["--unroll", "13", "-1", "12"]),
        ("--batch_size=0", ["--batch_size", "0", "1"]),
        ("--image_size=50", ["image_size", "50", "patch_size", "16"]),
        ("--model.gelu=round", ["--model.gelu", "round", "tanh", "exact"]),
        ("--model.dropout=0,2", ["--model.dropout", "2"]),
        ("--model.depth=3", ["--model.depth"]),
        ("--dump=/proc/nope", ["--dump", "/proc/nope", "No such file"]),
    ],
)
def test_wrong_arguments(argument: str, parts: list[str]) -> None:
    done = run_cli("benchmark", MODE, argument, code=2)
    (line,) = done.stderr.splitlines()
    assert mentions(line, *parts)
    assert not done.stdout
