"""Table of a suite's results next to the paper's: text, Markdown, CSV, JSON and a plot."""

import csv
import io
import json
import statistics
from typing import Any, NamedTuple

from etils import epath

from mixer_jax.checkpoints.model_info import format_image_size
from mixer_jax.errors import UserError
from mixer_jax.files import atomic_write, output_errors
from mixer_jax.models.registry import get_family
from mixer_jax.suites.paper_results import PaperRow, find_row
from mixer_jax.suites.plan import TransferPlan, final_folder, sweep_folder
from mixer_jax.suites.tasks import (
    NETWORK_TITLES,
    RANDOM_INIT,
    TEST,
    VALIDATION,
    FineTuneTask,
    ProbeTask,
)
from mixer_jax.suites.workdir import (
    PLAN_FILE,
    RunResult,
    Throughput,
    read_failure,
    read_plan,
    read_result,
    read_throughput,
    select_learning_rate,
)
from mixer_jax.visualization.figures import make_figure, render_figure
from mixer_jax.visualization.tables import align_columns, drop_empty_columns, markdown_lines

# Marks values copied from the paper.
MARK = "*"


class Row(NamedTuple):
    """Row of the table; accuracies in percent.

    Attributes:
        task: Name of the task and evaluation.
        image_size: Image size, in pixels; None for a mean.
        learning_rate: Learning rate selected, if any.
        mean: Mean top-1 accuracy over the runs; None if there is none yet.
        std: Sample standard deviation over the runs, if there are several.
        runs: Number of completed runs; for a mean over tasks, the number of tasks.
        num_examples: Number of test examples of each run.
        minutes: Duration of the runs, including the sweep; 0 for further evaluations of them.
        failed: Reason for a missing mean; empty if runs are only missing.
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
        rows: Tasks and their evaluations, then means.
        notes: Further information, one line each.
        paper: Row of the paper for comparison, if there is one.
        throughput: Throughput of the model, if it was measured.
    """

    plan: TransferPlan
    rows: list[Row]
    notes: list[str]
    paper: PaperRow | None
    throughput: Throughput | None

    @property
    def title(self) -> str:
        """Model, checkpoint and suite."""
        plan = self.plan
        return f"{plan.model_info.name}, from {plan.checkpoint}: {plan.suite.title}"


def report(workdir: str) -> None:
    """Prints a suite's table and writes it in every format into the workdir.

    Args:
        workdir: Absolute path or URL of the suite's workdir.

    Raises:
        UserError: The workdir contains no suite, or a file is damaged.
        OutputWriteError, WriteFailureError: The table cannot be written.
    """
    plan = read_plan(workdir)
    if plan is None:
        raise UserError(f"--workdir={workdir} must contain a suite, but has no {PLAN_FILE}.")
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
    with output_errors(workdir):
        for name, content in files.items():
            atomic_write(epath.Path(workdir) / name, content)
    print(f"\nalso as {workdir}/results.{{csv,json,md,png}}", flush=True)


def make_table(plan: TransferPlan, workdir: str, throughput: Throughput | None) -> Table:
    """Builds the table of the results in a suite's workdir.

    Raises:
        UserError: A result is damaged.
    """
    info = plan.model_info
    model = get_family(info.family).full_name(info.variant)
    paper = find_row(plan.pretrain_dataset, model, plan.largest_image_size)
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
    return Table(plan, rows, _make_notes(plan, rows, paper, throughput), paper, throughput)


def _fine_tune_rows(
    task: FineTuneTask, plan: TransferPlan, workdir: str, paper: PaperRow | None
) -> list[Row]:
    """Returns the row of a task's test split, then those of its extra evaluations."""
    failed = read_failure(f"{workdir}/{task.name}")
    learning_rate: float | None = task.learning_rates[0]
    sweep: dict[float, RunResult] = {}
    if len(task.learning_rates) > 1:
        for rate in task.learning_rates:
            result = read_result(f"{workdir}/{sweep_folder(task, rate)}", [VALIDATION])
            if result:
                sweep[rate] = result
        is_complete = len(sweep) == len(task.learning_rates)
        learning_rate = select_learning_rate(sweep) if is_complete else None
        if is_complete and learning_rate is None and not failed:
            failed = "; ".join(result.failed for result in sweep.values())
    names = [TEST, *task.extra_evals]
    final = [read_result(f"{workdir}/{final_folder(task, seed)}", names) for seed in task.seeds]
    done = [result for result in final if result and not result.failed]
    seconds = sum(result.seconds for result in [*sweep.values(), *done])
    rows = []
    for name in names:
        column = task.paper_column if name == TEST else name
        row = Row(
            task.name if name == TEST else f"{task.name}, {name}",
            group=task.group,
            image_size=plan.image_sizes[task.name],
            learning_rate=learning_rate,
            runs=len(done),
            paper=getattr(paper, column, None) if column else None,
            # Extra evaluations have no runs of their own.
            minutes=seconds / 60 if name == TEST else 0.0,
            failed=failed,
        )
        if len(done) == len(task.seeds) and not failed:
            accuracies = [result.scores[name]["top1"] for result in done]
            row = row._replace(
                mean=100 * statistics.fmean(accuracies),
                std=100 * statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                num_examples=int(done[0].scores[name]["num_examples"]),
            )
        rows.append(row)
    return rows


