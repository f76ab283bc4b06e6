"""Tests of injected faults, on a small program."""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.faults import IS_SUPPORTED, Action, Faults, build_library

pytestmark = pytest.mark.skipif(not IS_SUPPORTED, reason="needs Linux and a C compiler")
# Writes a file atomically, twice, and removes a file.
PROGRAM = """
import os, time
for text in ("first", "second"):
    with open("new", "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename("new", "file")
    folder = os.open(".", os.O_RDONLY)
    os.fsync(folder)
    if text == "first":
        start = time.time()
open("log", "a").write("unsynced")
os.unlink("old")
print(time.time() - start)
"""
CALLS = ["create", "write", "sync", "rename", "sync"] * 2 + ["create", "write", "remove"]


class Watched:
    """Folder with the library, and one that it watches."""

    def __init__(self, folder: Path):
        (folder / "faults").mkdir()
        self.disk = folder / "disk"
        self.disk.mkdir()
        (self.disk / "old").write_text("old")
        self.env = os.environ | build_library(folder / "faults")
        self.faults = Faults(folder / "faults")

    def run(self) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "-c", PROGRAM]
        return subprocess.run(command, cwd=self.disk, env=self.env, capture_output=True, text=True)

    def files(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in self.disk.iterdir()}


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_calls_below_the_folder_are_counted_and_logged(watched: Watched) -> None:
    watched.faults.arm(watched.disk, is_logging=True)
    assert watched.run().returncode == 0
    assert [call.name for call in watched.faults.read_log()] == CALLS
    assert watched.faults.num_calls == len(CALLS)
    assert watched.faults.count_calls() == Counter(CALLS) | {"mkdir": 0, "truncate": 0}
    # Nothing elsewhere.
    watched.faults.arm(watched.disk / "elsewhere", is_logging=True)
    (watched.disk / "old").touch()
    assert watched.run().returncode == 0
    assert watched.faults.read_log() == []


@pytest.mark.parametrize(
    ("action", "call", "expected"),
    [
        (Action.KILL, 7, {"file": "first", "new": "", "old": "old"}),
        (Action.KILL_INSIDE, 7, {"file": "first", "new": "sec", "old": "old"}),
        (Action.KILL_INSIDE, 9, {"file": "second", "old": "old"}),
    ],
)
def test_process_is_killed_at_a_call(
    action: Action, call: int, expected: dict[str, str], watched: Watched
) -> None:
    watched.faults.arm(watched.disk, action, call)
    assert watched.run().returncode == -signal.SIGKILL
    assert watched.faults.was_reached
    assert watched.files() == expected


@pytest.mark.parametrize(
    ("action", "calls", "expected"),
    [(Action.FAIL_ONCE, 2, "No space left"), (Action.FAIL_FROM_THEN_ON, 4, "No space left")],
)
def test_writes_fail(action: Action, calls: int, expected: str, watched: Watched) -> None:
    """The second write fails, or also the one when Python closes the file."""
    watched.faults.arm(watched.disk, action, 2, ["write"], error=28)
    result = watched.run()
    assert result.returncode == 1
    assert expected in result.stderr
    assert watched.files()["file"] == "first"
    assert (watched.files()["new"] == "second") == (action == Action.FAIL_ONCE)


def test_calls_fail_on_files_that_match(watched: Watched) -> None:
    watched.faults.arm(
        watched.disk, Action.FAIL_FROM_THEN_ON, 1, ["create", "remove"], paths="*/o*d", error=13
    )
    assert "Permission denied: 'old'" in watched.run().stderr
    assert watched.faults.num_calls == 1
    assert watched.files() == {"file": "second", "log": "unsynced", "old": "old"}


def test_clock_is_set_back(watched: Watched) -> None:
    watched.faults.arm(watched.disk, Action.MOVE_CLOCK, len(CALLS), clock_seconds=-1000)
    assert -1000 <= float(watched.run().stdout) < -900


def test_power_loss_discards_only_what_is_not_synced(watched: Watched) -> None:
    found = []
    for seed in range(16):
        shutil.rmtree(watched.disk)
        watched.disk.mkdir()
        (watched.disk / "old").write_text("old")
        # Before the second rename, or never.
        watched.faults.arm(watched.disk, Action.KILL, 9 if seed % 2 else 99, is_logging=True)
        watched.run()
        watched.faults.discard_unsynced(watched.disk, random.Random(seed))
        found.append(watched.files())
    for files in found[1::2]:
        assert files["file"] == "first"
        assert files.get("new", "second") == "second"
    for files in found[::2]:
        assert files["file"] == "second"
        assert "unsynced".startswith(files.get("log", ""))
        assert files.get("old", "old") == "old"
    kept = {("log" in files, "old" in files) for files in found[::2]}
    # Neither, both, or only the newer of the two changes is undone.
    assert kept == {(False, True), (True, True), (True, False)}
    assert {"new" in files for files in found[1::2]} == {True, False}
