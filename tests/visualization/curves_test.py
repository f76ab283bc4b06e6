"""Tests of the plot of a run's metrics."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mixer_jax.visualization import curves
from mixer_jax.visualization.curves import (
    draw_curves,
    draw_panel,
    is_accuracy,
    list_panels,
    save_curves,
)
from tests.helpers.messages import mentions

LINES: list[dict[str, Any]] = [
    {"step": 1, "loss": 2.0, "learning_rate": 0.0},
    {"step": 2, "loss": 1.0, "learning_rate": 0.1, "gradient_norm": 3.0},
    {"step": 2, "val/top1": 0.5, "val/top5": 0.75},
    {"step": 2, "few/5_shot": 0.25, "few/5_shot_std": 0.01},
    {"step": 3, "loss": 0.5, "learning_rate": 0.2},
]


def test_draw_curves_plots_the_last_value_of_a_step() -> None:
    lines = [{"step": 2, "val/top1": 0.5}, {"step": 4, "val/top1": 0.6}]
    (curve,) = draw_curves([*lines, {"step": 4, "val/top1": 0.75}]).axes[2].lines
    assert list(zip(*curve.get_data(), strict=True)) == [(2, 50.0), (4, 75.0)]


def test_draw_curves_plots_loss_learning_rate_and_accuracies() -> None:
    loss, learning_rate, accuracy = draw_curves(LINES).axes

    def read_curves(axes: Any) -> dict[str, list[tuple[float, float]]]:
        return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}

    assert read_curves(loss) == {"loss": [(1, 2.0), (2, 1.0), (3, 0.5)]}
    assert read_curves(learning_rate) == {"learning_rate": [(1, 0.0), (2, 0.1), (3, 0.2)]}
    assert read_curves(accuracy) == {"few/5_shot": [(2, 25.0)], "val": [(2, 50.0)]}
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["few/5_shot", "val"]
    assert loss.get_yscale() == "log"


@pytest.mark.parametrize("lines", [[], [{"step": 1, "loss": 0.0, "learning_rate": 0.0}]])
def test_draw_curves_of_zero_losses_are_linear(lines: list[dict[str, Any]]) -> None:
    assert draw_curves(lines).axes[0].get_yscale() == "linear"


def test_draw_panel_draws_runs_over_each_other() -> None:
    second = [{"step": 4, "val/top1": 1.0}]
    colors = ["#ff0000", "#0000ff"]
    (axes,) = draw_panel("accuracy (%)", ["few/5_shot", "val/top1"], [LINES, second], colors).axes
    drawn = {
        (line.get_color(), line.get_linestyle()): list(zip(*line.get_data(), strict=True))
        for line in axes.lines
        if len(line.get_xdata())
    }
    assert drawn == {
        ("#ff0000", "-"): [(2, 25.0)],
        ("#ff0000", "--"): [(2, 50.0)],
        ("#0000ff", "--"): [(4, 100.0)],
    }
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["few/5_shot", "val"]


@pytest.mark.parametrize(("last", "scale"), [(999.0, "linear"), (1_001.0, "log")])
def test_a_throughput_far_above_the_others_is_drawn_on_a_log_scale(last: float, scale: str) -> None:
    key = "images_per_second"
    lines = [{"step": step, key: rate} for step, rate in enumerate([100.0, 100.0, last])]
    assert "images per second" in list_panels([lines])
    figure = draw_panel("images per second", [key], [lines], ["#ff0000"])
    assert figure.axes[0].get_yscale() == scale


def test_save_curves_writes_a_png(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in LINES))
    assert save_curves(str(tmp_path))
    with Image.open(io.BytesIO((tmp_path / "curves.png").read_bytes())) as image:
        assert (image.format, image.size) == ("PNG", (1440, 420))


def test_save_curves_prints_why_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(lines: object) -> None:
        raise ValueError("no such backend")

    monkeypatch.setattr(curves, "draw_curves", fail)
    assert not save_curves(str(tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert mentions(line, f"{tmp_path}/curves.png", "no such backend")
    assert list(tmp_path.iterdir()) == []


def test_is_accuracy_selects_accuracies_of_head_and_probes() -> None:
    names = ("test/top1", "few/1_shot", "few/25_shot", "line/linear", "near/knn")
    assert all(is_accuracy(name) for name in (*names, "test/mean_average_precision"))
    others = ("loss", "few/1_shot_std", "line/penalty", "test/top5", "near/num_train", "linear")
    assert not any(is_accuracy(name) for name in others)
