"""Tests of the files that input pipelines are measured with."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mixer_jax.benchmarks.sample_jpegs import read_jpegs, sample_jpegs
from mixer_jax.errors import UserError
from tests.helpers.messages import raises


def test_sample_jpegs_have_the_size_of_imagenet() -> None:
    files = sample_jpegs(12)
    assert len(set(files)) == 12
    assert files[:2] == sample_jpegs(2)
    assert files[:2] != sample_jpegs(2, seed=1)
    for file in files:
        assert 92_000 < len(file) < 115_000
        assert Image.open(io.BytesIO(file)).size == (500, 375)


def test_read_jpegs_reads_subfolders_by_name(tmp_path: Path) -> None:
    files = sample_jpegs(2)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.JPEG").write_bytes(files[1])
    (tmp_path / "a.jpg").write_bytes(files[0])
    (tmp_path / "list.txt").write_text("two images")
    assert read_jpegs(str(tmp_path)) == files


def test_read_jpegs_names_a_file_of_another_format(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    image.save(tmp_path / "wrong.jpg", format="PNG")
    with raises(UserError, str(tmp_path / "wrong.jpg"), "JPEG"):
        read_jpegs(str(tmp_path))
