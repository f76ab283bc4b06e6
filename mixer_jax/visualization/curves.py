"""Plot of a run: loss, learning rate and accuracy by step."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath

from mixer_jax.errors import UserError, summarize_error
from mixer_jax.files import atomic_write
from mixer_jax.training.metrics import CURVES_FILE, METRICS_FILE, read_metrics
from mixer_jax.training.workdir import resolve_workdir
from mixer_jax.visualization.figures import make_figure, render_figure


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
    panels = {
        "loss": ["loss"],
        "learning rate": ["learning_rate"],
        "accuracy (%)": sorted({key for line in lines for key in line if is_accuracy(key)}),
    }
    for axes, (title, keys) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for key in keys:
            # If a finished run was evaluated again, the last value of a step counts.
            points = {line["step"]: line[key] for line in lines if key in line}
            scale = 100 if is_accuracy(key) else 1
            axes.plot(
                list(points),
                [value * scale for value in points.values()],
                marker="o" if len(points) < 30 else "",
                markersize=3,
                label=key.removesuffix("/top1"),
            )
        # A logarithmic axis needs a positive value.
        if title == "loss" and any(line.get("loss", 0) > 0 for line in lines):
            axes.set_yscale("log")
        if len(keys) > 1:
            axes.legend()
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    return figure


def is_accuracy(key: str) -> bool:
    """Returns whether a metric is an accuracy: of the head, or of a probe."""
    evaluation, _, name = key.rpartition("/")
    return bool(evaluation) and (name in ("top1", "linear", "knn") or name.endswith("_shot"))
