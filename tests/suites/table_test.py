"""Tests of the table: the paper's values, means, marks, every form of it."""

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import VARIANTS
from mixer_jax.suites.builtin import SUITES
from mixer_jax.suites.notes import MARK, largest_image_size
from mixer_jax.suites.plan import TransferPlan, read_plan, save_plan
from mixer_jax.suites.report import report, save_throughput
from mixer_jax.suites.results import RunResult, save_result, select_learning_rate
from mixer_jax.suites.run_configs import SuiteSettings
from mixer_jax.suites.table import Table, as_csv, as_json, as_markdown, as_text, make_table
from mixer_jax.suites.tasks import FineTuneTask, Suite
from mixer_jax.suites.throughput import Throughput
from tests.helpers.lines import each_mentions, some_line_mentions
from tests.helpers.messages import mentions, raises
from tests.helpers.tiny_suite import PROBE

ABOUT = ModelInfo(
    "mixer",
    "L/16",
    VARIANTS["L/16"],
    (224, 224),
    21_843,
    (),
    gelu="tanh",
    eval_crop="shorter_side",
    exif_orientation=False,
    loss="sigmoid",
)
SPEED = Throughput(1234.5, 64, "TPU v4", (224, 224))


def make_plan(suite: Suite, size: int = 448, **fields: Any) -> TransferPlan:
    setting = SuiteSettings("Mixer-L_16.npz", ABOUT, "", fields.pop("overrides", ()))
    sizes = {task.name: size for task in suite.tasks}
    return TransferPlan(suite, setting, sizes, **{"pretrain_dataset": "i21k", **fields})


def scored(top1: float, log_likelihood: float = -1.0, count: int = 100) -> dict[str, float]:
    return {"top1": top1, "log_likelihood": log_likelihood, "num_examples": count}


def pretend(task: FineTuneTask, workdir: Path, top1: float) -> None:
    """Writes results of every run of a task, whose final ones score around `top1`."""
    for number, rate in enumerate(task.learning_rates):
        result = RunResult({"validation": scored(0.5 + 0.01 * number)}, 60.0)
        save_result(f"{workdir}/{task.name}/choose/learning_rate={rate:g}", result)
    for number, seed in enumerate(task.seeds):
        scores = {"test": scored(top1 + 0.01 * (number - 1), count=task.num_examples[3])}
        scores |= {name: scored(top1 + 0.05, count=46_837) for name in task.also}
        save_result(f"{workdir}/{task.name}/final/seed={seed}", RunResult(scores, 120.0))


@pytest.fixture
def avg5(tmp_path: Path) -> Table:
    for number, task in enumerate(SUITES["avg5"].tasks):
        assert isinstance(task, FineTuneTask)
        pretend(task, tmp_path, 0.8 + 0.02 * number)
    return make_table(make_plan(SUITES["avg5"]), str(tmp_path), SPEED)


def test_rows_stand_beside_the_papers(avg5: Table) -> None:
    imagenet, real, cifar10, *_, mean = avg5.rows
    assert (imagenet.task, cifar10.task) == ("imagenet", "cifar10")
    assert mentions(real.task, "imagenet", "real")
    assert mentions(mean.task, "avg5")
    assert (imagenet.mean, imagenet.paper) == (pytest.approx(80.0), 84.15)
    assert imagenet.difference == pytest.approx(-4.15)
    assert imagenet.deviation == pytest.approx(1.0)
    assert (imagenet.learning_rate, imagenet.runs, imagenet.image_size) == (0.06, 3, 448)
    assert imagenet.minutes == pytest.approx(4 * 1 + 3 * 2)
    assert (real.mean, real.paper, real.num_examples) == (pytest.approx(85.0), 87.86, 46_837)
    assert cifar10.paper is None
    # ReaL's labels are no task of their own.
    assert mean.mean == pytest.approx((80 + 82 + 84 + 86 + 88) / 5)
    assert (mean.runs, mean.paper) == (5, 93.91)


def test_what_is_the_papers_is_marked(avg5: Table) -> None:
    text = as_text(avg5)
    # One column is marked, and the mark explained.
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
    told = json.loads(as_json(avg5))
    assert mentions(told["paper"]["source"], "paper")
    assert told["paper_core_days"] == 410
    assert told["throughput"]["images_per_second"] == 1234.5


