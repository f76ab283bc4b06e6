"""Tests of files that a reader finds whole."""

import threading
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from mixer_jax.training.workdir import atomic_write


def test_programs_that_write_the_same_file_at_once_leave_one_of_theirs(tmp_path: Path) -> None:
    path = epath.Path(tmp_path / "a.json")
    texts = [str(number) * 50_000 for number in range(8)]
    failed = []

    def write(text: str) -> None:
        for _ in range(30):
            try:
                atomic_write(path, text)
            except OSError as error:
                failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            seen.add(path.read_text())
    assert failed == []
    assert path.read_text() in texts
    assert seen <= set(texts)
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


def test_what_cannot_be_written_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = epath.Path(tmp_path / "a.json")
    atomic_write(path, "old")

    def fail(draft: Any, target: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        atomic_write(path, "new")
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"
