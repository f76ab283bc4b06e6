"""Comparison of candidates at one workload, timed in interleaved rounds. Does not import JAX."""

import contextlib
import dataclasses
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from mixer_jax.benchmarks.candidates import (
    JAX,
    MIXER_JAX,
    TORCH,
    Candidate,
    Workload,
    check_backends,
)
from mixer_jax.benchmarks.report import log
from mixer_jax.benchmarks.runner import CompileCosts
from mixer_jax.benchmarks.workers import Worker, WorkerError, WorkerPool
from mixer_jax.distributed.hardware import device_error
from mixer_jax.errors import RunError


class Result(NamedTuple):
    """Measurements of one candidate; None if unknown or not measured.

    Attributes:
        failed: Reason why the candidate was not measured; empty if it was.
        step_seconds: Median step time over rounds.
        mfu: Model FLOP/s as a fraction of the FLOP/s of a large matmul in the same round, median
            over rounds.
        latency_seconds: Median time from one image to its logits.
        compile_seconds: Compilation time without a cache, see `CompileCosts`.
        first_step_seconds: Time to the end of the first step without a cache.
        cached_first_step_seconds: The same in a later process that finds the compiled program.
        relative_time: Step time relative to that of the first candidate of mixer_jax in the same
            round, median over rounds.
    """

    name: str
    failed: str = ""
    images_per_second: float | None = None
    step_seconds: float | None = None
    mfu: float | None = None
    memory_bytes: int | None = None
    latency_seconds: float | None = None
    compile_seconds: float | None = None
    first_step_seconds: float | None = None
    cached_first_step_seconds: float | None = None
    relative_time: float | None = None


class Comparison(NamedTuple):
    """Results of all candidates at one workload.

    Attributes:
        matmul_flops_per_second: FLOP/s of a large matmul by framework, median over rounds.
        isolated: Whether the frameworks' processes ran one at a time, see `WorkerPool`.
        results: Results in the order of the candidates.
    """

    matmul_flops_per_second: dict[str, float]
    isolated: bool
    results: list[Result]


