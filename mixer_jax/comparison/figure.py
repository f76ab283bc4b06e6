"""Picture of a comparison: accuracy over cost, throughput and a varied key."""

from collections.abc import Callable, Sequence
from typing import Any

from mixer_jax.comparison.table import Row, Table, convert_cost, cost_unit
from mixer_jax.models.registry import FAMILIES
from mixer_jax.visualization.figures import make_figure

# Okabe and Ito's colors, which color-blind people can distinguish, and markers for gray prints.
_STYLES = (
    ("#D55E00", "o"),
    ("#0072B2", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#E69F00", "P"),
)
# Styles of models of the same family.
_LINES = ("-", "--", ":", "-.")


def draw_comparison(table: Table) -> Any:
    """Draws a comparison as a figure of Matplotlib; returns None if no model has an accuracy."""
    rows = [row for row in table.rows if row.mean is not None]
    if not rows:
        return None
    if table.variation:
        figure = make_figure(7, 4.5, constrained=True)
        _draw_variation(figure.subplots(), rows, table)
        return figure
    unit = cost_unit(rows)
    panels: list[tuple[str, Callable[[Row], float | None]]] = [
        (
            f"training cost (device-{unit})",
            lambda row: None if not row.device_seconds else convert_cost(row.device_seconds, unit),
        ),
        ("throughput (images/s per device)", lambda row: row.images_per_second or None),
    ]
    panels = [(title, x) for title, x in panels if any(x(row) for row in rows)]
    if not panels:
        # All are evaluated checkpoints of unknown cost, without measurements.
        panels = [("FLOPs per image", lambda row: row.forward_flops)]
    figure = make_figure(5.2 * len(panels), 4.2, constrained=True)
    for axes, (title, x) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        _draw_panel(axes, rows, title, x)
    return figure


def _draw_panel(
    axes: Any, rows: Sequence[Row], title: str, x: Callable[[Row], float | None]
) -> None:
    labeled = set()
    shown = [row for row in rows if x(row)]
    for row in shown:
        color, marker = _style(row.family)
        label = None if row.family in labeled else _family_title(row.family)
        labeled.add(row.family)
        axes.errorbar(
            x(row),
            row.mean,
            yerr=row.std,
            fmt=marker,
            color=color,
            markersize=8,
            capsize=3,
            label=label,
        )
        axes.annotate(
            row.model,
            (x(row), row.mean),
            xytext=(8, 4),
            textcoords="offset points",
            fontsize=9,
        )
    _use_log_axis(axes, [x(row) for row in shown])
    axes.margins(x=0.2, y=0.2)
    axes.set_xlabel(title)
    _finish(axes)


def _draw_variation(axes: Any, rows: Sequence[Row], table: Table) -> None:
    """Draws a line per model over the values of the varied key."""
    variation = table.variation
    assert variation is not None
    positions, title, is_numeric = _positions(rows, variation.values, variation.title)
    labels = list(dict.fromkeys(row.model for row in rows))
    num_drawn: dict[str, int] = {}
    for index, label in enumerate(labels):
        lines = [row for row in rows if row.model == label]
        color, marker = _style(lines[0].family)
        if not lines[0].value:
            # Evaluated, not trained with each value.
            axes.axhline(lines[0].mean, color=color, linestyle=":", label=label)
            continue
        num_drawn[lines[0].family] = count = num_drawn.get(lines[0].family, 0) + 1
        # Points of one category stand next to each other.
        offset = 0.0 if is_numeric else 0.12 * (index - (len(labels) - 1) / 2)
        axes.errorbar(
            [positions[row.value] + offset for row in lines],
            [row.mean for row in lines],
            yerr=[row.std or 0.0 for row in lines],
            color=color,
            marker=marker,
            linestyle=_LINES[(count - 1) % len(_LINES)] if is_numeric else "",
            markersize=7,
            capsize=3,
            label=label,
        )
    if is_numeric:
        _use_log_axis(axes, list(positions.values()))
        ticks = [f"{x:,.10g}" for x in positions.values()]
    else:
        ticks = list(positions)
        axes.set_xlim(-0.5, len(positions) - 0.5)
    axes.set_xticks(list(positions.values()), ticks)
    axes.set_xlabel(title)
    _finish(axes)


def _positions(
    rows: Sequence[Row], values: Sequence[str], title: str
) -> tuple[dict[str, float], str, bool]:
    """Returns the position of each value, the title of the axis, and whether it has numbers.

    Values that change the number of training images are replaced by it.
    """
    sizes = {row.value: row.num_train for row in rows if row.value}
    if None not in sizes.values() and len(set(sizes.values())) == len(sizes) > 1:
        return {value: float(size or 0) for value, size in sizes.items()}, "training images", True
    try:
        return {value: float(value) for value in values}, title, True
    except ValueError:
        return {value: float(i) for i, value in enumerate(values)}, title, False


def _use_log_axis(axes: Any, numbers: Sequence[float | None]) -> None:
    """Makes the x axis logarithmic if all numbers are positive, with readable ticks."""
    known = [number for number in numbers if number is not None]
    if not known or min(known) <= 0:
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.xaxis.set_minor_formatter("")
    if max(known) < 30 * min(known):
        axes.xaxis.get_major_locator().set_params(subs=(1, 1.5, 2, 3, 5, 7))


def _finish(axes: Any) -> None:
    axes.set_ylabel("top-1 accuracy (%)")
    # Margins of the axis end at 100 %, with space for a marker.
    axes.set_ylim(top=min(axes.get_ylim()[1], 100.8))
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9)


def _style(family: str) -> tuple[str, str]:
    """Returns color and marker of a family."""
    return _STYLES[list(FAMILIES).index(family) % len(_STYLES)]


def _family_title(family: str) -> str:
    return FAMILIES[family].display_name
