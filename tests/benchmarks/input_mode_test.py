"""Tests of `--mode=input`."""

import json
from pathlib import Path

import pytest

from mixer_jax import benchmark
from mixer_jax.benchmarks.pipelines import (
    AUGMENT,
    CROP,
    DECODE,
    RANDAUGMENT,
    TASKS,
    sample_jpegs,
)
from mixer_jax.errors import UserError
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions, raises

SMALL = [
    "--mode=input",
    "--image_size=32",
    "--batch_size=4",
    "--rounds=2",
    "--images_per_round=8",
    "--num_threads=2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder with two JPEG files."""
    path = tmp_path_factory.mktemp("images")
    for name, file in zip("ab", sample_jpegs(2), strict=True):
        (path / f"{name}.jpg").write_bytes(file)
    return str(path)


@pytest.mark.slow
def test_json_has_every_pipeline(folder: str) -> None:
    done = run_cli("benchmark", *SMALL, f"--images={folder}", "--json")
    report = json.loads(done.stdout)
    assert report["files"] == 2
    assert 92 <= report["median_kilobytes"] <= 115
    assert report["num_threads"] == 2
    assert report["memory"] is None
    rows = {(row["task"], row["name"]): row for row in report["measurements"]}
    # tf.data decodes in two ways.
    names = ["mixer_jax", "tf.data", "tf.data"]
    assert [(task, name.split(",")[0]) for task, name in rows] == [
        (DECODE, "simplejpeg"),
        (DECODE, "OpenCV"),
        *((CROP, name) for name in names),
        *((AUGMENT, name) for name in names),
        (RANDAUGMENT, "mixer_jax"),
        (RANDAUGMENT, "tf.data"),
    ]
    for (task, name), row in rows.items():
        num_cores = 1 if task == RANDAUGMENT else min(2, report["cores"])
        per_core = row["images_per_second"] / num_cores
        assert row["images_per_second_per_core"] == pytest.approx(per_core)
        assert row["milliseconds"] == pytest.approx(1000 / per_core)
        assert row["relative_time"] > 0
        assert row["relative_time"] == 1 or name != "mixer_jax"


@pytest.mark.slow
def test_tables_without_tensorflow(folder: str) -> None:
    hide = "import sys; sys.modules['tensorflow'] = None"
    done = run_cli("benchmark", *SMALL, f"--images={folder}", "--memory_images=50", preamble=hide)
    (line,) = done.stderr.splitlines()
    assert mentions(line, "TensorFlow", "tf.data")
    environment, *tables = done.stdout.split("\n\n")
    assert mentions(environment, "files 2")
    *rates, memory = tables
    for task, table in zip(TASKS, rates, strict=True):
        assert table.startswith(f"{task}  ")
        assert ("mixer_jax" in table) == (task != DECODE)
        assert "tf.data" not in table
    title, *readings, growth = memory.splitlines()
    assert mentions(title, "memory", "mixer_jax", "MiB")
    # Twelve whole batches of four.
    counts = [int(reading.split()[1]) for reading in readings]
    assert len(counts) == 10
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (4, 48)
    resident = [int(reading.split()[-1]) for reading in readings]
    assert min(resident) > 50
    # One decimal place of a ratio of unrounded numbers.
    percent = 100 * (resident[-1] / resident[0] - 1)
    assert float(growth.split()[-2]) == pytest.approx(percent, abs=1)


def test_usage_errors(tmp_path: Path) -> None:
    for argument, parts in [
        ("--rounds=0", ["--rounds", "0", "1"]),
        ("--num_threads=-1", ["--num_threads", "-1", "0"]),
        ("--images_per_round=6", ["--images_per_round", "6", "--batch_size", "4"]),
        ("--memory_images=39", ["--memory_images", "39", "40"]),
        ("--num_workers=3", ["--num_threads", "2", "--num_workers", "3"]),
        ("--images=nowhere", ["--images", "nowhere"]),
        (f"--images={tmp_path}", ["--images", str(tmp_path), ".jpg", ".jpeg"]),
    ]:
        with raises(UserError, *parts):
            benchmark.main([*SMALL, argument])
