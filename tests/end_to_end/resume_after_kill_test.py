"""Tests of runs that are killed, interrupted and resumed, as real processes."""

import contextlib
import functools
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mixer_jax.checkpoints.resolve import list_steps
from tests.helpers.images import encode, photograph
from tests.helpers.messages import mentions
from tests.helpers.processes import (
    STEPS,
    final_arrays,
    finish,
    first_reported_step,
    has_reached,
    last_step,
    reports_stop,
    start,
    untimed_metrics,
    wait_until,
)
from tests.helpers.tiny_run import NO_REGULARIZATION


def unfinished_saves(workdir: Path) -> list[Path]:
    return list(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))


def is_saving(workdir: Path, done: int) -> bool:
    return last_step(workdir) > done and unfinished_saves(workdir) != []


def test_killed_and_resumed_equals_never_interrupted(
    uninterrupted: Path, digits_dir: str, tmp_path: Path
) -> None:
    # At a random step, between two checkpoints or on one.
    step = random.SystemRandom().randint(11, 25)
    process = start(digits_dir, tmp_path, optimized=True)
    wait_until(lambda: last_step(tmp_path) >= step, process)
    process.kill()
    process.communicate()
    # Saving is asynchronous: the newest save may not have been finished.
    assert set(list_steps(str(tmp_path))) <= {10, 20}, step

    # While a checkpoint is being written: a save may end just before the kill, so try again then.
    for done in (20, 25, 30):
        process = start(digits_dir, tmp_path, optimized=True)
        wait_until(functools.partial(is_saving, tmp_path, done), process)
        process.kill()
        process.communicate()
        if unfinished_saves(tmp_path):
            break
    assert unfinished_saves(tmp_path)
    assert list_steps(str(tmp_path))[-1] < STEPS

    # By a scheduler, which is polite.
    process = start(digits_dir, tmp_path, optimized=True)
    wait_until(lambda: last_step(tmp_path) >= 45, process)
    process.send_signal(signal.SIGTERM)
    out = finish(process, code=143)
    saved = list_steps(str(tmp_path))[-1]
    assert 45 <= saved < STEPS
    assert reports_stop(out, tmp_path, saved, STEPS)

    # And to the end.
    out = finish(start(digits_dir, tmp_path, optimized=True))
    assert first_reported_step(out) == saved
    assert unfinished_saves(tmp_path) == []
    assert untimed_metrics(tmp_path) == untimed_metrics(uninterrupted)
    expected, actual = final_arrays(uninterrupted, STEPS), final_arrays(tmp_path, STEPS)
    for item, arrays in expected.items():
        for a, b in zip(arrays, actual[item], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{item} (killed at step {step})")


def test_ctrl_c_saves_and_exits_with_130(digits_dir: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpoint__every_steps": 0, "tensorboard": True}
    process = start(digits_dir, tmp_path, **changes)
    wait_until(lambda: last_step(tmp_path) >= 3, process)
    process.send_signal(signal.SIGINT)
    out = finish(process, code=130)
    (saved,) = list_steps(str(tmp_path))
    assert reports_stop(out, tmp_path, saved, STEPS)


def processes_of_group(group: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found


def test_worker_processes_end_with_the_run_however_it_ends(tmp_path: Path) -> None:
    """Ctrl-C to the whole group, as of a terminal; to a run that waits for its images."""
    large = cv2.resize(photograph(), (1600, 1200))
    for index in range(20):
        path = tmp_path / "images" / f"{index % 2}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(large, "JPEG"))
    settings: dict[str, Any] = NO_REGULARIZATION | {
        "dataset__name": f"folder:{tmp_path}/images",
        "loader__num_workers": 2,
        "num_steps": 1000,
    }
    steps = 0
    for stop, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = start("", tmp_path / "run", new_group=True, **settings)
        wait_until(functools.partial(has_reached, tmp_path / "run", steps + 2), process)
        if stop == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, stop)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        # A worker of Grain that is ended while it removes shared memory has removed it without
        # telling Python's resource tracker, which then looks for it in vain.
        assert err == "" or "resource_tracker.py" in err
        if code >= 0:
            (*_, steps) = list_steps(str(tmp_path / "run"))
            assert reports_stop(out, tmp_path / "run", steps, 1000)
        deadline = time.monotonic() + 20
        while processes_of_group(process.pid):
            assert time.monotonic() < deadline, "workers are left"
            time.sleep(0.1)


def test_a_finished_run_says_so_and_is_scored(
    uninterrupted: Path, digits_dir: str, tmp_path: Path
) -> None:
    workdir = shutil.copytree(uninterrupted, tmp_path / "copy")
    out = finish(start(digits_dir, workdir, optimized=True))
    assert last_step(workdir) == STEPS
    # All of it was done before; what is scored is told.
    assert untimed_metrics(workdir) == untimed_metrics(uninterrupted)
    assert mentions(out, "360")
