"""The table of a suite: what was measured here beside what the paper measured."""

import csv
import io
import json
from typing import Any, NamedTuple

from mixer_jax.suites.notes import MARK, cost_notes, largest_image_size, size_notes
from mixer_jax.suites.paper_results import PaperRow, find_row
from mixer_jax.suites.plan import TransferPlan
from mixer_jax.suites.results import (
    RANDOM_INIT,
    TaskScore,
    read_fine_tune_scores,
    read_probe_scores,
)
from mixer_jax.suites.run_configs import TEST
from mixer_jax.suites.tasks import FineTuneTask, ProbeTask
from mixer_jax.suites.throughput import Throughput

_COLUMNS = (
    "task",
    "px",
    "learning rate",
    "top-1 %",
    "±",
    "runs",
    f"paper{MARK} %",
    "difference",
    "images",
    "minutes",
)


class Row(NamedTuple):
    """A line of the table; scores in percent.

    Attributes:
        task: what was scored.
        group: of the task.
        image_size: in pixels; None: of a mean.
        learning_rate: that was chosen, if one was.
        mean: over the runs; None: there are none yet.
        deviation: over the runs, if there are several.
        runs: that the mean is over, or that are done where some are still to come; of a mean,
            tasks.
        paper: what the paper has, if it has it.
        num_examples: that were scored.
        minutes: that training took.
        failed: why there is no mean.
    """

    task: str
    group: str = ""
    image_size: int | None = None
    learning_rate: float | None = None
    mean: float | None = None
    deviation: float | None = None
    runs: int = 0
    paper: float | None = None
    num_examples: int = 0
    minutes: float = 0.0
    failed: str = ""

    @property
    def difference(self) -> float | None:
        """What was measured here less what the paper has, points."""
        if self.mean is None or self.paper is None:
            return None
        return self.mean - self.paper


class Table(NamedTuple):
    """A suite's results.

    Attributes:
        title: model, checkpoint and suite.
        rows: tasks and what was scored in them, then means.
        notes: what else there is to know, one line each.
        paper: the row of the paper that is compared with, if there is one.
        facts: throughput and cost, here and in the paper, as plain data.
    """

    title: str
    rows: list[Row]
    notes: list[str]
    paper: PaperRow | None
    facts: dict[str, Any]


def make_table(plan: TransferPlan, workdir: str, throughput: Throughput | None) -> Table:
    """Returns the table of what lies in a suite's folder.

    Args:
        plan: of the suite.
        workdir: of the suite.
        throughput: of the model, if it was measured.

    Raises:
        UserError: a result is damaged.
    """
    paper = find_row(plan.pretrain_dataset, plan.about.variant, largest_image_size(plan))
    rows: list[Row] = []
    means: list[Row] = []
    for task in plan.suite.tasks:
        if isinstance(task, FineTuneTask):
            found = _rows_of(task, plan, workdir, paper)
            means.append(found[0])
            rows += found
        else:
            rows += _rows_of_probe(task, plan, workdir)
    if len(means) > 1:
        groups = list(dict.fromkeys(row.group for row in means if row.group))
        for group in groups:
            rows.append(_mean(f"mean of {group}", [row for row in means if row.group == group]))
        expected = getattr(paper, plan.suite.paper) if paper and plan.suite.paper else None
        rows.append(_mean(f"mean of {plan.suite.name}", means)._replace(paper=expected))
    title = f"{plan.about.name}, from {plan.setting.checkpoint}: {plan.suite.title}"
    facts = _facts(plan, paper, throughput)
    return Table(title, rows, _notes(plan, rows, paper, facts), paper, facts)


