"""Tests of the table: the paper's values, means, notes and every format."""

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from mixer_jax.errors import DiskFullError, OutputWriteError
from mixer_jax.suites.builtin import SUITES
from mixer_jax.suites.plan import TransferPlan
from mixer_jax.suites.table import (
    MARK,
    Row,
    Table,
    as_csv,
    as_json,
    as_markdown,
    as_text,
    draw_table,
    make_table,
    report,
)
from mixer_jax.suites.tasks import FineTuneTask, Suite
from mixer_jax.suites.workdir import RunResult, Throughput, save_plan, save_result, save_throughput
from tests.helpers.file_size_limit import file_size_limit
from tests.helpers.lines import each_mentions, some_line_mentions
from tests.helpers.messages import mentions, raises
from tests.helpers.tiny_suite import LARGE_INFO, PROBE, make_plan

THROUGHPUT = Throughput(1234.5, 64, "TPU v4", (224, 224))


def large_plan(suite: Suite, size: int = 448, **fields: Any) -> TransferPlan:
    """Creates a plan for Mixer-L/16, pre-trained on ImageNet-21k unless `fields` differ."""
    fields = {"checkpoint": "Mixer-L_16.npz", "pretrain_dataset": "i21k", **fields}
    return make_plan(suite, size, model_info=LARGE_INFO, **fields)


def make_scores(top1: float, log_likelihood: float = -1.0, count: int = 100) -> dict[str, float]:
    return {"top1": top1, "log_likelihood": log_likelihood, "num_examples": count}


def save_results(task: FineTuneTask, workdir: Path, top1: float) -> None:
    """Saves results of every run of a task; the final ones have about `top1`."""
    for index, rate in enumerate(task.learning_rates):
        result = RunResult({"validation": make_scores(0.5 + 0.01 * index)}, 60.0)
        save_result(f"{workdir}/{task.name}/choose/learning_rate={rate:g}", result)
    for index, seed in enumerate(task.seeds):
        scores = {"test": make_scores(top1 + 0.01 * (index - 1), count=task.num_examples[3])}
        scores |= {name: make_scores(top1 + 0.05, count=46_837) for name in task.extra_evals}
        save_result(f"{workdir}/{task.name}/final/seed={seed}", RunResult(scores, 120.0))


@pytest.fixture
def avg5(tmp_path: Path) -> Table:
    for index, task in enumerate(SUITES["avg5"].tasks):
        assert isinstance(task, FineTuneTask)
        save_results(task, tmp_path, 0.8 + 0.02 * index)
    return make_table(large_plan(SUITES["avg5"]), str(tmp_path), THROUGHPUT)


def test_make_table_has_the_papers_values(avg5: Table) -> None:
    imagenet, real, cifar10, *_, mean = avg5.rows
    assert (imagenet.task, cifar10.task) == ("imagenet", "cifar10")
    assert mentions(real.task, "imagenet", "real")
    assert mentions(mean.task, "avg5")
    assert (imagenet.mean, imagenet.paper) == (pytest.approx(80.0), 84.15)
    assert imagenet.difference == pytest.approx(-4.15)
    assert imagenet.std == pytest.approx(1.0)
    assert (imagenet.learning_rate, imagenet.runs, imagenet.image_size) == (0.06, 3, 448)
    assert imagenet.minutes == pytest.approx(4 * 1 + 3 * 2)
    assert (real.mean, real.paper, real.num_examples) == (pytest.approx(85.0), 87.86, 46_837)
    assert cifar10.paper is None
    # The mean counts ImageNet once, not its ReaL labels.
    assert mean.mean == pytest.approx((80 + 82 + 84 + 86 + 88) / 5)
    assert (mean.runs, mean.paper) == (5, 93.91)