def test_csv_holds_every_number(avg5: Table) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(avg5))))
    assert [row["task"] for row in rows] == [row.task for row in avg5.rows]
    assert float(rows[0]["mean"]) == avg5.rows[0].mean
    assert float(rows[0]["difference"]) == avg5.rows[0].difference
    assert rows[2]["paper"] == ""


def test_columns_that_say_nothing_are_left_out(tmp_path: Path) -> None:
    suite = Suite("one", "one", (PROBE,))
    table = make_table(make_plan(suite, 16, pretrain_dataset=""), str(tmp_path), None)
    assert MARK not in as_text(table)
    # The task, its image size and its score.
    assert as_markdown(table).splitlines()[2].count("|") == 4
    assert len(table.rows) == 2
    assert some_line_mentions(as_text(table), *(row.task for row in table.rows))


def test_groups_have_means_of_their_own(tmp_path: Path) -> None:
    suite = SUITES["vtab1k"]
    for number, task in enumerate(suite.tasks):
        assert isinstance(task, FineTuneTask)
        pretend(task, tmp_path, 0.5 + 0.01 * number)
    table = make_table(make_plan(suite), str(tmp_path), None)
    means = table.rows[len(suite.tasks) :]
    assert [row.runs for row in means] == [7, 4, 8, 19]
    groups = ("natural", "specialised", "structured", "vtab1k")
    assert each_mentions([row.task for row in means], *((group,) for group in groups))
    natural, _, _, vtab1k = means
    assert natural.mean == pytest.approx(53.0)
    assert vtab1k.mean == pytest.approx(59.0)
    assert (vtab1k.paper, natural.paper) == (74.95, None)


def test_a_mean_needs_every_task(tmp_path: Path) -> None:
    first = SUITES["avg5"].tasks[0]
    assert isinstance(first, FineTuneTask)
    pretend(first, tmp_path, 0.8)
    table = make_table(make_plan(SUITES["avg5"], 224), str(tmp_path), None)
    *tasks, mean = table.rows
    assert (mean.mean, mean.runs, mean.paper) == (None, 1, 93.63)
    assert [row.mean is None for row in tasks] == [False, False, True, True, True, True]
    unfinished = ("cifar10", "cifar100", "pets", "flowers")
    (note,) = (note for note in table.notes if mentions(note, *unfinished))
    assert not mentions(note, "imagenet")


def test_a_final_run_that_is_missing_leaves_no_score(tmp_path: Path) -> None:
    first = SUITES["imagenet"].tasks[0]
    assert isinstance(first, FineTuneTask)
    pretend(first, tmp_path, 0.8)
    (tmp_path / "imagenet/final/seed=1/result.json").unlink()
    table = make_table(make_plan(SUITES["imagenet"]), str(tmp_path), None)
    assert [row.mean for row in table.rows] == [None, None]
    assert [row.learning_rate for row in table.rows] == [0.06, 0.06]
    # How far it has come is told.
    assert [row.runs for row in table.rows] == [2, 2]
    assert mentions(table.notes[-1], *(row.task for row in table.rows))


def test_the_choice_is_by_score_then_likelihood_then_the_lower_rate() -> None:
    def run(top1: float, likelihood: float = -1.0, failed: str = "") -> RunResult:
        return RunResult({"validation": scored(top1, likelihood)}, 1.0, failed)

    assert select_learning_rate({0.1: run(0.5), 0.2: run(0.6), 0.3: run(0.4)}) == 0.2
    assert select_learning_rate({0.1: run(0.5, -2.0), 0.2: run(0.5, -1.0)}) == 0.2
    assert select_learning_rate({0.2: run(0.5), 0.1: run(0.5)}) == 0.1
    assert select_learning_rate({0.1: run(0.4), 0.2: run(0.9, failed="diverged")}) == 0.1
    assert select_learning_rate({0.1: run(0.4, failed="diverged")}) is None