def _probe_rows(task: ProbeTask, plan: TransferPlan, workdir: str) -> list[Row]:
    """Returns a row per network and metric."""
    folder = f"{workdir}/{task.name}"
    few_shot = task.method == "few_shot"
    metrics = [f"{shots}_shot" for shots in task.shots] if few_shot else [task.method]
    rows = []
    for network in task.networks:
        result = read_result(f"{folder}/{network}", [TEST], [*metrics, "num_examples"])
        for metric in metrics:
            name = f"{task.name}, {metric.replace('_', '-')}" if few_shot else task.name
            name += f", {NETWORK_TITLES[network]}" if network == RANDOM_INIT else ""
            row = Row(name, image_size=plan.image_sizes[task.name])
            if result:
                values = result.scores[TEST]
                std = values.get(f"{metric}_std") if len(task.seeds) > 1 else None
                row = row._replace(
                    mean=100 * values[metric],
                    std=None if std is None else 100 * std,
                    runs=len(task.seeds) if few_shot else 1,
                    num_examples=int(values["num_examples"]),
                    minutes=result.seconds / 60 if metric == metrics[0] else 0.0,
                )
            else:
                row = row._replace(failed=read_failure(folder))
            rows.append(row)
    return rows


def _mean_row(name: str, rows: list[Row]) -> Row:
    """Returns the mean of rows; without a value if one of them has none."""
    values = [row.mean for row in rows if row.mean is not None]
    mean = sum(values) / len(values) if len(values) == len(rows) else None
    return Row(name, mean=mean, runs=len(values), minutes=sum(row.minutes for row in rows))


def _make_notes(
    plan: TransferPlan, rows: list[Row], paper: PaperRow | None, throughput: Throughput | None
) -> list[str]:
    notes = _cost_notes(plan, paper, throughput)
    if paper:
        notes.append(f"{MARK} from the paper: {paper.title}; cores are TPU v3 cores")
        other_sizes = [
            f"{task.name} ({plan.image_sizes[task.name]} px)"
            for task in plan.suite.tasks
            if isinstance(task, FineTuneTask) and plan.image_sizes[task.name] != paper.image_size
        ]
        if other_sizes:
            names = ", ".join(other_sizes)
            notes.append(f"image sizes that differ from the paper's row: {names}")
    if plan.pretrain_dataset_assumed:
        notes.append(
            f"pre-trained on {plan.pretrain_dataset}: assumed from the number of classes, "
            f"{plan.model_info.num_classes:,}; override with --pretrain_dataset"
        )
    notes += [f"differs from the protocol: {key}={text}" for key, text in plan.protocol_overrides]
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
            differs = throughput.image_size != (paper.image_size, paper.image_size)
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


def as_text(table: Table) -> str:
    """Formats a table for a terminal."""
    lines = align_columns(_format_cells(table))
    return "\n".join([table.title, "", *lines, "", *table.notes])


def as_markdown(table: Table) -> str:
    """Formats a table in Markdown."""
    notes = [f"{note}  " for note in table.notes]
    lines = markdown_lines(_format_cells(table))
    return "\n".join([f"## {table.title}", "", *lines, "", *notes, ""])


def as_csv(table: Table) -> str:
    """Formats the rows of a table as CSV, unrounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*Row._fields, "difference"])
    writer.writerows([*row, row.difference] for row in table.rows)
    return text.getvalue()


def as_json(table: Table) -> str:
    """Formats a table as JSON, unrounded."""
    plan, paper, throughput = table.plan, table.paper, table.throughput
    data = {
        "title": table.title,
        "rows": [row._asdict() | {"difference": row.difference} for row in table.rows],
        "paper": paper._asdict() | {"source": "from the paper"} if paper else None,
        "checkpoint": plan.checkpoint,
        "suite": plan.suite.name,
        "throughput": throughput._asdict() if throughput else None,
        "device_days_of_pretraining": plan.device_days,
        "paper_images_per_second_per_core": paper.images_per_second if paper else None,
        "paper_core_days": paper.core_days if paper else None,
        "notes": table.notes,
    }
    return json.dumps(data, indent=2) + "\n"


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
    return drop_empty_columns([_format_row(row) for row in table.rows])


def _format_row(row: Row) -> dict[str, str]:
    """Formats the cells of a row by column."""
    mean = "failed" if row.failed else "-" if row.mean is None else f"{row.mean:.2f}"
    return {
        "task": row.task,
        "px": _format_optional(row.image_size, "d"),
        "learning rate": _format_optional(row.learning_rate, "g"),
        "top-1 %": mean,
        "±": _format_optional(row.std, ".2f"),
        "runs": _format_optional(row.runs or None, "d"),
        f"paper{MARK} %": _format_optional(row.paper, ".2f"),
        "difference": _format_optional(row.difference, "+.2f"),
        "images": _format_optional(row.num_examples or None, ",d"),
        "minutes": _format_optional(row.minutes or None, ".1f"),
    }


def _format_optional(value: Any, spec: str) -> str:
    return "" if value is None else format(value, spec)
