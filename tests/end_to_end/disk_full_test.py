"""Tests of runs and conversions that run out of disk space, as real processes."""

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax.checkpoints.resolve import list_steps
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions
from tests.helpers.processes import (
    STEPS,
    final_arrays,
    finish,
    has_reached,
    start,
    untimed_metrics,
    wait_until,
)
from tests.helpers.random_weights import random_weights, save_run

pytestmark = pytest.mark.slow

# In bytes; less than any array.
FILE_LIMIT = 300


def check_stopped(process: subprocess.Popen[str], workdir: Path, reason: str) -> int:
    """Checks that a run ends in one line that names its newest checkpoint; returns its step."""
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert err.count("\n") == 1, err
    line = err.strip()
    saved = list_steps(str(workdir))[-1]
    assert mentions(line, str(workdir), f"{workdir}/checkpoints/{saved}", reason)
    left = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert left == {str(step) for step in list_steps(str(workdir))}
    return saved


def check_equal(workdir: Path, expected: Path) -> None:
    assert untimed_metrics(workdir) == untimed_metrics(expected)
    for item, arrays in final_arrays(expected, STEPS).items():
        for a, b in zip(arrays, final_arrays(workdir, STEPS)[item], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=item)


# The first write that fails: a line of metrics, or a checkpoint.
@pytest.mark.parametrize("changes", [{}, {"log_every_steps": 1000, "evals__test__every_steps": 0}])
def test_run_that_cannot_write_names_its_checkpoint_and_resumes(
    changes: dict[str, Any], uninterrupted: Path, digits_dir: str, tmp_path: Path
) -> None:
    """A limit on the size of files simulates a full disk."""
    process = start(digits_dir, tmp_path, optimized=True, **changes)
    wait_until(lambda: list_steps(str(tmp_path)) != [], process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))
    saved = check_stopped(process, tmp_path, "File too large")
    assert saved < STEPS
    finish(start(digits_dir, tmp_path, optimized=True, **changes))
    if not changes:
        check_equal(tmp_path, uninterrupted)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """File system of 64 MB, of which 32 are in use."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted")
    try:
        (folder / "in_use").write_bytes(bytes(2**25))
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Writes until nothing more fits."""
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_run_on_a_full_disk_resumes_after_space_is_made(
    small_disk: Path, uninterrupted: Path, digits_dir: str
) -> None:
    workdir = small_disk / "run"
    process = start(digits_dir, workdir, optimized=True)
    wait_until(lambda: list_steps(str(workdir)) != [], process)
    fill(small_disk)
    check_stopped(process, workdir, "No space left on device")
    # Still full.
    (small_disk / "filler").unlink()
    fill(small_disk)
    check_stopped(start(digits_dir, workdir, optimized=True), workdir, "No space left on device")
    (small_disk / "filler").unlink()
    process = start(digits_dir, workdir, optimized=True)
    wait_until(lambda: has_reached(workdir, STEPS), process)
    finish(process)
    check_equal(workdir, uninterrupted)


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors", "w.stablehlo", "w.onnx", "w"])
def test_convert_that_cannot_write_leaves_nothing(name: str, tmp_path: Path) -> None:
    save_run(random_weights(), tmp_path / "weights")
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({FILE_LIMIT}, resource.RLIM_INFINITY))"
    (tmp_path / "out").mkdir()
    arguments = f"{tmp_path}/weights", f"{tmp_path}/out/{name}"
    done = run_cli("convert", *arguments, code=1, preamble=f"import resource; {limit}")
    (line,) = done.stderr.splitlines()
    assert mentions(line, f"{tmp_path}/out/{name}", "File too large")
    assert list((tmp_path / "out").iterdir()) == []
    run_cli("convert", *arguments)
    assert (tmp_path / "out" / name).exists()


def test_report_on_a_full_disk_leaves_nothing_and_prints_the_metrics(
    small_disk: Path, tmp_path: Path
) -> None:
    save_run(random_weights(), tmp_path / "weights")
    fill(small_disk)
    report = small_disk / "report"
    arguments = f"--checkpoint={tmp_path}/weights", "--dataset=synthetic", f"--report={report}"
    done = run_cli("evaluate", *arguments, code=1)
    (line,) = done.stderr.splitlines()
    assert mentions(line, str(report), "No space left on device")
    assert mentions(done.stdout, "top-1")
    assert {path.name for path in small_disk.iterdir()} == {"in_use", "filler"}
    (small_disk / "filler").unlink()
    run_cli("evaluate", *arguments)
    assert (report / "index.html").exists()
