"""Tests of starting a command twice on one workdir, as real processes."""

import functools
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end import suite_resume_test as suites
from tests.helpers.messages import mentions
from tests.helpers.processes import (
    STEPS,
    final_arrays,
    finish,
    has_reached,
    kill_at_end,
    start,
    untimed_metrics,
    wait_until,
)

pytestmark = pytest.mark.slow


def check_refused(
    start_second: Callable[[], subprocess.Popen[str]],
    workdir: Path,
    first: subprocess.Popen[str],
) -> None:
    """Checks that a start ends in one line that names the workdir and the first process.

    The first process is stopped in the meantime, so that it cannot finish before.
    """
    first.send_signal(signal.SIGSTOP)
    try:
        with kill_at_end(start_second()) as second:
            out, err = second.communicate(timeout=60)
    finally:
        first.send_signal(signal.SIGCONT)
    assert (second.returncode, out) == (1, "")
    (line,) = err.splitlines()
    assert mentions(line, str(workdir), str(first.pid), "--workdir")


def holds_lock(process: subprocess.Popen[str], workdir: Path) -> bool:
    lock = workdir / ".lock"
    return lock.exists() and str(process.pid) in lock.read_text()


@pytest.mark.parametrize("killed", [False, True])
def test_second_start_is_refused_and_does_not_disturb_the_first(
    killed: bool, uninterrupted: Path, digits_dir: str, tmp_path: Path
) -> None:
    if killed:
        # A lock whose owner was killed does not block.
        with kill_at_end(start(digits_dir, tmp_path, optimized=True)) as process:
            wait_until(lambda: has_reached(tmp_path, 12), process)
        assert (tmp_path / ".lock").exists()
    start_again = functools.partial(start, digits_dir, tmp_path, optimized=True)
    with kill_at_end(start_again()) as first:
        # At once, when the first has not written anything yet, and while it trains.
        wait_until(lambda: holds_lock(first, tmp_path), first)
        check_refused(start_again, tmp_path, first)
        wait_until(lambda: has_reached(tmp_path, 13), first)
        check_refused(start_again, tmp_path, first)
        finish(first)
    assert untimed_metrics(tmp_path) == untimed_metrics(uninterrupted)
    expected, actual = final_arrays(uninterrupted, STEPS), final_arrays(tmp_path, STEPS)
    for item, arrays in expected.items():
        for a, b in zip(arrays, actual[item], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=item)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {path.name for path in uninterrupted.iterdir()}


workspace = suites.workspace


def test_second_start_of_a_suite_is_refused(
    workspace: Path, digits_dir: str, tmp_path: Path
) -> None:
    start_again = functools.partial(suites.start, workspace, tmp_path, digits_dir)
    with kill_at_end(start_again("--tasks=low")) as first:
        wait_until(lambda: suites.reaches(tmp_path, "low/final/seed=0", 2), first)
        check_refused(start_again, tmp_path, first)
        finish(first)
    assert (tmp_path / "low/final/seed=0/result.json").exists()
    assert not list(tmp_path.rglob("*.lock"))
