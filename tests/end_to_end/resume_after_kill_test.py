"""Tests of runs as real processes that are killed, interrupted and resumed."""

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
import pytest

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
from tests.helpers.tiny_run import FAMILY_OVERRIDES, NO_REGULARIZATION, OPTIMIZER_OVERRIDES

pytestmark = pytest.mark.slow


def unfinished_saves(workdir: Path) -> list[Path]:
    return list(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))


def is_saving_after(workdir: Path, step: int) -> bool:
    return last_step(workdir) > step and unfinished_saves(workdir) != []


def test_killed_and_resumed_run_equals_an_uninterrupted_one(
    uninterrupted: Path, digits_dir: str, tmp_path: Path
) -> None:
    # Killed at a random step, at a checkpoint or between two. A failure shows the output.
    step = random.SystemRandom().randint(11, 25)
    print(f"killed at step {step}")
    process = start(digits_dir, tmp_path, optimized=True)
    wait_until(lambda: last_step(tmp_path) >= step, process)
    process.kill()
    process.communicate()
    # Saving is asynchronous: the newest save may be unfinished.
    assert set(list_steps(str(tmp_path))) <= {10, 20}

    # Killed during a save, which may end just before the kill: then once more.
    for after_step in (20, 25, 30):
        process = start(digits_dir, tmp_path, optimized=True)
        wait_until(functools.partial(is_saving_after, tmp_path, after_step), process)
        process.kill()
        process.communicate()
        if unfinished_saves(tmp_path):
            break
    assert unfinished_saves(tmp_path)
    assert list_steps(str(tmp_path))[-1] < STEPS

    # Stopped by SIGTERM, as schedulers do.
    process = start(digits_dir, tmp_path, optimized=True)
    wait_until(lambda: last_step(tmp_path) >= 45, process)
    process.send_signal(signal.SIGTERM)
    out = finish(process, code=143)
    saved = list_steps(str(tmp_path))[-1]
    assert 45 <= saved < STEPS
    assert reports_stop(out, tmp_path, saved, STEPS)

    # Resumed to the end.
    out = finish(start(digits_dir, tmp_path, optimized=True))
    assert first_reported_step(out) == saved
    assert unfinished_saves(tmp_path) == []
    assert_same_result(tmp_path, uninterrupted)


def assert_same_result(workdir: Path, expected: Path) -> None:
    """Checks that two finished runs logged the same metrics and saved the same arrays."""
    assert untimed_metrics(workdir) == untimed_metrics(expected)
    saved, actual = final_arrays(expected, STEPS), final_arrays(workdir, STEPS)
    for item, arrays in saved.items():
        for a, b in zip(arrays, actual[item], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=item)


@pytest.mark.parametrize("name", ["vit", "bit", *OPTIMIZER_OVERRIDES])
def test_killed_and_resumed_run_of_another_family_or_optimizer_equals_an_uninterrupted_one(
    name: str, digits_dir: str, tmp_path: Path
) -> None:
    overrides = (FAMILY_OVERRIDES | OPTIMIZER_OVERRIDES)[name]
    killed, uninterrupted = tmp_path / "killed", tmp_path / "uninterrupted"
    # At least one save is finished: the next one waits for it.
    step = random.SystemRandom().randint(21, 45)
    print(f"killed at step {step}")
    process = start(digits_dir, killed, optimized=True, **overrides)
    wait_until(lambda: last_step(killed) >= step, process)
    process.kill()
    process.communicate()
    assert list_steps(str(killed))[-1] < STEPS
    for workdir in (killed, uninterrupted):
        finish(start(digits_dir, workdir, optimized=True, **overrides))
    assert_same_result(killed, uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_ctrl_c_and_a_lost_terminal_save(
    number: signal.Signals, code: int, digits_dir: str, tmp_path: Path
) -> None:
    overrides: dict[str, Any] = {"checkpoint__every_steps": 0, "tensorboard": True}
    # The process would inherit that SIGHUP is ignored, as under nohup.
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        process = start(digits_dir, tmp_path, **overrides)
    finally:
        signal.signal(signal.SIGHUP, previous)
    wait_until(lambda: last_step(tmp_path) >= 3, process)
    process.send_signal(number)
    out = finish(process, code=code)
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


@pytest.fixture
def slow_images(tmp_path: Path) -> dict[str, Any]:
    """Settings of a run with two loader processes, which waits for its images."""
    large = cv2.resize(photograph(), (1600, 1200))
    for index in range(20):
        path = tmp_path / "images" / f"{index % 2}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(large, "JPEG"))
    return NO_REGULARIZATION | {
        "dataset__name": f"folder:{tmp_path}/images",
        "loader__num_workers": 2,
        "num_steps": 1000,
    }


def loader_processes(parent: int) -> list[int]:
    # Listed by the threads that started them.
    lists = (path.read_text() for path in Path(f"/proc/{parent}/task").glob("*/children"))
    children = [int(child) for text in lists for child in text.split()]
    return [c for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]


def test_killed_loader_process_ends_the_run_in_one_line_after_saving(
    slow_images: dict[str, Any], tmp_path: Path
) -> None:
    settings = slow_images | {"checkpoint__every_steps": 0, "log_every_steps": 1}
    process = start("", tmp_path / "run", **settings)
    wait_until(functools.partial(has_reached, tmp_path / "run", 2), process)
    first, _ = loader_processes(process.pid)
    os.kill(first, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    (line,) = err.splitlines()
    (saved,) = list_steps(str(tmp_path / "run"))
    assert saved >= 2
    assert mentions(line, "SIGKILL", "memory", "config.loader.num_workers", str(saved))
    # The state after the last step that had a batch.
    assert last_step(tmp_path / "run") == saved
    resumed = start("", tmp_path / "run", **settings)
    wait_until(functools.partial(has_reached, tmp_path / "run", saved + 1), resumed)
    resumed.terminate()
    finish(resumed, code=143)


def test_loader_processes_end_with_the_run(slow_images: dict[str, Any], tmp_path: Path) -> None:
    """Ctrl-C goes to the whole group, as from a terminal, while the run waits for its images."""
    steps = 0
    for stop, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = start("", tmp_path / "run", new_group=True, **slow_images)
        wait_until(functools.partial(has_reached, tmp_path / "run", steps + 2), process)
        if stop == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, stop)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        # A Grain worker that is killed while it removes shared memory does not unregister it, and
        # Python's resource tracker warns that it cannot find it.
        assert err == "" or "resource_tracker.py" in err
        if code >= 0:
            (*_, steps) = list_steps(str(tmp_path / "run"))
            assert reports_stop(out, tmp_path / "run", steps, 1000)
        deadline = time.monotonic() + 20
        while processes_of_group(process.pid):
            assert time.monotonic() < deadline, "worker processes are left"
            time.sleep(0.1)


def test_finished_run_is_evaluated_again(
    uninterrupted: Path, digits_dir: str, tmp_path: Path
) -> None:
    workdir = shutil.copytree(uninterrupted, tmp_path / "copy")
    out = finish(start(digits_dir, workdir, optimized=True))
    assert last_step(workdir) == STEPS
    # Nothing is trained or logged again; the metrics are printed.
    assert untimed_metrics(workdir) == untimed_metrics(uninterrupted)
    assert mentions(out, "360")
