"""Tests of runs on two hosts: two real processes that meet."""

import functools
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mixer_jax.model.variants import Widths
from mixer_jax.weights.steps import list_steps
from tests.images import encode, noise
from tests.processes import (
    STEPS,
    finish,
    has_reached,
    meeting,
    start,
    untimed_metrics,
    wait_until,
)
from tests.random_weights import random_weights, save_run
from tests.small_run import PLAIN


def start_two_hosts(
    data_dir: str, workdir: Path, **changes: Any
) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Starts one run on two hosts: processes of two devices each."""
    first, second = (start(data_dir, workdir, env, **changes) for env in meeting(devices=2))
    return first, second


def test_two_hosts_stop_and_go_on_together_and_then_one_alone(
    uninterrupted: Path, digits_dir: str, tmp_path: Path
) -> None:
    saved = 0
    for step in (12, 24):  # The second time, both go on together from the common checkpoint.
        first, second = start_two_hosts(digits_dir, tmp_path, mesh__fsdp=2)
        wait_until(functools.partial(has_reached, tmp_path, max(step, saved + 4)), first)
        second.send_signal(signal.SIGTERM)
        outs = [finish(process) for process in (first, second)]
        assert saved == 0 or f"goes on after step {saved}" in outs[0]
        assert list_steps(str(tmp_path))[-1] > saved
        saved = list_steps(str(tmp_path))[-1]
        assert f"stopped at step {saved} of {STEPS}" in outs[0]
        # What all share, one host says and writes.
        assert "stopped" not in outs[1]

    out = finish(start(digits_dir, tmp_path, as_users=True))
    assert f"goes on after step {saved}" in out
    expected, actual = untimed_metrics(uninterrupted), untimed_metrics(tmp_path)
    assert [line["step"] for line in actual] == [line["step"] for line in expected]
    for a, b in zip(actual, expected, strict=True):
        # Rounding differs with the number of devices.
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        else:
            assert a["test/num_examples"] == b["test/num_examples"] == 360


def test_two_hosts_begin_with_the_same_weights_and_agree_on_bad_images(tmp_path: Path) -> None:
    """One bad image of 40, which one host or the other meets, is too many for both."""
    for split in ("train", "test"):
        for index in range(40):
            path = tmp_path / "images" / split / f"{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"" if index == 7 else encode(noise(8, 8), "PNG"))
    weights = random_weights(Widths(1, 4, 16, 8, 16), (8, 8))
    settings: dict[str, Any] = PLAIN | {
        "dataset__name": f"folder:{tmp_path}/images",
        "init_from": save_run(weights, tmp_path / "source"),
        "num_steps": 20,
    }
    both = start_two_hosts("", tmp_path / "run", **settings)
    told = [process.communicate(timeout=180) for process in both]
    errors = [error for _, error in told]
    assert [process.returncode for process in both] == [1, 1], errors
    # Both hosts take the weights to begin with, and one says so.
    assert "grown from 8 px (the paper's Appendix C), with a new head" in told[0][0]
    for error in errors:
        assert "1 of 40 training images cannot be used" in error
    assert list_steps(str(tmp_path / "run")) == [10]
    # The run can go on, to its evaluation, of which the same is true.
    both = start_two_hosts("", tmp_path / "run", bad_images__max_share=0.1, **settings)
    errors = [process.communicate(timeout=180)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2], errors
    assert sum("test/1/7.png (empty file)" in error for error in errors) == 1
    assert sum("another host names them" in error for error in errors) == 1
