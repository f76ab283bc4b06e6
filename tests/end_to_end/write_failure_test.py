"""Tests of runs whose workdir cannot be written for a while, as real processes."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax.checkpoints.resolve import list_steps
from tests.helpers.failing_files import Fault, compile_library, fault_env
from tests.helpers.messages import mentions
from tests.helpers.processes import final_arrays, finish, start, untimed_metrics
from tests.helpers.tiny_run import NO_REGULARIZATION

pytestmark = pytest.mark.slow

RUN: dict[str, Any] = {
    **NO_REGULARIZATION,
    "num_steps": 6,
    "log_every_steps": 1,
    "checkpoint__every_steps": 2,
    "checkpoint__keep": 2,
    "evals__test__every_steps": 3,
    "recipe__ema_decay": 0.9,
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("library"))


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
        Fault("mkdir */checkpoints", errno.EROFS),
        Fault("write */metrics.jsonl", errno.ESTALE, first=2),
        # Arrays, which are not written by Python; the checkpoint as a whole; one that is deleted.
        Fault("fsync */4.*/params*/d/*"),
        Fault("open */4.*/params*/d/*", errno.EACCES),
        Fault("rename */4.orbax-checkpoint-tmp", errno.EPERM),
        Fault("unlink */checkpoints/2/*", errno.EIO),
        # From then on, nothing can be written any more, nor removed.
        Fault("* {workdir}/*", errno.EROFS, first=60, is_lasting=True),
        Fault("* {workdir}/checkpoints/4*", errno.EIO, is_lasting=True),
        Fault("[!o]* */config.json*", errno.EIO, is_lasting=True),
    ],
)
def test_run_names_its_checkpoint_and_resumes_after_a_write_failure(
    fault: Fault, library: Path, undisturbed: Path, digits_dir: str, tmp_path: Path
) -> None:
    workdir, log = tmp_path / "run", tmp_path / "failed"
    fault = fault._replace(pattern=fault.pattern.format(workdir=workdir))
    process = start(digits_dir, workdir, fault_env(fault, library, log), **RUN)
    _, err = process.communicate(timeout=180)
    assert log.read_text().count("\n") >= 1 + fault.is_lasting
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
    library: Path, digits_dir: str, tmp_path: Path
) -> None:
    workdir, log = tmp_path / "run", tmp_path / "failed"
    fault = Fault("unlink */.lock")
    process = start(digits_dir, workdir, fault_env(fault, library, log), **RUN)
    _, err = process.communicate(timeout=180)
    assert (process.returncode, err) == (0, "")
    assert log.read_text() == f"unlink {workdir}/.lock\n"
    finish(start(digits_dir, workdir, **RUN))
    assert ".lock" not in file_names(workdir)
