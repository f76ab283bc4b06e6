"""Table of a suite's results next to the paper's: text, Markdown, CSV, JSON and a plot."""

import csv
import io
import json
from typing import Any, NamedTuple

from etils import epath

from mixer_jax.checkpoints.model_info import format_image_size
from mixer_jax.errors import UserError, summarize_error
from mixer_jax.files import atomic_write
from mixer_jax.models.registry import get_family
from mixer_jax.suites.paper_results import PaperRow, find_row
from mixer_jax.suites.plan import SUITE_FILE, TransferPlan, read_plan
from mixer_jax.suites.results import (
    NETWORK_TITLES,
    RANDOM_INIT,
    TaskScore,
    Throughput,
    read_fine_tune_scores,
    read_probe_scores,
    read_throughput,
)
from mixer_jax.suites.run_configs import TEST
from mixer_jax.suites.tasks import FineTuneTask, ProbeTask
from mixer_jax.visualization.figures import make_figure, render_figure

# Marks values copied from the paper.
MARK = "*"
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
    """Row of the table; accuracies in percent.

    Attributes:
        task: Name of the task and evaluation.
        group: Group of the task.
        image_size: Image size, in pixels; None for a mean.
        learning_rate: Learning rate selected, if any.
        mean: Mean over the runs; None if there is none yet.
        std: Standard deviation over the runs, if there are several.
        runs: Number of completed runs; for a mean over tasks, the number of tasks.
        paper: Result of the paper, if any.
        num_examples: Number of test examples.
        minutes: Duration of training.
        failed: Reason for a missing mean.
    """

    task: str
    group: str = ""
    image_size: int | None = None
    learning_rate: float | None = None
    mean: float | None = None
    std: float | None = None
    runs: int = 0
    paper: float | None = None
    num_examples: int = 0
    minutes: float = 0.0
    failed: str = ""

    @property
    def difference(self) -> float | None:
        """Mean minus the paper's result, in points."""
        if self.mean is None or self.paper is None:
            return None
        return self.mean - self.paper


class Table(NamedTuple):
    """Results of a suite.

    Attributes:
        title: Model, checkpoint and suite.
        rows: Tasks and their evaluations, then means.
        notes: Further information, one line each.
        paper: Row of the paper for comparison, if there is one.
        facts: Throughput and cost, here and in the paper, as plain data.
    """

    title: str
    rows: list[Row]
    notes: list[str]
    paper: PaperRow | None
    facts: dict[str, Any]


def report(workdir: str) -> None:
    """Prints a suite's table and writes it in every format into the workdir.

    Args:
        workdir: Absolute path or URL of the suite's workdir.

    Raises:
        UserError: The workdir contains no suite, a file is damaged, or none can be written.
    """
    plan = read_plan(workdir)
    if plan is None:
        raise UserError(f"--workdir={workdir} must contain a suite, but has no {SUITE_FILE}.")
    table = make_table(plan, workdir, read_throughput(workdir))
    # Printed first, so that it is seen even if the files cannot be written.
    print(f"\n{as_text(table)}", flush=True)
    files: dict[str, str | bytes] = {
        "results.txt": as_text(table),
        "results.csv": as_csv(table),
        "results.json": as_json(table),
        "results.md": as_markdown(table),
    }
    if figure := draw_table(table):
        files["results.png"] = render_figure(figure, "png")
    try:
        for name, content in files.items():
            atomic_write(epath.Path(workdir) / name, content)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} must be writable ({error.strerror or summarize_error(error)}). "
            "Fix that and write the table with --report."
        ) from error
    print(f"\nalso as {workdir}/results.{{csv,json,md,png}}", flush=True)


def make_table(plan: TransferPlan, workdir: str, throughput: Throughput | None) -> Table:
    """Builds the table of the results in a suite's workdir.

    Args:
        plan: Plan of the suite.
        workdir: Workdir of the suite.
        throughput: Throughput of the model, if it was measured.

    Raises:
        UserError: A result is damaged.
    """
    info = plan.model_info
    model = get_family(info.family).full_name(info.variant)
    paper = find_row(plan.pretrain_dataset, model, largest_image_size(plan))
    rows: list[Row] = []
    task_rows: list[Row] = []
    for task in plan.suite.tasks:
        if isinstance(task, FineTuneTask):
            found = _fine_tune_rows(task, plan, workdir, paper)
            task_rows.append(found[0])
            rows += found
        else:
            rows += _probe_rows(task, plan, workdir)
    if len(task_rows) > 1:
        for group in dict.fromkeys(row.group for row in task_rows if row.group):
            group_rows = [row for row in task_rows if row.group == group]
            rows.append(_mean_row(f"mean of {group}", group_rows))
        column = plan.suite.paper_column
        expected = getattr(paper, column) if paper and column else None
        rows.append(_mean_row(f"mean of {plan.suite.name}", task_rows)._replace(paper=expected))
    title = f"{info.name}, from {plan.settings.checkpoint}: {plan.suite.title}"
    notes = _make_notes(plan, rows, paper, throughput)
    return Table(title, rows, notes, paper, _make_facts(plan, paper, throughput))


