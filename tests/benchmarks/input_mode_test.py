"""Tests of `--mode=input`: real processes, as a user starts them, and what they measure with."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixer_jax.benchmarks.photographs import read_folder, sample_photographs
from mixer_jax.benchmarks.pipelines import AUGMENTING, AUGMENTING_ALONE, CROPPING, DECODING
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions, raises

SMALL = [
    "--mode=input",
    "--image_size=32",
    "--batch_size=4",
    "--rounds=2",
    "--images_per_round=8",
    "--threads=2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of two JPEG files and something else."""
    place = tmp_path_factory.mktemp("photographs")
    for name, file in zip(["a.jpg", "deeper/b.JPEG"], sample_photographs(2), strict=True):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(file)
    (place / "list.txt").write_text("two photographs")
    return str(place)


def test_json_has_every_competitor(folder: str) -> None:
    done = run_cli("benchmark", *SMALL, f"--images={folder}", "--json")
    result = json.loads(done.stdout)
    assert result["files"] == 2
    assert 92 <= result["median_kilobytes"] <= 115
    assert result["threads"] == 2
    assert result["memory"] is None
    rows = {(row["task"], row["name"]): row for row in result["measurements"]}
    # tf.data decodes in two ways.
    ways = ["mixer_jax", "tf.data", "tf.data"]
    assert [(task, name.split(",")[0]) for task, name in rows] == [
        (DECODING, "simplejpeg"),
        (DECODING, "OpenCV"),
        *((CROPPING, name) for name in ways),
        *((AUGMENTING, name) for name in ways),
        (AUGMENTING_ALONE, "mixer_jax"),
        (AUGMENTING_ALONE, "tf.data"),
    ]
    for (task, name), row in rows.items():
        cores = 1 if task == AUGMENTING_ALONE else min(2, result["cores"])
        per_core = row["images_per_second"] / cores
        assert row["images_per_second_per_core"] == pytest.approx(per_core)
        assert row["milliseconds"] == pytest.approx(1000 / per_core)
        assert row["ratio"] > 0
        assert row["ratio"] == 1 or name != "mixer_jax"


def test_table_without_tensorflow(folder: str) -> None:
    absent = "import sys; sys.modules['tensorflow'] = None"
    done = run_cli("benchmark", *SMALL, f"--images={folder}", "--memory_images=50", before=absent)
    (line,) = done.stderr.splitlines()
    assert mentions(line, "TensorFlow", "tf.data")
    title, _, *rows = done.stdout.splitlines()
    assert re.search(r"\bfiles\W{1,2}2\b", title)
    *tasks, memory = (row for row in rows if not row.startswith(" "))
    assert tasks == [DECODING, CROPPING, AUGMENTING, AUGMENTING_ALONE]
    assert mentions(memory, "memory", "mixer_jax", "MiB")
    assert "tf.data" not in done.stdout
    # Twelve whole batches of four.
    *readings, growth = (
        re.findall(r"\d[\d.]*", row) for row in rows[rows.index(memory) + 1 :] if row
    )
    counts = [int(words[0]) for words in readings]
    assert len(counts) == 10
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (4, 48)
    resident = [int(words[-1]) for words in readings]
    assert min(resident) > 50
    # One decimal place, and MiB in whole numbers.
    assert float(growth[-1]) == pytest.approx(100 * abs(resident[-1] / resident[0] - 1), abs=1)


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--rounds=0", ["--rounds", "0", "1"]),
        ("--threads=-1", ["--threads", "-1", "0"]),
        ("--images_per_round=6", ["--images_per_round", "6", "--batch_size", "4"]),
        ("--memory_images=39", ["--memory_images", "39", "40"]),
        ("--processes=3", ["--threads", "2", "--processes", "3"]),
        ("--images=nowhere", ["--images", "nowhere"]),
        ("--images=configs", ["--images", "configs", ".jpg", ".jpeg"]),
    ],
)
def test_bad_values(argument: str, parts: list[str]) -> None:
    done = run_cli("benchmark", *SMALL, argument, code=2)
    (line,) = done.stderr.splitlines()
    assert mentions(line, *parts)
    assert not done.stdout


def test_photographs_are_of_imagenets_size() -> None:
    files = sample_photographs(12)
    assert len(set(files)) == 12
    assert files[:2] == sample_photographs(2)
    assert files[:2] != sample_photographs(2, seed=1)
    for file in files:
        assert 92_000 < len(file) < 115_000
        assert Image.open(io.BytesIO(file)).size == (500, 375)


def test_a_folder_is_read_by_name(folder: str) -> None:
    assert read_folder(folder) == sample_photographs(2)


def test_what_is_no_jpeg_is_named(tmp_path: Path) -> None:
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    picture.save(tmp_path / "wrong.jpg", format="PNG")
    with raises(ValueError, "wrong.jpg"):
        read_folder(str(tmp_path))
