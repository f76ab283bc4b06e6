"""The picture of a suite: its tasks as dots, beside the paper's where it has them."""

import io

from mixer_jax.suites.table import Table


def plot_table(table: Table) -> bytes:
    """Returns the picture of a table as a PNG file; nothing where it has no scores."""
    # Drawn without pyplot, which would choose a window system and keep the figure.
    from matplotlib.figure import Figure

    rows = [row for row in table.rows if row.mean is not None or row.paper is not None]
    if not rows:
        return b""
    figure = Figure(figsize=(8, 1.4 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    for place, row in zip(places, rows, strict=True):
        if row.paper is not None:
            axes.plot(row.paper, place, "d", color="tab:orange", markersize=8, zorder=1)
        if row.mean is not None:
            axes.errorbar(row.mean, place, xerr=row.deviation, fmt="o", color="tab:blue", zorder=2)
    axes.plot([], [], "o", color="tab:blue", label="measured here, mean and deviation")
    if any(row.paper is not None for row in rows):
        axes.plot([], [], "d", color="tab:orange", label="from the paper")
    axes.set_yticks(list(places), [row.task for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("top-1 accuracy (%)")
    axes.set_title(table.title, fontsize=9, wrap=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
