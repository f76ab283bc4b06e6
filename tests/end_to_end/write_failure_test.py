"""Tests of runs whose workdir cannot be written for a while, as real processes."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from mixer_jax.checkpoints.resolve import list_steps
from tests.helpers.faults import CALLS, IS_SUPPORTED, Action, Faults, build_library
from tests.helpers.messages import mentions
from tests.helpers.processes import final_arrays, finish, start, untimed_metrics
from tests.helpers.tiny_run import NO_REGULARIZATION

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IS_SUPPORTED, reason="needs Linux and a C compiler"),
]

RUN: dict[str, Any] = {
    **NO_REGULARIZATION,
    "num_steps": 6,
    "log_every_steps": 1,
    "checkpoint__every_steps": 2,
    "checkpoint__keep": 2,
    "evals__test__every_steps": 3,
    "recipe__ema_decay": 0.9,
}


class Fault(NamedTuple):
    """Calls that fail.

    Attributes:
        calls: Names of the calls.
        paths: Pattern of their paths.
        code: Error, such as errno.EIO.
        first: Index of the first matching call that fails, from 1.
        is_lasting: Whether all matching calls after that one fail, too.
    """

    calls: Sequence[str]
    paths: str
    code: int = errno.EIO
    first: int = 1
    is_lasting: bool = False

    def arm(self, faults: Faults, workdir: Path) -> None:
        """Makes the calls of the next program fail."""
        action = Action.FAIL_FROM_THEN_ON if self.is_lasting else Action.FAIL_ONCE
        paths = self.paths.format(workdir=workdir)
        faults.arm(workdir, action, self.first, self.calls, paths=paths, error=self.code)


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Faults, dict[str, str]]:
    """Faults, and environment variables of a program that meets them."""
    folder = tmp_path_factory.mktemp("faults")
    env = build_library(folder)
    return Faults(folder), env


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits_dir: str) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start(digits_dir, workdir, **RUN))
    return workdir


def file_names(workdir: Path) -> set[str]:
    """Returns the names of the files in a workdir, and of its checkpoints."""
    folders = workdir, workdir / "checkpoints"
    return {path.name for folder in folders for path in folder.iterdir()}


@pytest.mark.parametrize(
    "fault",
    [
        Fault(["mkdir"], "*/checkpoints", errno.EROFS),
        Fault(["write"], "*/metrics.jsonl", errno.ESTALE, first=2),
        # Arrays, which are not written by Python; the checkpoint as a whole; one that is deleted.
        Fault(["sync"], "*/4.*/params*/d/*"),
        Fault(["create"], "*/4.*/params*/d/*", errno.EACCES),
        Fault(["rename"], "*/4.orbax-checkpoint-tmp", errno.EPERM),
        Fault(["remove"], "*/checkpoints/2/*", errno.EIO),
        # From then on, nothing can be written any more, nor removed.
        Fault(CALLS, "{workdir}/*", errno.EROFS, first=60, is_lasting=True),
        Fault(CALLS, "{workdir}/checkpoints/4*", errno.EIO, is_lasting=True),
        Fault(["write", "sync", "rename", "remove"], "*/config.json*", is_lasting=True),
    ],
)
def test_run_names_its_checkpoint_and_resumes_after_a_write_failure(
    fault: Fault,
    watch: tuple[Faults, dict[str, str]],
    undisturbed: Path,
    digits_dir: str,
    tmp_path: Path,
) -> None:
    faults, env = watch
    workdir = tmp_path / "run"
    fault.arm(faults, workdir)
    process = start(digits_dir, workdir, env, **RUN)
    _, err = process.communicate(timeout=180)
    assert faults.was_reached
    assert process.returncode == 1, err
    (line,) = err.splitlines()
    steps = list_steps(str(workdir))
    saved = f"{workdir}/checkpoints/{steps[-1]}" if steps else "none"
    assert mentions(line, str(workdir), os.strerror(fault.code), saved)
    finish(start(digits_dir, workdir, **RUN))
    assert file_names(workdir) == file_names(undisturbed)
    assert untimed_metrics(workdir) == untimed_metrics(undisturbed)
    for item, arrays in final_arrays(undisturbed, 6).items():
        for a, b in zip(arrays, final_arrays(workdir, 6)[item], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=item)


def test_run_ends_well_if_only_its_lock_file_cannot_be_removed(
    watch: tuple[Faults, dict[str, str]], digits_dir: str, tmp_path: Path
) -> None:
    faults, env = watch
    workdir = tmp_path / "run"
    Fault(["remove"], "{workdir}/.lock").arm(faults, workdir)
    process = start(digits_dir, workdir, env, **RUN)
    _, err = process.communicate(timeout=180)
    assert (process.returncode, err) == (0, "")
    assert faults.was_reached
    finish(start(digits_dir, workdir, **RUN))
    assert ".lock" not in file_names(workdir)
