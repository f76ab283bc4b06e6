"""Tests of the book of bad images: each once, forgotten on resume, and when they are too many."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixer_jax.data.readers import BadImage
from mixer_jax.errors import UserError
from mixer_jax.training.bad_images import BadImageLog
from tests.helpers.lines import each_mentions
from tests.helpers.messages import mentions, raises

FILE = "bad_images_0.jsonl"


def open_log(workdir: Path, first_step: int = 0, **changes: Any) -> tuple[BadImageLog, list[str]]:
    said: list[str] = []
    settings: dict[str, Any] = {
        "num_examples": 1000,
        "max_fraction": 0.002,
        "say": said.append,
    } | changes
    return BadImageLog(str(workdir), first_step, **settings), said


def lines(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]


def bad(*names: str, reason: str = "incomplete") -> list[BadImage]:
    return [BadImage(name, reason) for name in names]


def test_every_image_is_written_once_with_its_first_step(tmp_path: Path) -> None:
    log, said = open_log(tmp_path)
    log.record(3, bad("a.png", "b.png", "a.png"))
    log.record(4, bad("b.png"))
    log.record(9, bad("c.png", reason="empty file"))
    assert lines(tmp_path) == [
        {"step": 3, "name": "a.png", "reason": "incomplete"},
        {"step": 3, "name": "b.png", "reason": "incomplete"},
        {"step": 9, "name": "c.png", "reason": "empty file"},
    ]
    log.close()
    book = f"{tmp_path}/{FILE}"
    assert each_mentions(
        said,
        ("3", "a.png", "incomplete", book),
        ("3", "2", "incomplete", "1", "empty file", book),
    )


def test_nothing_bad_is_nothing_said_and_no_file(tmp_path: Path) -> None:
    log, said = open_log(tmp_path, max_fraction=0.0)
    log.close()
    assert (said, list(tmp_path.iterdir()), log.too_many) == ([], [], False)


@pytest.mark.parametrize(
    ("max_fraction", "allowed"), [(0.002, 2), (0.0029, 2), (0.003, 3), (0.0, 0), (1.0, 1000)]
)
def test_too_many_is_more_than_the_share(max_fraction: float, allowed: int, tmp_path: Path) -> None:
    log, _ = open_log(tmp_path, max_fraction=max_fraction)
    log.record(1, bad(*map(str, range(allowed))))
    assert not log.too_many
    log.record(2, bad("0"))
    assert log.too_many == (allowed == 0)
    log.record(3, bad("one more"))
    assert log.too_many


def test_the_verdict_says_how_to_go_on(tmp_path: Path) -> None:
    log, _ = open_log(tmp_path)
    log.record(1, bad("a", "b", "c"))
    books = f"{tmp_path}/bad_images_*.jsonl"
    share = ("config.bad_images.max_fraction", "0.002")
    assert mentions(log.verdict(1200), "3", "1000", *share, books, "1200")


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    log, _ = open_log(tmp_path)
    for step, name in ((5, "a"), (10, "b"), (11, "c")):
        log.record(step, bad(name))
    assert log.too_many
    resumed, _ = open_log(tmp_path, first_step=10)
    assert not resumed.too_many
    assert [line["name"] for line in lines(tmp_path)] == ["a", "b"]
    resumed.record(11, bad("c", "a"))
    assert [line["name"] for line in lines(tmp_path)] == ["a", "b", "c"]
    # Two that are met again count; the third may have been mended, and is met again if not.
    assert not resumed.too_many
    resumed.record(12, bad("b"))
    assert resumed.too_many
    assert [line["name"] for line in lines(tmp_path)] == ["a", "b", "c"]


def test_the_books_of_hosts_that_are_gone_forget_as_well(tmp_path: Path) -> None:
    entries = [{"step": step, "name": f"{step}", "reason": "incomplete"} for step in (5, 10, 11)]
    (tmp_path / "bad_images_3.jsonl").write_text("".join(f"{json.dumps(e)}\n" for e in entries))
    open_log(tmp_path, first_step=10)
    kept = (tmp_path / "bad_images_3.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [5, 10]


@pytest.mark.parametrize("text", ["my notes\n", "5\n", '{"step": 1}\n'])
def test_a_file_that_is_no_book_is_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with raises(UserError, f"{tmp_path}/{FILE}"):
        open_log(tmp_path)
    assert (tmp_path / FILE).read_text() == text