def test_as_text_marks_values_of_the_paper(avg5: Table) -> None:
    text = as_text(avg5)
    # One column has the mark, which is explained below.
    assert text.splitlines()[2].count(MARK) == 1
    assert some_line_mentions(text, MARK, "Table 2", "Mixer-L/16", "i21k", "448", "TPU v3")
    assert some_line_mentions(text, "1234", "TPU v4", "224", "64", MARK, "105", "448")
    assert some_line_mentions(text, MARK, "410", "core-days")
    assert not some_line_mentions(text, "device-days")
    markdown = as_markdown(avg5).splitlines()
    assert markdown[2].count("|") == 11
    assert (
        "| imagenet | 448 | 0.06 | 80.00 | 1.00 | 3 | 84.15 | -4.15 | 50,000 | 10.0 |" in markdown
    )
    data = json.loads(as_json(avg5))
    assert mentions(data["paper"]["source"], "paper")
    assert data["paper_core_days"] == 410
    assert data["throughput"]["images_per_second"] == 1234.5


def test_as_csv_has_unrounded_values(avg5: Table) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(avg5))))
    assert [row["task"] for row in rows] == [row.task for row in avg5.rows]
    assert float(rows[0]["mean"]) == avg5.rows[0].mean
    assert float(rows[0]["difference"]) == avg5.rows[0].difference
    assert rows[2]["paper"] == ""


def test_as_text_omits_empty_columns(tmp_path: Path) -> None:
    suite = Suite("one", "one", (PROBE,))
    table = make_table(large_plan(suite, 16, pretrain_dataset=""), str(tmp_path), None)
    assert MARK not in as_text(table)
    # Task, image size and accuracy.
    assert as_markdown(table).splitlines()[2].count("|") == 4
    assert len(table.rows) == 2
    assert some_line_mentions(as_text(table), *(row.task for row in table.rows))


def test_make_table_has_a_mean_per_group(tmp_path: Path) -> None:
    suite = SUITES["vtab1k"]
    for index, task in enumerate(suite.tasks):
        assert isinstance(task, FineTuneTask)
        save_results(task, tmp_path, 0.5 + 0.01 * index)
    table = make_table(large_plan(suite), str(tmp_path), None)
    means = table.rows[len(suite.tasks) :]
    assert [row.runs for row in means] == [7, 4, 8, 19]
    groups = ("natural", "specialized", "structured", "vtab1k")
    assert each_mentions([row.task for row in means], *((group,) for group in groups))
    natural, _, _, vtab1k = means
    assert natural.mean == pytest.approx(53.0)
    assert vtab1k.mean == pytest.approx(59.0)
    assert (vtab1k.paper, natural.paper) == (74.95, None)


def test_make_table_has_no_mean_of_incomplete_tasks(tmp_path: Path) -> None:
    first = SUITES["avg5"].tasks[0]
    assert isinstance(first, FineTuneTask)
    save_results(first, tmp_path, 0.8)
    table = make_table(large_plan(SUITES["avg5"], 224), str(tmp_path), None)
    *tasks, mean = table.rows
    assert (mean.mean, mean.runs, mean.paper) == (None, 1, 93.63)
    assert [row.mean is None for row in tasks] == [False, False, True, True, True, True]
    incomplete = ("cifar10", "cifar100", "pets", "flowers")
    (note,) = (note for note in table.notes if mentions(note, *incomplete))
    assert not mentions(note, "imagenet")


def test_make_table_has_no_mean_of_incomplete_runs(tmp_path: Path) -> None:
    first = SUITES["imagenet"].tasks[0]
    assert isinstance(first, FineTuneTask)
    save_results(first, tmp_path, 0.8)
    (tmp_path / "imagenet/final/seed=1/result.json").unlink()
    table = make_table(large_plan(SUITES["imagenet"]), str(tmp_path), None)
    assert [row.mean for row in table.rows] == [None, None]
    assert [row.learning_rate for row in table.rows] == [0.06, 0.06]
    # The number of completed runs is shown.
    assert [row.runs for row in table.rows] == [2, 2]
    assert mentions(table.notes[-1], *(row.task for row in table.rows))


