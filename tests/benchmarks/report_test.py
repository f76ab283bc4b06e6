"""Tests of tables, plots and output files."""

from pathlib import Path
from typing import Any

import pytest

from mixer_jax import benchmark
from mixer_jax.benchmarks import report
from mixer_jax.benchmarks.candidates import MIXER_JAX, TIMM, Workload
from mixer_jax.benchmarks.compare import Result
from mixer_jax.benchmarks.report import Column, plot_throughput, print_table
from mixer_jax.benchmarks.throughput import print_report
from mixer_jax.errors import UserError
from tests.helpers.messages import mentions, raises


def example_report() -> dict[str, Any]:
    workload = Workload("train", "Mixer-B/16", 224, 1000, "float32", 8)
    results = [
        Result(MIXER_JAX, images_per_second=123.0, step_seconds=0.065, mfu=0.5, relative_time=1.0),
        Result(TIMM, "out of memory"),
    ]
    mode = {
        **workload._asdict(),
        "matmul_flops_per_second": {"jax": 2e9},
        "isolated": False,
        "candidates": [result._asdict() for result in results],
    }
    return {"device": "cpu", "jax": "0.1", "modes": [mode, mode | {"mode": "infer"}]}


def test_throughput_report_lists_every_candidate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_report(example_report())
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(MIXER_JAX)]
    assert len(rows) == 2
    assert all(mentions(row, "123.00", "65.0", "50.0", "1.00") for row in rows)
    assert sum(mentions(line, TIMM, "failed", "out of memory") for line in lines) == 2
    assert sum(mentions(line, "GFLOP/s", "jax", "2") for line in lines) == 2


def test_print_table_leaves_out_empty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "a", "x": 1.0, "y": None, "z": None},
        {"name": "b", "x": None, "y": 22, "z": None},
    ]
    print_table(
        rows,
        [Column("long heading", "x", ""), Column("y", "y", ""), Column("z", "z", "")],
        title="name",
    )
    assert capsys.readouterr().out.splitlines() == [
        "name  long heading   y",
        "a              1.0   -",
        "b                -  22",
    ]


def test_plot_throughput_draws_every_candidate() -> None:
    axes = plot_throughput(example_report()).axes
    assert len(axes) == 2
    for panel in axes:
        assert [label.get_text() for label in panel.get_yticklabels()] == [MIXER_JAX, TIMM]
        assert [bar.get_width() for bar in panel.patches] == [123, 0]
        measured, failed = (text.get_text() for text in panel.texts)
        assert mentions(measured, "123", "50")
        assert mentions(failed, "out of memory")


def test_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with raises(UserError, "--plot", "matplotlib"):
        benchmark.main(["--baselines=none", "--plot=a.png"])


def test_check_outputs_needs_writable_folders(tmp_path: Path) -> None:
    for flag in ("--out", "--plot"):
        with raises(UserError, flag, str(tmp_path / "missing")):
            benchmark.main([f"{flag}={tmp_path / 'missing' / 'file.png'}"])
    with raises(UserError, "--dump", "/proc/nope", "No such file"):
        benchmark.main(["--mode=hbm_traffic", "--dump=/proc/nope"])