def as_text(table: Table) -> str:
    """Returns a table for a terminal."""
    heads, *cells = _grid(table)
    columns = list(zip(heads, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join([name.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
        for name, *rest in [heads, *cells]
    ]
    return "\n".join([table.title, "", *lines, "", *table.notes])


def as_markdown(table: Table) -> str:
    """Returns a table in Markdown."""
    heads, *cells = _grid(table)
    lines = [heads, ["---"] * len(heads), *cells]
    # A bar within a cell would end it.
    lines = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    notes = [f"{note}  " for note in table.notes]
    return "\n".join(
        [f"## {table.title}", "", *(f"| {' | '.join(line)} |" for line in lines), "", *notes, ""]
    )


def as_csv(table: Table) -> str:
    """Returns a table's rows as CSV, numbers unrounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*Row._fields, "difference"])
    writer.writerows(["" if v is None else v for v in [*row, row.difference]] for row in table.rows)
    return text.getvalue()


def as_json(table: Table) -> str:
    """Returns all of a table as JSON, numbers unrounded."""
    rows = [row._asdict() | {"difference": row.difference} for row in table.rows]
    paper = table.paper._asdict() | {"source": "from the paper"} if table.paper else None
    told = {"title": table.title, "rows": rows, "paper": paper, **table.facts}
    return json.dumps(told | {"notes": table.notes}, indent=2) + "\n"


def _grid(table: Table) -> list[list[str]]:
    """Returns the table's heads and cells as text, without columns that are empty."""
    cells = [_cells(row) for row in table.rows]
    kept = [column for column in range(len(_COLUMNS)) if any(line[column] for line in cells)]
    return [[line[column] for column in kept] for line in (_COLUMNS, *cells)]


def _rows_of(
    task: FineTuneTask, plan: TransferPlan, workdir: str, paper: PaperRow | None
) -> list[Row]:
    """Returns the row of a task's test split, and those of what else its runs are scored on."""
    rows = []
    for name, score in read_fine_tune_scores(task, workdir).items():
        column = task.paper if name == TEST else name
        rows.append(
            _row(task.name if name == TEST else f"{task.name}, {name}", score)._replace(
                group=task.group,
                image_size=plan.image_sizes[task.name],
                paper=getattr(paper, column, None) if column else None,
            )
        )
    return rows


def _rows_of_probe(task: ProbeTask, plan: TransferPlan, workdir: str) -> list[Row]:
    rows = []
    for (network, measure), score in read_probe_scores(task, workdir).items():
        name = f"{task.name}, {measure.replace('_', '-')}" if "_" in measure else task.name
        fresh = ", random weights" if network == RANDOM_INIT else ""
        row = _row(name + fresh, score)
        rows.append(row._replace(image_size=plan.image_sizes[task.name]))
    return rows


def _row(name: str, score: TaskScore) -> Row:
    return Row(
        name,
        learning_rate=score.learning_rate,
        mean=None if score.mean is None else 100 * score.mean,
        deviation=None if score.deviation is None else 100 * score.deviation,
        runs=score.runs,
        num_examples=score.num_examples,
        minutes=score.seconds / 60,
        failed=score.failed,
    )


def _mean(name: str, rows: list[Row]) -> Row:
    """Returns the mean of rows; without a mean if one of them has none."""
    values = [row.mean for row in rows if row.mean is not None]
    mean = sum(values) / len(values) if len(values) == len(rows) else None
    minutes = sum(row.minutes for row in rows)
    return Row(name, mean=mean, runs=len(values), minutes=minutes)


def _cells(row: Row) -> list[str]:
    mean = "failed" if row.failed else "-" if row.mean is None else f"{row.mean:.2f}"
    return [
        row.task,
        _tell(row.image_size, "d"),
        _tell(row.learning_rate, "g"),
        mean,
        _tell(row.deviation, ".2f"),
        _tell(row.runs or None, "d"),
        _tell(row.paper, ".2f"),
        _tell(row.difference, "+.2f"),
        _tell(row.num_examples or None, ",d"),
        _tell(row.minutes or None, ".1f"),
    ]


def _tell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _facts(
    plan: TransferPlan, paper: PaperRow | None, throughput: Throughput | None
) -> dict[str, Any]:
    return {
        "checkpoint": plan.setting.checkpoint,
        "suite": plan.suite.name,
        "throughput": throughput._asdict() if throughput else None,
        "device_days_of_pretraining": plan.device_days,
        "paper_images_per_second_per_core": paper.images_per_second if paper else None,
        "paper_core_days": paper.core_days if paper else None,
    }


def _notes(
    plan: TransferPlan, rows: list[Row], paper: PaperRow | None, facts: dict[str, Any]
) -> list[str]:
    notes = cost_notes(plan, paper, facts["throughput"])
    if paper:
        notes.append(f"{MARK} from the paper: {paper.title}; cores are of a TPU v3")
        notes += size_notes(plan, paper)
    if plan.pretrain_dataset_assumed:
        notes.append(
            f"pre-trained on {plan.pretrain_dataset}: assumed from its {plan.about.num_classes:,} "
            "classes; --pretrain_dataset tells otherwise"
        )
    notes += [f"not the protocol's: {key}={text}" for key, text in plan.setting.protocol_overrides]
    notes += plan.data_notes
    unfinished = [
        row.task for row in rows if row.mean is None and row.image_size and not row.failed
    ]
    if unfinished:
        notes.append(f"not finished yet: {', '.join(unfinished)}")
    return notes + [f"{row.task} failed: {row.failed}" for row in rows if row.failed]
