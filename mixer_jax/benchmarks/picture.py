"""Results as a picture: a bar for each contestant."""

import io
import textwrap
from typing import Any

from mixer_jax.benchmarks.contestants import OURS

_OURS, _PEERS = "tab:blue", "tab:gray"
_TITLES = {"train": "Training", "infer": "Inference"}


def draw(report: dict[str, Any]) -> bytes:
    """Returns a PNG file with images a second, a panel for each mode.

    Args:
        report: of `--mode=train,infer`.
    """
    # Drawn without pyplot, which would choose a window system and keep the figure.
    from matplotlib.figure import Figure

    modes = report["modes"]
    lengths = [len(mode["contestants"]) for mode in modes]
    figure = Figure(figsize=(8, 0.9 + 0.7 * len(modes) + 0.42 * sum(lengths)), layout="constrained")
    panels = figure.subplots(len(modes), squeeze=False, height_ratios=lengths)[:, 0]
    for mode, axes in zip(modes, panels, strict=True):
        _draw_mode(axes, mode)
    panels[-1].set_xlabel("images/s")
    versions = ", ".join(f"{n} {report[n]}" for n in ("jax", "torch", "timm") if n in report)
    figure.suptitle(f"{report['device']}; {versions}", fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def _draw_mode(axes: Any, mode: dict[str, Any]) -> None:
    rows = mode["contestants"]
    for place, row in enumerate(rows):
        rate = row["images_per_second"]
        ours = row["name"].startswith(OURS)
        axes.barh(place, rate or 0, color=_OURS if ours else _PEERS, height=0.7)
        axes.annotate(
            _describe(row),
            (rate or 0, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    # Room for what is written beside the longest bar.
    axes.set_xlim(0, 1.4 * max(row["images_per_second"] or 0 for row in rows))
    axes.set_title(
        f"{_TITLES[mode['mode']]}: Mixer-{mode['variant']}, {mode['image_size']} px, "
        f"{mode['batch_size']} images a step, {mode['dtype']}",
        fontsize=10,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter("{x:,.10g}")


def _describe(row: dict[str, Any]) -> str:
    if row["failed"]:
        return textwrap.shorten(f"failed: {row['failed']}", 70, placeholder=" …")
    rate = row["images_per_second"]
    told = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
    if row["utilisation"] is None:
        return told
    return f"{told} (MFU {100 * row['utilisation']:.0f} %)"
