"""Tests of worker processes, with real ones."""

import os
import signal
from pathlib import Path

import pytest

from mixer_jax.benchmarks.candidates import JAX, MIXER_JAX, Candidate, Workload
from mixer_jax.benchmarks.workers import Worker, WorkerError, WorkerPool
from mixer_jax.errors import is_out_of_memory

WORKLOAD = Workload("infer", "Mixer-S/32", 32, 2, "float32", 1)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9.1GiB",
        "INTERNAL: Error dispatching computation: Out of memory allocating 12288000000000 bytes.",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    ],
)
def test_is_out_of_memory(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError("no C++ compiler"))


@pytest.mark.slow
def test_worker_continues_after_an_error() -> None:
    with Worker(JAX, WORKLOAD) as worker:
        with pytest.raises(WorkerError, match="has no attribute 'dance'") as caught:
            worker.call("dance")
        assert not caught.value.out_of_memory
        assert "Traceback" in caught.value.trace
        assert worker.call("environment")["dtype"] == "float32"
    assert worker.pid is None


@pytest.mark.slow
def test_pool_restarts_a_killed_process_and_rebuilds_its_programs(tmp_path: Path) -> None:
    candidate = Candidate(MIXER_JAX, MIXER_JAX, {"scan_unroll": 1})
    with WorkerPool(WORKLOAD, [JAX], "cpu", str(tmp_path)) as pool:
        assert pool.measure_cold_start(candidate).first_step_seconds > 0
        # The compiled program is in the cache of the pool.
        assert any((tmp_path / "xla").iterdir())
        assert pool.call(JAX, "measure_step", candidate=candidate) > 0
        os.kill(pool._workers[JAX].pid or 0, signal.SIGKILL)
        with pytest.raises(WorkerError) as caught:
            pool.call(JAX, "measure_step", candidate=candidate)
        assert caught.value.out_of_memory
        assert pool.call(JAX, "measure_step", candidate=candidate) > 0
