"""Output of benchmarks: progress, tables, JSON files and plots. Does not import matplotlib."""

import argparse
import importlib.util
import io
import json
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixer_jax.benchmarks.candidates import MIXER_JAX, Workload
from mixer_jax.errors import RunError, UserError


class Column(NamedTuple):
    """Column of a table.

    Attributes:
        heading: Heading.
        key: Key of the value in a row.
        format: Format specification.
        scale: Factor from the value in a row to the number that is shown.
    """

    heading: str
    key: str
    format: str = ".2f"
    scale: float = 1


def log(text: str) -> None:
    """Prints progress on standard error if it is a terminal."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def add_output_args(parser: argparse.ArgumentParser, *, plot: bool = False) -> None:
    """Adds the files that results are written to; `plot` if the mode has one."""
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write JSON to a file")
    if plot:
        parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot the rates")


def check_outputs(args: argparse.Namespace) -> None:
    """Raises UserError if results could not be written, before they are measured."""
    for name in ("out", "plot"):
        path = getattr(args, name, None)
        if path and path.is_dir():
            raise UserError(f"--{name} must be a file, got the folder {path}.")
        if path:
            _check_writable(name, path, path.parent)
    if getattr(args, "plot", None):
        if args.plot.suffix != ".png":
            raise UserError(f"--plot must be a .png file, got {args.plot}.")
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("--plot needs matplotlib, which is not installed. Leave it out.")
    for name in ("profile", "dump"):
        folder = getattr(args, name, None)
        if folder:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                reason = error.strerror
                raise UserError(f"--{name}={folder} cannot be created ({reason}).") from error
            _check_writable(name, folder, folder)


def _check_writable(name: str, path: Path, folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"--{name}={path}: folder {folder} does not exist. Create it first.")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"--{name}={path}: folder {folder} must be writable ({error.strerror})."
        ) from error


def write_report(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Writes the files that the command line names, and prints JSON if it asks for it.

    Raises:
        RunError: A file cannot be written.
    """
    if args.json:
        print(json.dumps(report))
    if getattr(args, "out", None):
        _write("out", args.out, (json.dumps(report, indent=2) + "\n").encode())
    if getattr(args, "plot", None):
        png = io.BytesIO()
        plot_throughput(report).savefig(png, format="png", dpi=120)
        _write("plot", args.plot, png.getvalue())


def _write(name: str, path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise RunError(f"--{name}={path} cannot be written ({error.strerror}).") from error


def format_environment(report: dict[str, Any]) -> str:
    """Formats the device and the versions of the libraries."""
    names = ("device", "topology", "jax", "flax", "libtpu", "torch", "timm")
    return ", ".join(f"{name} {report[name]}" for name in names if name in report)


def format_workload(report: dict[str, Any]) -> str:
    """Formats the workload whose fields a report has."""
    return Workload(*(report[name] for name in Workload._fields)).format()


def print_table(rows: Sequence[dict[str, Any]], columns: Sequence[Column], title: str = "") -> None:
    """Prints one line per row; columns without any value are skipped, "-" marks a missing value.

    Args:
        rows: Values by key; `name` is the first column, a non-empty `failed` replaces the others.
        columns: Columns after the name.
        title: Heading of the first column.
    """
    columns = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    names = [title, *(row["name"] for row in rows)]
    lines = [[column.heading for column in columns], *(_format_cells(row, columns) for row in rows)]
    name_width = max(map(len, names))
    widths = [max(len(line[i]) for line in lines if line) for i in range(len(columns))]
    for name, line, row in zip(names, lines, [{}, *rows], strict=True):
        cells = [f"{cell:>{width}}" for cell, width in zip(line, widths, strict=False)]
        if row.get("failed"):
            cells = [f"failed: {row['failed']}"]
        print("  ".join([f"{name:{name_width}}", *cells]))


def _format_cells(row: dict[str, Any], columns: Sequence[Column]) -> list[str]:
    if row.get("failed"):
        return []
    values = [row[column.key] for column in columns]
    return [
        "-" if value is None else f"{value * column.scale:{column.format}}"
        for value, column in zip(values, columns, strict=True)
    ]


def plot_throughput(report: dict[str, Any]) -> Any:
    """Plots images/s of `--mode=train,infer` in a figure with a panel per mode."""
    # Without pyplot, which would choose a display and keep the figure.
    from matplotlib.figure import Figure

    modes = report["modes"]
    lengths = [len(mode["candidates"]) for mode in modes]
    height = 0.9 + 0.7 * len(modes) + 0.42 * sum(lengths)
    figure = Figure(figsize=(8, height), layout="constrained")
    panels = figure.subplots(len(modes), squeeze=False, height_ratios=lengths)[:, 0]
    for mode, axes in zip(modes, panels, strict=True):
        _plot_mode(axes, mode)
    panels[-1].set_xlabel("images/s")
    figure.suptitle(format_environment(report), fontsize=9)
    return figure


def _plot_mode(axes: Any, mode: dict[str, Any]) -> None:
    rows = mode["candidates"]
    rates = [row["images_per_second"] or 0 for row in rows]
    colors = ["tab:blue" if row["name"].startswith(MIXER_JAX) else "tab:gray" for row in rows]
    bars = axes.barh([row["name"] for row in rows], rates, color=colors, height=0.7)
    axes.bar_label(bars, [_bar_label(row) for row in rows], padding=4, fontsize=9)
    axes.invert_yaxis()
    # Leaves space for the label of the longest bar.
    axes.set_xlim(0, 1.4 * max(rates))
    title = "Training" if mode["mode"] == "train" else "Inference"
    axes.set_title(f"{title}: {format_workload(mode)}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter("{x:,.10g}")


def _bar_label(row: dict[str, Any]) -> str:
    if row["failed"]:
        return textwrap.shorten(f"failed: {row['failed']}", 70, placeholder=" …")
    rate = row["images_per_second"]
    text = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
    return text if row["mfu"] is None else f"{text} (MFU {100 * row['mfu']:.0f} %)"
