"""The picture of a run: loss, learning rate and accuracy by step."""

import io

from etils import epath

from mixer_jax.training.metrics import read_metrics

CURVES_FILE = "curves.png"


def plot_curves(workdir: str) -> None:
    """Draws a run's `metrics.jsonl` as `curves.png` beside it.

    Args:
        workdir: absolute path or URL of the run.
    """
    # Drawn without pyplot, which would choose a window system and keep the figure.
    from matplotlib.figure import Figure

    lines = read_metrics(workdir)
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    panels = {
        "loss": ["loss"],
        "learning rate": ["learning_rate"],
        "top-1 accuracy (%)": sorted({key for line in lines for key in line if _is_accuracy(key)}),
    }
    for axes, (title, keys) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if key in line]
            scale = 100 if _is_accuracy(key) else 1
            marker = "o" if len(points) < 30 else ""
            axes.plot(
                [step for step, _ in points],
                [value * scale for _, value in points],
                marker=marker,
                markersize=3,
                label=key.removesuffix("/top1"),
            )
        # With a single class the loss is zero.
        if title == "loss" and any(line.get("loss", 0) > 0 for line in lines):
            axes.set_yscale("log")
        if len(keys) > 1:
            axes.legend()
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    (epath.Path(workdir) / CURVES_FILE).write_bytes(picture.getvalue())


def _is_accuracy(key: str) -> bool:
    """Says whether a metric is a share of right answers: of the head, or of a probe."""
    evaluation, _, name = key.rpartition("/")
    return bool(evaluation) and (name in ("top1", "linear", "knn") or name.endswith("_shot"))
