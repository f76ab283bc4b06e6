"""Tests of the doors' standard streams: nobody reads, the disk is full, there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixer_jax.checkpoints.resolve import list_steps
from tests.helpers.messages import mentions
from tests.helpers.tiny_run import NO_REGULARIZATION, to_flags

LONG = "print('x' * 100_000)"
SHORT = "print('x')"
FLUSHED = "print('x', flush=True)"


def run(code: str, redirected: str, *, needs_output: bool = True) -> tuple[int, str]:
    """Runs a door of this code in a shell; returns its exit code and standard error."""
    program = (
        "import sys\n"
        "from mixer_jax.cli.common import run_cli\n"
        "def main(arguments):\n"
        f"    {code}\n"
        "    print('went on', file=sys.stderr)\n"
        "    return 0\n"
        f"run_cli(main, needs_output={needs_output})"
    )
    # A pipe whose reader is gone before anything is written.
    line = f'exec {{gone}}> >(exit); wait $!; "$0" -W error -c "$1" {redirected}'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable, program],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("code", [LONG, SHORT, FLUSHED, "sys.exit(print('x'))"])
def test_a_door_that_nobody_reads_ends_quietly(code: str) -> None:
    exit_code, told = run(code, ">&$gone")
    assert exit_code == 141
    assert told == ("went on\n" if code == SHORT else "")


@pytest.mark.parametrize("code", [LONG, SHORT, FLUSHED])
def test_a_full_disk_is_told_in_a_line(code: str) -> None:
    exit_code, told = run(code, ">/dev/full")
    assert exit_code == 1
    (line,) = told.removeprefix("went on\n").splitlines()
    assert mentions(line, "No space left on device")


@pytest.mark.parametrize("redirected", [">&$gone", ">/dev/full", ">&-"])
@pytest.mark.parametrize("code", [LONG, SHORT, FLUSHED])
def test_what_does_not_need_its_output_goes_on(code: str, redirected: str) -> None:
    assert run(code, redirected, needs_output=False) == (0, "went on\n")


@pytest.mark.parametrize("redirected", ["2>&$gone", "2>/dev/full", "2>&-", "<&- 2>&-"])
def test_standard_error_ends_nothing(redirected: str) -> None:
    assert run("print(repr(sys.stdin.read()) if sys.stdin else 'none')", redirected)[0] == 0


def test_a_bug_is_not_taken_for_a_failing_stream() -> None:
    exit_code, told = run("raise BrokenPipeError", "")
    assert exit_code == 1
    assert told.endswith("\nBrokenPipeError\n")


def test_a_run_whose_output_fails_is_trained_to_its_end(digits_dir: str, tmp_path: Path) -> None:
    sizes = to_flags(digits_dir, **NO_REGULARIZATION, num_steps=2, optimizer__warmup_steps=1)
    command = ["mixer_jax.main", "--config=configs/digits.py", f"--workdir={tmp_path}/run", *sizes]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert 2 in list_steps(f"{tmp_path}/run")
