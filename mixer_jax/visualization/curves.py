"""Plot of a run: loss, learning rate and accuracy by step."""

import itertools
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from mixer_jax.errors import UserError, summarize_error
from mixer_jax.files import atomic_write
from mixer_jax.training.metrics import CURVES_FILE, METRICS_FILE, read_metrics
from mixer_jax.training.workdir import resolve_workdir
from mixer_jax.visualization.figures import make_figure, render_figure

MFU = "model_flops_utilization"
_MAP = "mean_average_precision"
# Panels of curves.png.
_CURVES_PANELS = ("loss", "learning rate", "accuracy (%)")
_LINE_STYLES = ("-", "--", ":", "-.")


def plot_curves(workdir: str | os.PathLike) -> Any:
    """Plots loss, learning rate and accuracy of a run, as a figure of Matplotlib.

    Raises:
        UserError: The folder or URL has no metrics of a run.
    """
    resolved_workdir = resolve_workdir(os.fspath(workdir))
    lines = read_metrics(resolved_workdir)
    if not lines:
        raise UserError(
            f"workdir must have a {METRICS_FILE} with at least one line, got {resolved_workdir!r}. "
            "Train in it first."
        )
    return draw_curves(lines)


def save_curves(workdir: str) -> bool:
    """Plots a run's `metrics.jsonl` as `curves.png` in the same folder, a path or URL.

    Returns:
        Whether that succeeded. If not, the reason is printed: no plot is worth failing a run for.
    """
    path = epath.Path(workdir) / CURVES_FILE
    try:
        atomic_write(path, render_figure(draw_curves(read_metrics(workdir)), "png"))
    except Exception as error:
        print(f"{path} cannot be drawn: {summarize_error(error)}", file=sys.stderr)
        return False
    return True


def draw_curves(lines: Sequence[dict[str, Any]]) -> Any:
    """Draws the lines of a run's `metrics.jsonl` as a figure of three panels."""
    figure = make_figure(12, 3.5, constrained=True)
    panels = list_panels([lines])
    for axes, title in zip(figure.subplots(1, 3), _CURVES_PANELS, strict=True):
        keys = panels[title]
        for key in keys:
            _plot_metric(axes, lines, key, label=_format_key(key))
        _add_legend(axes, keys)
        _finish_panel(axes, title)
    return figure


def draw_panel(
    title: str, keys: Sequence[str], runs: Sequence[Sequence[dict[str, Any]]], colors: Sequence[str]
) -> Any:
    """Draws metrics of several runs over each other, as a figure of one panel.

    Args:
        title: Title of a panel from `list_panels`.
        keys: Metrics of the panel. Each has its own line style.
        runs: Lines of the `metrics.jsonl` of each run.
        colors: Color of each run.
    """
    figure = make_figure(6, 3.4, constrained=True)
    axes = figure.subplots()
    styles = dict(zip(keys, itertools.cycle(_LINE_STYLES), strict=False))
    for lines, color in zip(runs, colors, strict=True):
        for key, style in styles.items():
            _plot_metric(axes, lines, key, color=color, linestyle=style)
    for key, style in styles.items():
        axes.plot([], [], color="gray", linestyle=style, label=_format_key(key))
    _add_legend(axes, keys)
    _finish_panel(axes, title)
    return figure


def list_panels(runs: Iterable[Sequence[dict[str, Any]]]) -> dict[str, list[str]]:
    """Lists the panels of some runs by title, each with its metrics.

    Panels of `draw_curves` are always listed, others if a run has their metric.
    """
    found = {key for lines in runs for line in lines for key in line}
    panels = {
        "loss": ["loss"],
        "learning rate": ["learning_rate"],
        "accuracy (%)": sorted(filter(is_accuracy, found)),
        "images per second": ["images_per_second"],
        "MFU (%)": [MFU],
    }
    return {
        title: keys
        for title, keys in panels.items()
        if title in _CURVES_PANELS or not found.isdisjoint(keys)
    }


def last_by_step(lines: Sequence[dict[str, Any]], key: str) -> dict[int, float]:
    """Returns the values of a metric by step.

    If a finished run was evaluated again, the last value of a step counts.
    """
    return {line["step"]: line[key] for line in lines if key in line}


def _plot_metric(axes: Any, lines: Sequence[dict[str, Any]], key: str, **style: Any) -> None:
    points = last_by_step(lines, key)
    scale = 100 if is_accuracy(key) or key == MFU else 1
    axes.plot(
        list(points),
        [value * scale for value in points.values()],
        marker="o" if len(points) < 30 else "",
        markersize=3,
        **style,
    )


def _format_key(key: str) -> str:
    """Formats a metric of a panel for its legend."""
    text = key.removesuffix("/top1").replace(f"/{_MAP}", " mAP")
    # Between dollar signs, Matplotlib expects formulas.
    return text.replace("$", r"\$")


def _add_legend(axes: Any, keys: Sequence[str]) -> None:
    """Adds a legend unless the title of the panel says what its only metric is."""
    if len(keys) > 1 or any(key.endswith(_MAP) for key in keys):
        axes.legend()


def _finish_panel(axes: Any, title: str) -> None:
    positive = [value for line in axes.lines for value in line.get_ydata() if value > 0]
    # A few short intervals can have a throughput far above the others.
    is_skewed = positive and max(positive) > 10 * statistics.median(positive)
    # A logarithmic axis needs a positive value.
    if (title == "loss" and positive) or (title == "images per second" and is_skewed):
        axes.set_yscale("log")
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)


def is_accuracy(key: str) -> bool:
    """Returns whether a metric is an accuracy of the head or of a probe, or mAP."""
    evaluation, _, name = key.rpartition("/")
    return bool(evaluation) and (name in ("top1", _MAP, "linear", "knn") or name.endswith("_shot"))
