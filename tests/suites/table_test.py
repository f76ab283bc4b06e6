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
from mixer_jax.model.variants import VARIANTS
from mixer_jax.suites.builtin import SUITES
from mixer_jax.suites.notes import largest_image_size
from mixer_jax.suites.plan import TransferPlan, read_plan, save_plan
from mixer_jax.suites.report import report, save_throughput
from mixer_jax.suites.results import RunResult, save_result, select_learning_rate
from mixer_jax.suites.run_configs import SuiteSettings
from mixer_jax.suites.table import Table, as_csv, as_json, as_markdown, as_text, make_table
from mixer_jax.suites.tasks import FineTuneTask, Suite
from mixer_jax.suites.throughput import Throughput
from tests.helpers.tiny_suite import PROBE

ABOUT = ModelInfo(
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
    rows = {row.task: row for row in avg5.rows}
    imagenet, real, mean = rows["imagenet"], rows["imagenet, real"], rows["mean of avg5"]
    assert (imagenet.mean, imagenet.paper) == (pytest.approx(80.0), 84.15)
    assert imagenet.difference == pytest.approx(-4.15)
    assert imagenet.deviation == pytest.approx(1.0)
    assert (imagenet.learning_rate, imagenet.runs, imagenet.image_size) == (0.06, 3, 448)
    assert imagenet.minutes == pytest.approx(4 * 1 + 3 * 2)
    assert (real.mean, real.paper, real.num_examples) == (pytest.approx(85.0), 87.86, 46_837)
    assert rows["cifar10"].paper is None
    # ReaL's labels are no task of their own.
    assert mean.mean == pytest.approx((80 + 82 + 84 + 86 + 88) / 5)
    assert (mean.runs, mean.paper) == (5, 93.91)


def test_what_is_the_papers_is_marked(avg5: Table) -> None:
    text = as_text(avg5)
    heads = text.splitlines()[2]
    assert "paper* %" in heads
    assert (
        "* from the paper: Table 2, Mixer-L/16 from i21k at 448 px; cores are of a TPU v3" in text
    )
    assert (
        "throughput: 1,234 images/s on one TPU v4 at 224 px, in batches of 64; paper*: 105 a core "
        "at 448 px\n" in text
    )
    assert "pre-training: not known here; paper*: 410 core-days" in text
    markdown = as_markdown(avg5).splitlines()
    assert markdown[2].startswith("| task | px | learning rate |")
    assert (
        "| imagenet | 448 | 0.06 | 80.00 | 1.00 | 3 | 84.15 | -4.15 | 50,000 | 10.0 |" in markdown
    )
    told = json.loads(as_json(avg5))
    assert told["paper"]["source"] == "from the paper"
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
    text = as_text(table)
    assert "paper" not in text
    assert "learning rate" not in text
    assert "not finished yet: probe, 1-shot, probe, 5-shot" in text


def test_groups_have_means_of_their_own(tmp_path: Path) -> None:
    suite = SUITES["vtab1k"]
    for number, task in enumerate(suite.tasks):
        assert isinstance(task, FineTuneTask)
        pretend(task, tmp_path, 0.5 + 0.01 * number)
    table = make_table(make_plan(suite), str(tmp_path), None)
    means = {row.task: row for row in table.rows if row.task.startswith("mean of")}
    assert [(name, row.runs) for name, row in means.items()] == [
        ("mean of natural", 7),
        ("mean of specialised", 4),
        ("mean of structured", 8),
        ("mean of vtab1k", 19),
    ]
    assert means["mean of natural"].mean == pytest.approx(53.0)
    assert means["mean of vtab1k"].mean == pytest.approx(59.0)
    assert (means["mean of vtab1k"].paper, means["mean of natural"].paper) == (74.95, None)


def test_a_mean_needs_every_task(tmp_path: Path) -> None:
    first = SUITES["avg5"].tasks[0]
    assert isinstance(first, FineTuneTask)
    pretend(first, tmp_path, 0.8)
    table = make_table(make_plan(SUITES["avg5"], 224), str(tmp_path), None)
    *tasks, mean = table.rows
    assert (mean.mean, mean.runs, mean.paper) == (None, 1, 93.63)
    assert [row.mean is None for row in tasks] == [False, False, True, True, True, True]
    assert "not finished yet: cifar10, cifar100, pets, flowers" in table.notes


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
    assert "imagenet, real" in table.notes[-1]


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
    assert "mean of avg5" in told
    assert "pre-training: 0.25 device-days; paper*: 410 core-days" in told
    assert "not the protocol's: batch_size=64" in told
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
    with pytest.raises(UserError, match=r"the table cannot be written \(.*is a directory\); mend"):
        report(str(tmp_path))
    assert "mean of avg5" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.draft"))


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
    assert r"| a\|b, 1-shot |" in as_markdown(table)


def test_other_sizes_than_the_papers_are_told(tmp_path: Path) -> None:
    plan = make_plan(SUITES["avg5"])
    plan.image_sizes["cifar10"] = plan.image_sizes["cifar100"] = 224
    table = make_table(plan, str(tmp_path), SPEED._replace(image_size=(448, 448)))
    note = "tasks at other sizes than the paper's row: cifar10 (224 px), cifar100 (224 px)"
    assert note in table.notes
    assert not any(
        "other sizes" in n for n in make_table(make_plan(SUITES["avg5"]), "", None).notes
    )
    assert table.notes[0].endswith("on one TPU v4 at 448 px, in batches of 64; paper*: 105 a core")


def test_the_size_to_compare_at_is_that_of_fine_tuning() -> None:
    plan = make_plan(Suite("two", "two", (SUITES["avg5"].tasks[0], PROBE)), 224)
    plan.image_sizes[PROBE.name] = 448
    assert largest_image_size(plan) == 224
    assert largest_image_size(make_plan(Suite("one", "one", (PROBE,)), 16)) == 16


def test_what_is_assumed_is_told(tmp_path: Path) -> None:
    class Assuming(TransferPlan):
        pretrain_dataset_assumed = True

    notes = make_table(Assuming(*make_plan(SUITES["avg5"])), str(tmp_path), None).notes
    assert (
        "pre-trained on i21k: assumed from its 21,843 classes; --pretrain_dataset tells otherwise"
        in notes
    )


def test_plans_survive_a_file(tmp_path: Path) -> None:
    plan = make_plan(SUITES["vtab1k"], overrides=(("batch_size", "64"),), device_days=1.5)
    save_plan(str(tmp_path), plan)
    save_plan(str(tmp_path), plan)
    assert read_plan(str(tmp_path)) == plan
    assert dataclasses.replace(plan.about, class_names=()) == plan.about