def query_environment(workload: Workload, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Returns JAX's device and platform, the dtype of the workload, and versions.

    Raises:
        UserError: A backend does not run on this device, or JAX_PLATFORMS names absent devices.
        RunError: JAX does not start.
    """
    with Worker(JAX, workload) as worker:
        try:
            environment: dict[str, Any] = worker.call("environment")
        except WorkerError as error:
            raise device_error(error.reason) from error
    check_backends(workload, candidates, environment["platform"])
    return environment


def compare(
    workload: Workload,
    candidates: Sequence[Candidate],
    num_rounds: int,
    platform: str,
    profile_dir: str = "",
    num_compilations: int = 1,
) -> Comparison:
    """Measures all candidates, one after the other in every round.

    Each candidate of JAX is compiled `num_compilations` times, each time in a new process. A
    profile of the first candidate of mixer_jax is written to `profile_dir`, unless it is empty.

    Raises:
        RunError: No candidate of mixer_jax could be measured.
    """
    frameworks = [f for f in (JAX, TORCH) if any(c.framework == f for c in candidates)]
    with (
        tempfile.TemporaryDirectory() as cache_dir,
        WorkerPool(workload, frameworks, platform, cache_dir) as pool,
    ):
        measurements = _Measurements(pool, workload, candidates)
        measurements.prepare(num_compilations)
        for index in range(num_rounds):
            log(f"round {index + 1} of {num_rounds}")
            measurements.measure_round(index)
        if profile_dir:
            measurements.write_profile(profile_dir)
        matmuls = measurements.matmuls.items()
        medians = {framework: statistics.median(values) for framework, values in matmuls}
        return Comparison(medians, pool.isolated, measurements.results())


@dataclasses.dataclass
class _Record:
    """Measurements of one candidate so far; it is skipped once it has failed."""

    candidate: Candidate
    failed: str = ""
    costs: list[CompileCosts] = dataclasses.field(default_factory=list)
    cached_first_step_seconds: float | None = None
    times: list[float] = dataclasses.field(default_factory=list)
    latencies: list[float] = dataclasses.field(default_factory=list)


class _Measurements:
    """Measurements of all candidates so far."""

    def __init__(self, pool: WorkerPool, workload: Workload, candidates: Sequence[Candidate]):
        # FLOP/s of a large matmul in every round, by framework.
        self.matmuls: dict[str, list[float]] = {}
        self._pool, self._workload = pool, workload
        self._records = [_Record(candidate) for candidate in candidates]

    def prepare(self, num_compilations: int) -> None:
        """Measures one-time costs and builds the programs to be timed."""
        for _ in range(num_compilations):
            for record in self._remaining(JAX):
                log(f"{self._workload.mode}: compiling {record.candidate.name}")
                with _record_failure(record):
                    record.costs.append(self._pool.measure_cold_start(record.candidate))
        for record in self._remaining(JAX, TORCH):
            log(f"{self._workload.mode}: preparing {record.candidate.name}")
            with _record_failure(record):
                costs = self._call(record, "prepare")
                if record.candidate.framework == JAX:
                    record.cached_first_step_seconds = costs.first_step_seconds
                else:
                    record.costs.append(costs)
        self.matmuls = {framework: [] for framework in (JAX, TORCH) if self._remaining(framework)}
        self._base()  # Raises an error if no candidate of mixer_jax is left.

    def measure_round(self, index: int) -> None:
        """Times every candidate and a matmul of every framework once, rotated by the round."""
        tasks: list[Callable[[], None]] = []
        for framework in (JAX, TORCH):
            for record in self._remaining(framework):
                tasks.append(functools.partial(self._measure_candidate, record))
            if framework in self.matmuls:
                tasks.append(functools.partial(self._measure_matmul, framework))
        for task in rotate(tasks, index):
            task()

    def write_profile(self, folder: str) -> None:
        """Writes a profile of the first candidate of mixer_jax."""
        try:
            self._call(self._base(), "write_trace", folder=folder)
        except WorkerError as error:
            raise RunError(f"the profile in {folder} cannot be written: {error}") from error

    def results(self) -> list[Result]:
        """Summarizes the measurements of all candidates."""
        # The matmul of the faster framework counts as the peak of the machine.
        peak = max(self.matmuls.values(), key=statistics.median, default=None)
        base_times = self._base().times
        return [self._result(record, base_times, peak) for record in self._records]

    def _result(self, record: _Record, base_times: list[float], peak: list[float] | None) -> Result:
        if record.failed:
            return Result(record.candidate.name, record.failed)
        seconds = statistics.median(record.times)
        return Result(
            record.candidate.name,
            images_per_second=self._workload.batch_size / seconds,
            step_seconds=seconds,
            mfu=mfu(self._workload.flops, record.times, peak) if peak else None,
            latency_seconds=statistics.median(record.latencies) if record.latencies else None,
            cached_first_step_seconds=record.cached_first_step_seconds,
            relative_time=median_ratio(record.times, base_times),
            **_median_costs(record.costs),
        )

    def _base(self) -> _Record:
        """Returns the first candidate of mixer_jax that did not fail."""
        ours = [r for r in self._records if r.candidate.implementation == MIXER_JAX]
        for record in ours:
            if not record.failed:
                return record
        raise RunError(f"{ours[0].candidate.name} failed: {ours[0].failed}")

    def _measure_matmul(self, framework: str) -> None:
        try:
            self.matmuls[framework].append(self._pool.call(framework, "measure_matmul"))
        except WorkerError:
            # Without it, MFU is relative to the other framework's matmul, or unknown.
            del self.matmuls[framework]

    def _measure_candidate(self, record: _Record) -> None:
        with _record_failure(record):
            record.times.append(self._call(record, "measure_step"))
            record.latencies += self._call(record, "measure_latencies")

    def _call(self, record: _Record, method: str, **kwargs: Any) -> Any:
        candidate = record.candidate
        return self._pool.call(candidate.framework, method, candidate=candidate, **kwargs)

    def _remaining(self, *frameworks: str) -> list[_Record]:
        return [r for r in self._records if r.candidate.framework in frameworks and not r.failed]


@contextlib.contextmanager
def _record_failure(record: _Record) -> Iterator[None]:
    """Records the failure of a candidate and continues."""
    try:
        yield
    except WorkerError as error:
        record.failed = str(error)
        if record.candidate.implementation == MIXER_JAX and not error.out_of_memory:
            # An error of this package, to be fixed.
            print(error.trace, file=sys.stderr)


def _median_costs(costs: Sequence[CompileCosts]) -> dict[str, Any]:
    """Returns the median of every cost; None if unknown."""
    columns = zip(*costs, strict=True)
    return {
        name: None if None in values else statistics.median(values)
        for name, values in zip(CompileCosts._fields, columns, strict=True)
    }


def rotate(items: Sequence[Any], index: int) -> list[Any]:
    """Rotates a list by an index, so that each item is first once in as many rounds as items."""
    first = index % len(items)
    return [*items[first:], *items[:first]]


def median_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Returns the median over rounds of a value relative to the base in the same round."""
    return statistics.median(a / b for a, b in zip(values, base, strict=True))


def mfu(flops: int, times: Sequence[float], peak: Sequence[float]) -> float:
    """Returns the model FLOPs utilization, median over rounds; `peak` is in FLOP/s."""
    return median_ratio([flops / seconds for seconds in times], peak)
