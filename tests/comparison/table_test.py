"""Tests of the table of a comparison in every format."""

import csv
import json
import math

import pytest

from mixer_jax.comparison.plan import EvalData, Variation
from mixer_jax.comparison.table import FORMATS, Row, Table, cost_unit, find_paper_rows, format_table

ROW = Row(
    "small",
    "",
    "Mixer-custom",
    "mixer",
    (32, 32),
    (0, 1),
    (98.0, 99.0),
    360,
    2,
    150_794,
    5_113_000,
    1_437,
    100,
    2 * 10**12,
    1234.5678,
    64,
    "cpu",
    90.0,
)
OTHER = ROW._replace(model="large|x", top1=(97.0, 99.5), device_seconds=180.0)
DATA = EvalData("digits/all", "test")


def make_table(*rows: Row, variation: Variation | None = None, topology: str = "") -> Table:
    return Table(list(rows), DATA, variation, topology, find_paper_rows(["Mixer-B/16"], "jft"), [])


def test_mean_and_deviation_need_all_runs() -> None:
    assert ROW.mean == 98.5
    assert ROW.std == pytest.approx(math.sqrt(0.5))
    assert ROW._replace(num_runs=3).mean is None
    one = ROW._replace(top1=(98.0,), num_runs=1)
    assert (one.mean, one.std) == (98.0, None)
    assert ROW._replace(top1=(), num_runs=0).mean is None


def test_text_has_rounded_numbers_and_only_columns_in_use() -> None:
    title, _, header, small, *_ = format_table(make_table(ROW, OTHER), "text").splitlines()
    assert title == "small, large|x on digits/all test"
    names = header.split("  ")
    assert [name.strip() for name in names if name] == [
        "model",
        "top-1 %",
        "±",
        "runs",
        "parameters",
        "MFLOPs/image",
        "training TFLOPs",
        "images/s",
        "batch",
        "device-minutes",
    ]
    cells = ["small", "98.50", "0.71", "2", "150,794", "5.113", "2", "1,235", "64", "1.5"]
    assert small.split() == cells


def test_paper_rows_are_those_of_the_model_and_data() -> None:
    assert [(row.model, row.data) for row in find_paper_rows(["Mixer-B/16"], "jft")] == [
        ("Mixer-B/16", "jft")
    ]
    assert {row.data for row in find_paper_rows(["Mixer-B/16"], "")} == {"i1k", "i21k", "jft"}
    text = format_table(make_table(ROW), "text")
    assert "From the paper" in text
    assert "1,384" in text


def test_markdown_escapes_bars() -> None:
    text = format_table(make_table(ROW, OTHER), "markdown")
    assert "| large\\|x |" in text
    assert text.startswith("## small, large|x on digits/all test\n")


def test_csv_and_json_are_unrounded() -> None:
    table = make_table(ROW, OTHER)
    first, second = csv.DictReader(format_table(table, "csv").splitlines())
    assert (first["images_per_second"], first["mean"], first["top1"]) == (
        "1234.5678",
        "98.5",
        "98.0 99.0",
    )
    assert second["model"] == "large|x"
    data = json.loads(format_table(table, "json"))
    assert data["rows"][0]["images_per_second"] == 1234.5678
    assert data["data"] == {"dataset": "digits/all", "split": "test"}
    assert data["paper"][0]["model"] == "Mixer-B/16"
    assert "device_seconds" in data["measured"]


def test_varied_key_and_topology_have_columns() -> None:
    variation = Variation("dataset.train_split", ("train[:50%]", "train"))
    rows = [
        ROW._replace(value="train[:50%]", num_train=718, core_days=0.125),
        ROW._replace(value="train", failed="loss must be finite"),
    ]
    text = format_table(make_table(*rows, variation=variation, topology="v3:4x4"), "text")
    for part in ("train_split", "training images", "718", "core-days on v3:4x4", "0.125", "failed"):
        assert part in text


@pytest.mark.parametrize(
    ("seconds", "unit"),
    [([0.5], "seconds"), ([59.0, 7e3], "seconds"), ([3_600.0], "hours"), ([2e5, 9e4], "days")],
)
def test_cost_unit_suits_the_smallest_cost(seconds: list[float], unit: str) -> None:
    assert cost_unit([ROW._replace(device_seconds=x) for x in seconds]) == unit


@pytest.mark.parametrize("file_format", FORMATS)
def test_models_without_measurements_have_a_row(file_format: str) -> None:
    row = Row("Mixer-B/16", "", "Mixer-B/16", "mixer", (224, 224), (), (), None, 0, 1, 2)
    table = Table([row], None, None, "", [], [])
    assert "Mixer-B/16" in format_table(table, file_format)
