"""Table of a comparison, next to the paper's rows: text, Markdown, CSV and JSON."""

import csv
import io
import json
import statistics
from typing import Any, NamedTuple

from mixer_jax.comparison.plan import EvalData, Variation
from mixer_jax.suites.paper_results import PAPER, PaperRow
from mixer_jax.visualization.tables import align_columns, drop_empty_columns, markdown_lines

FORMATS = ("text", "csv", "markdown", "json")
# Measured by the clock. Everything else is the same in another workdir, bit for bit.
MEASURED = ("images_per_second", "batch_size", "device", "device_seconds")
# Units of measured training costs, in seconds; the largest one that all costs reach is used.
_UNITS = {"days": 86_400.0, "hours": 3_600.0, "minutes": 60.0, "seconds": 1.0}


class Row(NamedTuple):
    """Row of the table; None if unknown or not measured.

    Attributes:
        model: Label of the model.
        value: Value of the varied key; empty if there is none.
        name: Full name of the model: "Mixer-B/16", or "Mixer-custom".
        family: Name of the family as in `models.registry.FAMILIES`.
        image_size: Height and width, in pixels.
        seeds: Seed of each run with an accuracy; empty for an evaluated checkpoint.
        top1: Accuracy of each run, in percent.
        num_examples: Number of evaluated examples.
        num_runs: Number of runs, or evaluations, of the row.
        forward_flops: FLOPs of the model per image.
        num_train: Number of training examples.
        train_flops: Model FLOPs of a training run.
        images_per_second: Inference throughput of one device at the best batch size.
        batch_size: Batch size with that throughput.
        device: Device of that measurement.
        device_seconds: Measured training time × devices of a run, mean over the runs.
        core_days: Lower bound on the core-days of a run on the topology of the table.
        failed: Reason for a missing accuracy; empty if there is none.
    """

    model: str
    value: str
    name: str
    family: str
    image_size: tuple[int, int]
    seeds: tuple[int, ...]
    top1: tuple[float, ...]
    num_examples: int | None
    num_runs: int
    num_params: int
    forward_flops: int
    num_train: int | None = None
    num_steps: int | None = None
    train_flops: int | None = None
    images_per_second: float | None = None
    batch_size: int | None = None
    device: str | None = None
    device_seconds: float | None = None
    core_days: float | None = None
    failed: str = ""

    @property
    def mean(self) -> float | None:
        """Mean accuracy, in percent; None unless all runs have one."""
        if not self.top1 or len(self.top1) < self.num_runs:
            return None
        return statistics.fmean(self.top1)

    @property
    def std(self) -> float | None:
        """Sample standard deviation of the accuracy, if there are several runs."""
        return statistics.stdev(self.top1) if self.mean is not None and self.num_runs > 1 else None


class Table(NamedTuple):
    """Results of a comparison.

    Attributes:
        data: Data that the models are evaluated on; None if none is evaluated.
        topology: Topology of `Row.core_days`; empty if there is none.
        paper: Rows of the paper for models of the comparison.
        notes: Further information, one line each.
    """

    rows: list[Row]
    data: EvalData | None
    variation: Variation | None
    topology: str
    paper: list[PaperRow]
    notes: list[str]

    @property
    def title(self) -> str:
        """Title of the table."""
        models = dict.fromkeys(row.model for row in self.rows)
        data = f" on {self.data.title}" if self.data else ""
        return f"{', '.join(models)}{data}"


def find_paper_rows(names: list[str], pretrain_dataset: str) -> list[PaperRow]:
    """Returns the rows of the paper for models by full name.

    Args:
        names: Full names, such as "Mixer-B/16".
        pretrain_dataset: Pre-training data of the rows; empty: all.
    """
    rows = [row for row in PAPER if row.model in names]
    return [row for row in rows if pretrain_dataset in ("", row.data)]


def cost_unit(rows: list[Row]) -> str:
    """Selects the unit of measured training costs: seconds, minutes, hours or days."""
    seconds = [row.device_seconds for row in rows if row.device_seconds]
    smallest = min(seconds, default=0.0)
    return next((name for name, size in _UNITS.items() if smallest >= size), "seconds")


