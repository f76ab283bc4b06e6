"""Tests of locks between programs."""

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from mixer_jax.locks import locked

HOLD = """
import sys, time
from pathlib import Path
from mixer_jax.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_program_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "folder" / ".lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError), locked(path):
            pass
        process.kill()
    with locked(path) as held:
        assert held
    assert not path.exists()


def test_where_there_are_no_locks_none_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / ".lock") as held:
        assert not held
