"""Tests of the processes that measure: what fails in them, and what that does to the others."""

import os
import signal
from pathlib import Path

import pytest

from mixer_jax.benchmarks.contestants import OURS, Contestant, Setting
from mixer_jax.benchmarks.field import JAX, Field
from mixer_jax.benchmarks.worker import is_out_of_memory
from mixer_jax.benchmarks.workers import FailedError, Worker
from tests.helpers.messages import raises

SETTING = Setting("infer", "S/32", 32, 2, "float32", 1)


def test_a_failure_is_told_and_the_process_goes_on() -> None:
    with Worker(JAX, SETTING) as worker:
        with raises(FailedError, "dance") as caught:
            worker.ask("dance")
        assert not caught.value.out_of_memory
        assert "Traceback" in caught.value.trace
        assert worker.ask("facts")["dtype"] == "float32"
    assert not worker.running


@pytest.mark.parametrize(
    "said",
    [
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9.1GiB",
        "INTERNAL: Error dispatching computation: Out of memory allocating 12288000000000 bytes.",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    ],
)
def test_memory_that_runs_out_is_told_apart(said: str) -> None:
    assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(RuntimeError("no C++ compiler"))


def test_a_process_that_is_killed_starts_anew_with_what_it_had(tmp_path: Path) -> None:
    ours = Contestant(OURS, OURS, unroll=1)
    with Field(SETTING, [ours], "cpu", str(tmp_path)) as field:
        field.prepare()
        assert not field.failed
        assert field.ask(JAX, "time", name=OURS) > 0
        process = field._workers[JAX]._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(FailedError):
            field.ask(JAX, "time", name=OURS)
        assert field.ask(JAX, "time", name=OURS) > 0
