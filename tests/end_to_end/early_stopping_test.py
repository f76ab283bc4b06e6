"""Tests of the best checkpoint and of early stopping in real processes that are killed."""

import functools
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax.checkpoints.best import MetricHistory
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.resolve import find_checkpoint, list_steps
from mixer_jax.training.metrics import read_metrics
from tests.helpers.messages import mentions
from tests.helpers.processes import (
    STEPS,
    final_arrays,
    finish,
    has_reached,
    last_step,
    start,
    start_two_hosts,
    untimed_metrics,
    wait_until,
)
from tests.helpers.random_weights import assert_params_equal
from tests.helpers.tiny_run import NO_REGULARIZATION

pytestmark = pytest.mark.slow

# The accuracy rises and falls at this learning rate, so that the run stops after about 36 of 60
# steps. Only evaluations and the end save.
EVERY, PATIENCE = 4, 3
SETTINGS: dict[str, Any] = {
    "optimizer__learning_rate": 0.03,
    "checkpoint__every_steps": 0,
    "checkpoint__keep": 1,
    "checkpoint__best_metric": "test/top1",
    "early_stopping_patience": PATIENCE,
    "evals__test__every_steps": EVERY,
}


def logged_history(workdir: Path, last: int = STEPS) -> MetricHistory:
    lines = [line for line in read_metrics(str(workdir)) if line["step"] <= last]
    return MetricHistory("test/top1", lines)


def assert_stopped_where_the_log_says(workdir: Path) -> int:
    """Checks the steps of the end and of the checkpoints, and returns the first."""
    history = logged_history(workdir)
    (*_, stop) = history.values
    assert stop < STEPS
    assert last_step(workdir) == stop
    counts = [
        logged_history(workdir, last).count_evals_without_improvement(EVERY, 0.0)
        for last in range(EVERY, stop + 1, EVERY)
    ]
    assert [count >= PATIENCE for count in counts] == [False] * (len(counts) - 1) + [True]
    best = history.best_step()
    assert best is not None
    assert best < stop
    assert list_steps(str(workdir)) == [best, stop]
    return stop


def assert_same_run(workdir: Path, expected: Path, stop: int) -> None:
    assert untimed_metrics(workdir) == untimed_metrics(expected)
    assert list_steps(str(workdir)) == list_steps(str(expected))
    saved, actual = final_arrays(expected, stop), final_arrays(workdir, stop)
    for item, arrays in saved.items():
        for a, b in zip(arrays, actual[item], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=item)
    best, expected_best = (load_checkpoint(str(run), step="best") for run in (workdir, expected))
    assert best.step == expected_best.step
    assert_params_equal(best.params, expected_best.params)


def test_killed_run_keeps_the_same_best_checkpoint_and_stops_at_the_same_step(
    digits_dir: str, tmp_path: Path
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    out = finish(start(digits_dir, undisturbed, optimized=True, **SETTINGS))
    stop = assert_stopped_where_the_log_says(undisturbed)
    best = list_steps(str(undisturbed))[0]
    assert mentions(out, "stopped early", str(stop), str(STEPS), "test/top1")
    assert mentions(out, f"{undisturbed}/checkpoints/{best}")

    # Killed at random moments of saves, evaluations and deletions. A failure shows them.
    rng = random.SystemRandom()
    for index in range(5):
        step, delay = rng.randint(1 + 6 * index, 7 + 6 * index), rng.uniform(0, 0.05)
        print(f"killed {delay:.3f} s after step {step}")
        process = start(digits_dir, killed, optimized=True, **SETTINGS)
        wait_until(functools.partial(has_reached, killed, step), process)
        time.sleep(delay)
        process.kill()
        process.communicate()
        # The best of the checkpoints that it can resume from is there.
        if steps := list_steps(str(killed)):
            values = logged_history(killed, steps[-1]).best_step()
            assert values is None or values in steps
            assert values is None or find_checkpoint(str(killed), "best")[1] in steps
    finish(start(digits_dir, killed, optimized=True, **SETTINGS))
    assert_same_run(killed, undisturbed, stop)

    # The same command does not train further.
    out = finish(start(digits_dir, killed, optimized=True, **SETTINGS))
    assert mentions(out, "training is finished", "stopped early", str(stop))
    assert_same_run(killed, undisturbed, stop)


def test_two_hosts_stop_at_the_same_step(digits_dir: str, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    settings = NO_REGULARIZATION | SETTINGS
    outs = [finish(process) for process in start_two_hosts(digits_dir, undisturbed, **settings)]
    stop = assert_stopped_where_the_log_says(undisturbed)
    # Only the primary process prints.
    assert [mentions(out, "stopped early", str(stop)) for out in outs] == [True, False]

    step = random.SystemRandom().randint(5, stop - 1)
    print(f"killed at step {step}")
    both = start_two_hosts(digits_dir, killed, **settings)
    wait_until(lambda: has_reached(killed, step), both[0])
    both[1].kill()
    for process in both:
        process.communicate(timeout=60)
    assert both[1].returncode == -signal.SIGKILL
    for _ in range(2):
        for process in start_two_hosts(digits_dir, killed, **settings):
            finish(process)
        assert_same_run(killed, undisturbed, stop)