def largest_image_size(plan: TransferPlan) -> int:
    """Returns the largest image size of fine-tuning, or of probes if there are only probes.

    It selects the paper's row, and is the size at which throughput is measured.
    """
    fine_tuned = [task for task in plan.suite.tasks if isinstance(task, FineTuneTask)]
    return max(plan.image_sizes[task.name] for task in fine_tuned or plan.suite.tasks)


def _fine_tune_rows(
    task: FineTuneTask, plan: TransferPlan, workdir: str, paper: PaperRow | None
) -> list[Row]:
    """Returns the row of a task's test split, then those of its extra evaluations."""
    rows = []
    for name, score in read_fine_tune_scores(task, workdir).items():
        column = task.paper_column if name == TEST else name
        rows.append(
            _score_row(task.name if name == TEST else f"{task.name}, {name}", score)._replace(
                group=task.group,
                image_size=plan.image_sizes[task.name],
                paper=getattr(paper, column, None) if column else None,
            )
        )
    return rows


def _probe_rows(task: ProbeTask, plan: TransferPlan, workdir: str) -> list[Row]:
    rows = []
    for (network, metric), score in read_probe_scores(task, workdir).items():
        name = f"{task.name}, {metric.replace('_', '-')}" if "_" in metric else task.name
        name += f", {NETWORK_TITLES[network]}" if network == RANDOM_INIT else ""
        rows.append(_score_row(name, score)._replace(image_size=plan.image_sizes[task.name]))
    return rows


def _score_row(name: str, score: TaskScore) -> Row:
    return Row(
        name,
        learning_rate=score.learning_rate,
        mean=None if score.mean is None else 100 * score.mean,
        std=None if score.std is None else 100 * score.std,
        runs=score.runs,
        num_examples=score.num_examples,
        minutes=score.seconds / 60,
        failed=score.failed,
    )


def _mean_row(name: str, rows: list[Row]) -> Row:
    """Returns the mean of rows; without a value if one of them has none."""
    values = [row.mean for row in rows if row.mean is not None]
    mean = sum(values) / len(values) if len(values) == len(rows) else None
    return Row(name, mean=mean, runs=len(values), minutes=sum(row.minutes for row in rows))


def _make_facts(
    plan: TransferPlan, paper: PaperRow | None, throughput: Throughput | None
) -> dict[str, Any]:
    return {
        "checkpoint": plan.settings.checkpoint,
        "suite": plan.suite.name,
        "throughput": throughput._asdict() if throughput else None,
        "device_days_of_pretraining": plan.device_days,
        "paper_images_per_second_per_core": paper.images_per_second if paper else None,
        "paper_core_days": paper.core_days if paper else None,
    }


def _make_notes(
    plan: TransferPlan, rows: list[Row], paper: PaperRow | None, throughput: Throughput | None
) -> list[str]:
    notes = _cost_notes(plan, paper, throughput)
    if paper:
        notes.append(f"{MARK} from the paper: {paper.title}; cores are TPU v3 cores")
        notes += _size_notes(plan, paper)
    if plan.pretrain_dataset_assumed:
        notes.append(
            f"pre-trained on {plan.pretrain_dataset}: assumed from the number of classes, "
            f"{plan.model_info.num_classes:,}; override with --pretrain_dataset"
        )
    notes += [
        f"differs from the protocol: {key}={text}" for key, text in plan.settings.protocol_overrides
    ]
    notes += plan.data_notes
    incomplete = [
        row.task for row in rows if row.mean is None and row.image_size and not row.failed
    ]
    if incomplete:
        notes.append(f"incomplete: {', '.join(incomplete)}")
    return notes + [f"{row.task} failed: {row.failed}" for row in rows if row.failed]