def test_a_report_is_written_in_every_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = SUITES["avg5"]
    for task in suite.tasks:
        assert isinstance(task, FineTuneTask)
        pretend(task, tmp_path, 0.9)
    plan = make_plan(suite, device_days=0.25, overrides=(("batch_size", "64"),))
    save_plan(str(tmp_path), plan)
    save_throughput(str(tmp_path), SPEED)
    report(str(tmp_path))
    told = capsys.readouterr().out
    assert some_line_mentions(told, "avg5", "90.00", "93.91")
    assert some_line_mentions(told, "0.25", "device-days", "410", "core-days")
    assert some_line_mentions(told, "batch_size", "64")
    assert (tmp_path / "results.txt").read_text() in told
    for name in ("results.csv", "results.json", "results.md"):
        assert "imagenet" in (tmp_path / name).read_text()
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    # Twice the same.
    before = (tmp_path / "results.json").read_bytes()
    report(str(tmp_path))
    assert (tmp_path / "results.json").read_bytes() == before


def test_the_table_is_told_where_it_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_plan(str(tmp_path), make_plan(SUITES["avg5"]))
    (tmp_path / "results.csv").mkdir()
    with raises(UserError, "--workdir", f"{tmp_path}/results.csv", "--report"):
        report(str(tmp_path))
    assert some_line_mentions(capsys.readouterr().out, "avg5", "93.91")
    assert not list(tmp_path.glob("*.tmp"))


def test_minutes_are_counted_once(tmp_path: Path) -> None:
    values = {"1_shot": 0.4, "5_shot": 0.5, "num_examples": 167.0}
    save_result(f"{tmp_path}/probe/checkpoint", RunResult({"test": values}, 120.0))
    suite = Suite("one", "one", (PROBE,))
    table = make_table(make_plan(suite, 16, pretrain_dataset=""), str(tmp_path), None)
    assert [row.minutes for row in table.rows] == [2.0, 0.0]


def test_minutes_of_what_is_scored_besides(avg5: Table) -> None:
    assert [row.minutes > 0 for row in avg5.rows[:3]] == [True, False, True]


def test_bars_do_not_end_a_cell_of_markdown(tmp_path: Path) -> None:
    suite = Suite("one", "one", (dataclasses.replace(PROBE, name="a|b"),))
    table = make_table(make_plan(suite, 16, pretrain_dataset=""), str(tmp_path), None)
    assert r"| a\|b" in as_markdown(table)


def test_other_sizes_than_the_papers_are_told(tmp_path: Path) -> None:
    plan = make_plan(SUITES["avg5"])
    plan.image_sizes["cifar10"] = plan.image_sizes["cifar100"] = 224
    table = make_table(plan, str(tmp_path), SPEED._replace(image_size=(448, 448)))
    (note,) = (note for note in table.notes if mentions(note, "cifar10", "cifar100", "224"))
    assert not any(mentions(note, other) for other in ("imagenet", "pets", "flowers"))
    others = make_table(make_plan(SUITES["avg5"]), "", None).notes
    assert not any(mentions(note, "cifar10", "448") for note in others)
    assert mentions(table.notes[0], "TPU v4", "448", "64", "105")
    # Of throughput at the paper's size, that is told once.
    assert table.notes[0].count("448") == 1


def test_the_size_to_compare_at_is_that_of_fine_tuning() -> None:
    plan = make_plan(Suite("two", "two", (SUITES["avg5"].tasks[0], PROBE)), 224)
    plan.image_sizes[PROBE.name] = 448
    assert largest_image_size(plan) == 224
    assert largest_image_size(make_plan(Suite("one", "one", (PROBE,)), 16)) == 16


def test_what_is_assumed_is_told(tmp_path: Path) -> None:
    class Assuming(TransferPlan):
        pretrain_dataset_assumed = True

    notes = make_table(Assuming(*make_plan(SUITES["avg5"])), str(tmp_path), None).notes
    assert some_line_mentions("\n".join(notes), "i21k", "21843", "--pretrain_dataset")


def test_plans_survive_a_file(tmp_path: Path) -> None:
    plan = make_plan(SUITES["vtab1k"], overrides=(("batch_size", "64"),), device_days=1.5)
    save_plan(str(tmp_path), plan)
    save_plan(str(tmp_path), plan)
    assert read_plan(str(tmp_path)) == plan
    assert dataclasses.replace(plan.about, class_names=()) == plan.about