def convert_cost(seconds: float, unit: str) -> float:
    """Converts seconds to a unit of `cost_unit`."""
    return seconds / _UNITS[unit]


def format_table(table: Table, file_format: str) -> str:
    """Formats a table in one of `FORMATS`."""
    formatters = {"text": _as_text, "csv": _as_csv, "markdown": _as_markdown, "json": _as_json}
    return formatters[file_format](table)


def _as_text(table: Table) -> str:
    lines = [table.title, "", *align_columns(_format_cells(table))]
    if table.paper:
        lines += ["", "From the paper", "", *align_columns(_format_paper(table.paper))]
    return "\n".join([*lines, "", *table.notes]) + "\n"


def _as_markdown(table: Table) -> str:
    lines = [f"## {table.title}", "", *markdown_lines(_format_cells(table)), ""]
    if table.paper:
        lines += ["### From the paper", "", *markdown_lines(_format_paper(table.paper)), ""]
    return "\n".join([*lines, *(f"{note}  " for note in table.notes), ""])


def _as_csv(table: Table) -> str:
    """Formats the rows as CSV, unrounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_record(table.rows[0]))
    for row in table.rows:
        record = _record(row)
        cells = record | {
            "image_size": "x".join(map(str, row.image_size)),
            "seeds": " ".join(map(str, row.seeds)),
            "top1": " ".join(map(str, row.top1)),
        }
        writer.writerow(cells.values())
    return text.getvalue()


def _as_json(table: Table) -> str:
    data = {
        "title": table.title,
        "data": table.data._asdict() if table.data else None,
        "vary": table.variation.key if table.variation else None,
        "topology": table.topology or None,
        "rows": [_record(row) for row in table.rows],
        "measured": list(MEASURED),
        "paper": [row._asdict() | {"model": row.model} for row in table.paper],
        "notes": table.notes,
    }
    return json.dumps(data, indent=2) + "\n"


def _record(row: Row) -> dict[str, Any]:
    return row._asdict() | {"mean": row.mean, "std": row.std}


def _format_cells(table: Table) -> list[list[str]]:
    """Returns header and cells as text, without empty columns."""
    unit = cost_unit(table.rows)
    sizes = {row.image_size for row in table.rows}
    num_train = {row.num_train for row in table.rows}
    cells = []
    for row in table.rows:
        mean = "failed" if row.failed else _format(row.mean, ".2f")
        size = "x".join(map(str, dict.fromkeys(row.image_size)))
        cost = None if row.device_seconds is None else convert_cost(row.device_seconds, unit)
        cells.append(
            {
                "model": row.model,
                table.variation.title if table.variation else "varied": row.value,
                "px": size if len(sizes) > 1 else "",
                "top-1 %": mean,
                "±": _format(row.std, ".2f"),
                "runs": str(row.num_runs) if row.num_runs > 1 else "",
                "training images": _format(row.num_train, ",d") if len(num_train) > 1 else "",
                "parameters": f"{row.num_params:,d}",
                "MFLOPs/image": f"{row.forward_flops / 1e6:,.4g}",
                "training TFLOPs": _format(row.train_flops and row.train_flops / 1e12, ",.4g"),
                "images/s": _format(row.images_per_second, ",.0f"),
                "batch": _format(row.batch_size, "d"),
                f"device-{unit}": _format(cost, ",.3g"),
                f"core-days on {table.topology}": _format(row.core_days, ".3g"),
            }
        )
    return drop_empty_columns(cells)


def _format_paper(rows: list[PaperRow]) -> list[list[str]]:
    cells = [
        {
            "model": row.model,
            "data": row.data,
            "px": str(row.image_size),
            "ImageNet %": _format(row.imagenet, ".2f"),
            "ReaL %": _format(row.real, ".2f"),
            "Avg 5 %": _format(row.avg5, ".2f"),
            "VTAB-1k %": _format(row.vtab, ".2f"),
            "images/s per core": _format(row.images_per_second, ",d"),
            "core-days": _format(row.core_days, ",d"),
            "table": str(row.table),
        }
        for row in rows
    ]
    return drop_empty_columns(cells)


def _format(value: Any, spec: str) -> str:
    return "" if value is None else format(value, spec)