def test_report_writes_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = SUITES["avg5"]
    for task in suite.tasks:
        assert isinstance(task, FineTuneTask)
        save_results(task, tmp_path, 0.9)
    plan = large_plan(suite, device_days=0.25, overrides=(("batch_size", "64"),))
    save_plan(str(tmp_path), plan)
    save_throughput(str(tmp_path), THROUGHPUT)
    report(str(tmp_path))
    out = capsys.readouterr().out
    assert some_line_mentions(out, "avg5", "90.00", "93.91")
    assert some_line_mentions(out, "0.25", "device-days", "410", "core-days")
    assert some_line_mentions(out, "batch_size", "64")
    assert (tmp_path / "results.txt").read_text() in out
    for name in ("results.csv", "results.json", "results.md"):
        assert "imagenet" in (tmp_path / name).read_text()
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    # Deterministic.
    before = (tmp_path / "results.json").read_bytes()
    report(str(tmp_path))
    assert (tmp_path / "results.json").read_bytes() == before


def test_report_prints_the_table_if_it_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_plan(str(tmp_path), large_plan(SUITES["avg5"]))
    (tmp_path / "results.csv").mkdir()
    with raises(OutputWriteError, str(tmp_path), f"{tmp_path}/results.csv"):
        report(str(tmp_path))
    assert some_line_mentions(capsys.readouterr().out, "avg5", "93.91")
    (tmp_path / "results.csv").rmdir()
    with raises(DiskFullError, str(tmp_path), "File too large"), file_size_limit(10):
        report(str(tmp_path))
    assert some_line_mentions(capsys.readouterr().out, "avg5", "93.91")
    assert not list(tmp_path.glob("*.tmp"))


def test_make_table_counts_minutes_of_a_probe_once(tmp_path: Path) -> None:
    values = {"1_shot": 0.4, "5_shot": 0.5, "num_examples": 167.0}
    save_result(f"{tmp_path}/probe/checkpoint", RunResult({"test": values}, 120.0))
    suite = Suite("one", "one", (PROBE,))
    table = make_table(large_plan(suite, 16, pretrain_dataset=""), str(tmp_path), None)
    assert [row.minutes for row in table.rows] == [2.0, 0.0]


def test_make_table_counts_minutes_of_a_run_once(avg5: Table) -> None:
    assert [row.minutes > 0 for row in avg5.rows[:3]] == [True, False, True]


def test_as_markdown_escapes_bars(tmp_path: Path) -> None:
    suite = Suite("one", "one", (dataclasses.replace(PROBE, name="a|b"),))
    table = make_table(large_plan(suite, 16, pretrain_dataset=""), str(tmp_path), None)
    assert r"| a\|b" in as_markdown(table)


def test_make_table_notes_image_sizes_that_differ_from_the_paper(tmp_path: Path) -> None:
    plan = large_plan(SUITES["avg5"])
    plan.image_sizes["cifar10"] = plan.image_sizes["cifar100"] = 224
    table = make_table(plan, str(tmp_path), THROUGHPUT._replace(image_size=(448, 448)))
    (note,) = (note for note in table.notes if mentions(note, "cifar10", "cifar100", "224"))
    assert not any(mentions(note, other) for other in ("imagenet", "pets", "flowers"))
    others = make_table(large_plan(SUITES["avg5"]), "", None).notes
    assert not any(mentions(note, "cifar10", "448") for note in others)
    assert mentions(table.notes[0], "TPU v4", "448", "64", "105")
    # If throughput was measured at the paper's size, the size is shown once.
    assert table.notes[0].count("448") == 1


def test_make_table_notes_assumed_pretraining_data(tmp_path: Path) -> None:
    plan = large_plan(SUITES["avg5"], pretrain_dataset_assumed=True)
    notes = make_table(plan, str(tmp_path), None).notes
    assert some_line_mentions("\n".join(notes), "i21k", "21843", "--pretrain_dataset")


def test_draw_table_has_a_point_for_every_value(avg5: Table) -> None:
    (axes,) = draw_table(avg5).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.task for row in avg5.rows]
    points = [
        (line.get_marker(), *line.get_xdata(), *line.get_ydata())
        for line in axes.lines
        if len(line.get_xdata())
    ]
    for y, row in enumerate(avg5.rows):
        assert ("o", row.mean, y) in points
        assert ((("d", row.paper, y)) in points) == (row.paper is not None)


def test_draw_table_without_values(avg5: Table) -> None:
    assert draw_table(avg5._replace(rows=[Row("pending")])) is None
