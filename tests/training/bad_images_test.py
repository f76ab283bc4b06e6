"""Tests of the log of bad images."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax.config.schema import BadImagesConfig
from mixer_jax.data.readers import BadImage
from mixer_jax.distributed import multihost
from mixer_jax.errors import UserError
from mixer_jax.training.bad_images import BadImageLog
from tests.helpers.lines import each_mentions
from tests.helpers.messages import mentions, raises
from tests.helpers.object_store import BUCKET, object_store

FILE = "bad_images_0.jsonl"


def open_log(
    workdir: Path | str, start_step: int = 0, **changes: Any
) -> tuple[BadImageLog, list[str]]:
    """Opens a log for 1000 images of which two may be bad; returns it and what it prints."""
    printed: list[str] = []
    limits = {"max_fraction": 0.002, "max_count": 0} | changes
    num_examples = limits.pop("num_examples", 1000)
    log = BadImageLog(
        str(workdir),
        start_step,
        num_examples=num_examples,
        batch_size=10,
        config=BadImagesConfig(**limits),
        log=printed.append,
    )
    return log, printed


def record(log: BadImageLog, step: int, *names: str, reason: str = "incomplete") -> None:
    log.record(step, [BadImage(name, reason) for name in names])
    log.sync_hosts(step)


def read_entries(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]


def test_record_writes_every_image_once_with_its_first_step(tmp_path: Path) -> None:
    log, printed = open_log(tmp_path)
    record(log, 3, "a.png", "b.png", "a.png")
    record(log, 4, "b.png")
    record(log, 9, "c.png", reason="empty file")
    assert read_entries(tmp_path) == [
        {"step": 3, "name": "a.png", "reason": "incomplete"},
        {"step": 3, "name": "b.png", "reason": "incomplete"},
        {"step": 9, "name": "c.png", "reason": "empty file"},
    ]
    log.print_summary()
    path = f"{tmp_path}/{FILE}"
    assert each_mentions(
        printed,
        ("3", "a.png", "incomplete", path),
        ("3", "2", "incomplete", "1", "empty file", path),
    )


def test_log_without_bad_images_prints_and_writes_nothing(tmp_path: Path) -> None:
    log, printed = open_log(tmp_path, max_fraction=0.0)
    log.sync_hosts(1)
    log.print_summary()
    log.close()
    assert (printed, list(tmp_path.iterdir()), log.too_many) == ([], [], False)


@pytest.mark.parametrize(
    ("max_fraction", "allowed"), [(0.002, 2), (0.0029, 2), (0.003, 3), (0.0, 0), (1.0, 1000)]
)
def test_too_many_is_more_than_the_fraction(
    max_fraction: float, allowed: int, tmp_path: Path
) -> None:
    log, _ = open_log(tmp_path, max_fraction=max_fraction)
    record(log, 1, *map(str, range(allowed)))
    assert not log.too_many
    record(log, 2, "0")
    assert log.too_many == (allowed == 0)
    record(log, 3, "one more")
    assert log.too_many


@pytest.mark.parametrize(
    ("num_examples", "limits", "allowed"),
    [
        # One bad file among few images does not stop a run by default.
        (2, {}, 1),
        (9, {}, 4),
        (20, {}, 10),
        (999, {}, 10),
        (10_000, {}, 10),
        (11_000, {}, 11),
        (1_000_000, {}, 1000),
        (999, {"max_count": 1}, 1),
        (999, {"max_fraction": 0.0}, 10),
        (999, {"max_fraction": 0.0, "max_count": 0}, 0),
        (20, {"max_fraction": 0.9}, 18),
        # All images of any dataset are too many.
        (1, {}, 0),
        (10, {"max_count": 1000}, 5),
    ],
)
def test_small_datasets_may_have_a_number_of_bad_images(
    num_examples: int, limits: dict[str, Any], allowed: int, tmp_path: Path
) -> None:
    default = dataclasses.asdict(BadImagesConfig())
    del default["skip_in_evaluation"]
    log, _ = open_log(tmp_path, num_examples=num_examples, **(default | limits))
    log.record(1, [BadImage(f"{number}", "incomplete") for number in range(allowed)])
    log.sync_hosts(1)
    assert not log.too_many
    record(log, 1, "one more")
    assert log.too_many


def test_too_many_counts_every_epoch_separately(tmp_path: Path) -> None:
    """In every epoch of 100 steps, the same two images are bad."""
    log, _ = open_log(tmp_path)
    for epoch in range(3):
        record(log, 100 * epoch + 30, "a")
        record(log, 100 * epoch + 60, "b")
    assert not log.too_many
    # A third one in one epoch, of which the last steps are counted in the next one.
    log.record(399, [BadImage(name, "incomplete") for name in ("a", "b", "c")])
    assert not log.too_many
    log.sync_hosts(410)
    assert log.too_many


def test_sync_hosts_sums_the_counts_of_all_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, _ = open_log(tmp_path)
    record(log, 1, "a")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "all_gather", lambda counts: np.stack([counts, [0, 1]]))
    log.sync_hosts(2)
    assert not log.too_many
    monkeypatch.setattr(multihost, "all_gather", lambda counts: np.stack([counts, [0, 2]]))
    log.sync_hosts(3)
    assert log.too_many
    assert mentions(log.stop_message(0), "3", "1000")


def test_stop_message_names_key_count_files_and_step(tmp_path: Path) -> None:
    log, _ = open_log(tmp_path)
    record(log, 1, "a", "b", "c")
    files = f"{tmp_path}/bad_images_*.jsonl"
    key = ("config.bad_images.max_fraction", "0.002", "config.bad_images.max_count", "0")
    assert mentions(log.stop_message(1200), "3", "1000", *key, files, "1200")


def test_resumed_log_drops_entries_after_the_checkpoint(tmp_path: Path) -> None:
    log, _ = open_log(tmp_path)
    for step, name in ((5, "a"), (10, "b"), (11, "c")):
        record(log, step, name)
    assert log.too_many
    resumed, _ = open_log(tmp_path, start_step=10)
    assert not resumed.too_many
    assert [entry["name"] for entry in read_entries(tmp_path)] == ["a", "b"]
    record(resumed, 11, "c", "a")
    assert [entry["name"] for entry in read_entries(tmp_path)] == ["a", "b", "c"]
    # Two were seen again; the third may have been repaired, and is seen again if it was not.
    assert not resumed.too_many
    record(resumed, 12, "b")
    assert resumed.too_many
    assert [entry["name"] for entry in read_entries(tmp_path)] == ["a", "b", "c"]


def test_resumed_log_drops_an_entry_that_was_cut_off(tmp_path: Path) -> None:
    log, _ = open_log(tmp_path)
    record(log, 5, "a")
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 6, "name": "lon')
    resumed, _ = open_log(tmp_path, start_step=7)
    record(resumed, 8, "b")
    assert [entry["name"] for entry in read_entries(tmp_path)] == ["a", "b"]


def test_log_is_appended_to(tmp_path: Path) -> None:
    log, _ = open_log(tmp_path)
    record(log, 1, "a")
    status = (tmp_path / FILE).stat()
    record(log, 2, "b")
    assert (tmp_path / FILE).stat().st_ino == status.st_ino


def test_log_on_an_object_store_is_complete_after_flush(tmp_path: Path) -> None:
    with object_store(tmp_path) as store:
        log, _ = open_log(BUCKET)
        for step in range(1, 200):
            record(log, step, f"{step}")
        log.flush()
        assert [entry["step"] for entry in read_entries(tmp_path)] == list(range(1, 200))
        assert store.num_uploads <= 2
        log.close()
        resumed, _ = open_log(BUCKET, start_step=100)
        assert [entry["step"] for entry in read_entries(tmp_path)] == list(range(1, 101))
        record(resumed, 101, "101")
        resumed.close()
    assert [entry["step"] for entry in read_entries(tmp_path)] == list(range(1, 102))


def test_resumed_log_truncates_the_logs_of_hosts_that_left(tmp_path: Path) -> None:
    entries = [{"step": step, "name": f"{step}", "reason": "incomplete"} for step in (5, 10, 11)]
    (tmp_path / "bad_images_3.jsonl").write_text("".join(f"{json.dumps(e)}\n" for e in entries))
    open_log(tmp_path, start_step=10)
    kept = (tmp_path / "bad_images_3.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [5, 10]


@pytest.mark.parametrize("text", ["my notes\n", "5\n", '{"step": 1}\n'])
def test_log_rejects_and_keeps_a_file_of_another_kind(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with raises(UserError, f"{tmp_path}/{FILE}"):
        open_log(tmp_path)
    assert (tmp_path / FILE).read_text() == text