def _cost_notes(
    plan: TransferPlan, paper: PaperRow | None, throughput: Throughput | None
) -> list[str]:
    """Returns the notes on throughput and pre-training."""
    notes = []
    if throughput:
        size = format_image_size(throughput.image_size)
        reference = ""
        if paper:
            differs = size != format_image_size((paper.image_size, paper.image_size))
            paper_size = f" at {paper.image_size} px" if differs else ""
            reference = f"; paper{MARK}: {paper.images_per_second:,} per core{paper_size}"
        notes.append(
            f"throughput: {throughput.images_per_second:,.0f} images/s on one "
            f"{throughput.device} at {size}, in batches of {throughput.batch_size}{reference}"
        )
    if plan.device_days or paper:
        cost = f"{plan.device_days:.3g} device-days" if plan.device_days else "unknown"
        reference = f"; paper{MARK}: {paper.core_days:,} core-days" if paper else ""
        notes.append(f"pre-training: {cost}{reference}")
    return notes


def _size_notes(plan: TransferPlan, paper: PaperRow) -> list[str]:
    """Returns a note if tasks are fine-tuned at image sizes that differ from the paper's row."""
    tasks = [
        f"{task.name} ({plan.image_sizes[task.name]} px)"
        for task in plan.suite.tasks
        if isinstance(task, FineTuneTask) and plan.image_sizes[task.name] != paper.image_size
    ]
    return [f"image sizes that differ from the paper's row: {', '.join(tasks)}"] if tasks else []


def as_text(table: Table) -> str:
    """Formats a table for a terminal."""
    header, *cells = _format_cells(table)
    columns = list(zip(header, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join([name.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
        for name, *rest in [header, *cells]
    ]
    return "\n".join([table.title, "", *lines, "", *table.notes])


def as_markdown(table: Table) -> str:
    """Formats a table in Markdown."""
    header, *cells = _format_cells(table)
    lines = [header, ["---"] * len(header), *cells]
    # An unescaped bar would end the cell.
    lines = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    notes = [f"{note}  " for note in table.notes]
    return "\n".join(
        [f"## {table.title}", "", *(f"| {' | '.join(line)} |" for line in lines), "", *notes, ""]
    )


def as_csv(table: Table) -> str:
    """Formats the rows of a table as CSV, unrounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*Row._fields, "difference"])
    writer.writerows(["" if v is None else v for v in [*row, row.difference]] for row in table.rows)
    return text.getvalue()


def as_json(table: Table) -> str:
    """Formats a table as JSON, unrounded."""
    rows = [row._asdict() | {"difference": row.difference} for row in table.rows]
    paper = table.paper._asdict() | {"source": "from the paper"} if table.paper else None
    data = {"title": table.title, "rows": rows, "paper": paper, **table.facts}
    return json.dumps(data | {"notes": table.notes}, indent=2) + "\n"


def draw_table(table: Table) -> Any:
    """Draws the accuracies of a table as a figure; returns None if there are none."""
    rows = [row for row in table.rows if row.mean is not None or row.paper is not None]
    if not rows:
        return None
    figure = make_figure(8, 1.4 + 0.32 * len(rows), constrained=True)
    axes = figure.subplots()
    for y, row in enumerate(rows):
        if row.paper is not None:
            axes.plot(row.paper, y, "d", color="tab:orange", markersize=8, zorder=1)
        if row.mean is not None:
            axes.errorbar(row.mean, y, xerr=row.std, fmt="o", color="tab:blue", zorder=2)
    axes.plot([], [], "o", color="tab:blue", label="measured here, mean ± standard deviation")
    if any(row.paper is not None for row in rows):
        axes.plot([], [], "d", color="tab:orange", label="from the paper")
    axes.set_yticks(range(len(rows)), [row.task for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("top-1 accuracy (%)")
    axes.set_title(table.title, fontsize=9, wrap=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)
    return figure


def _format_cells(table: Table) -> list[list[str]]:
    """Returns header and cells as text, without empty columns."""
    cells = [_format_row(row) for row in table.rows]
    columns = [column for column in range(len(_COLUMNS)) if any(line[column] for line in cells)]
    return [[line[column] for column in columns] for line in (_COLUMNS, *cells)]


def _format_row(row: Row) -> list[str]:
    mean = "failed" if row.failed else "-" if row.mean is None else f"{row.mean:.2f}"
    return [
        row.task,
        _format_optional(row.image_size, "d"),
        _format_optional(row.learning_rate, "g"),
        mean,
        _format_optional(row.std, ".2f"),
        _format_optional(row.runs or None, "d"),
        _format_optional(row.paper, ".2f"),
        _format_optional(row.difference, "+.2f"),
        _format_optional(row.num_examples or None, ",d"),
        _format_optional(row.minutes or None, ".1f"),
    ]


def _format_optional(value: Any, spec: str) -> str:
    return "" if value is None else format(value, spec)
