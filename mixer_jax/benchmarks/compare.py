"""Comparison of candidates at one workload, timed in interleaved rounds. Does not import JAX."""

import contextlib
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
from mixer_jax.errors import RunError

# A larger batch must be faster by more than this factor to be worth its memory.
_MIN_GAIN = 1.02


class Result(NamedTuple):
    """Measurements of one candidate; None if unknown or not measured.

    Attributes:
        name: Name of the candidate.
        failed: Reason why the candidate was not measured; empty if it was.
        images_per_second: Rate at the median time over rounds.
        step_seconds: Median step time over rounds.
        mfu: Model FLOP/s as a fraction of the FLOP/s of a large matmul in the same round, median
            over rounds.
        memory_bytes: Memory of a step: state, batch, results and temporaries.
        latency_seconds: Median time from one image to its logits.
        compile_seconds: Time from lowered program to executable, without a cache.
        first_step_seconds: Time from the function to the end of its first step, without a cache.
        cached_first_step_seconds: The same in a later process that finds the compiled program.
        relative_time: Time of a step relative to that of the first candidate of mixer_jax in the
            same round, median over rounds.
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
        workload: Work of all candidates.
        matmul_flops_per_second: FLOP/s of a large matmul by framework, median over rounds.
        isolated: Whether the frameworks' processes ran one at a time, because both do not fit into
            memory.
        results: Results in the order of the candidates.
    """

    workload: Workload
    matmul_flops_per_second: dict[str, float]
    isolated: bool
    results: list[Result]


class Trial(NamedTuple):
    """One batch size of a search.

    Attributes:
        batch_size: Images per step.
        images_per_second: Rate at this batch size; None if it does not fit into memory.
    """

    batch_size: int
    images_per_second: float | None


def query_environment(workload: Workload, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Returns JAX's device and platform, the dtype of the workload, and versions.

    Raises:
        UserError: A backend does not run on this device.
        RunError: JAX does not start.
    """
    with Worker(JAX, workload) as worker:
        try:
            environment: dict[str, Any] = worker.call("environment")
        except WorkerError as error:
            raise RunError(f"JAX does not start: {error}") from error
    check_backends(candidates, environment["platform"])
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

    Args:
        workload: Work of all candidates.
        candidates: Candidates to compare.
        num_rounds: Measurements per candidate.
        platform: Platform as JAX names it.
        profile_dir: Folder for a profile of mixer_jax's first candidate; empty writes none.
        num_compilations: Cold starts of each candidate of JAX, whose median is reported.

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
        return Comparison(workload, medians, pool.isolated, measurements.results())


class _Measurements:
    """Measurements so far; a candidate that fails is skipped from then on.

    Attributes:
        matmuls: FLOP/s of a large matmul in every round, by framework.
    """

    def __init__(self, pool: WorkerPool, workload: Workload, candidates: Sequence[Candidate]):
        self.matmuls: dict[str, list[float]] = {}
        self._pool, self._workload, self._candidates = pool, workload, candidates
        self._failed: dict[str, str] = {}
        self._costs: dict[str, list[CompileCosts]] = {}
        self._cached_first_step: dict[str, float] = {}
        self._times: dict[str, list[float]] = {}
        self._latencies: dict[str, list[float]] = {}

    @property
    def base(self) -> Candidate:
        """First candidate of mixer_jax that did not fail."""
        for candidate in self._candidates:
            if candidate.implementation == MIXER_JAX and candidate.name not in self._failed:
                return candidate
        name = next(c.name for c in self._candidates if c.implementation == MIXER_JAX)
        raise RunError(f"{name} failed: {self._failed[name]}")

    def prepare(self, num_compilations: int) -> None:
        """Measures one-time costs and builds the programs to be timed."""
        for _ in range(num_compilations):
            for candidate in self._remaining(JAX):
                log(f"{self._workload.mode}: compiling {candidate.name}")
                with self._catch_failure(candidate.name):
                    costs = self._pool.measure_cold_start(candidate)
                    self._costs.setdefault(candidate.name, []).append(costs)
        for candidate in self._remaining(JAX, TORCH):
            log(f"{self._workload.mode}: preparing {candidate.name}")
            with self._catch_failure(candidate.name):
                costs = self._pool.call(candidate.framework, "prepare", candidate=candidate)
                if candidate.framework == JAX:
                    self._cached_first_step[candidate.name] = costs.first_step_seconds
                else:
                    self._costs[candidate.name] = [costs]
        self.matmuls = {framework: [] for framework in (JAX, TORCH) if self._remaining(framework)}
        _ = self.base  # Raises an error if no candidate of mixer_jax is left.

    def measure_round(self, index: int) -> None:
        """Times every candidate and a matmul of every framework once, rotated by the round."""
        tasks: list[Candidate | str] = []
        for framework in (JAX, TORCH):
            tasks += self._remaining(framework)
            tasks += [framework] if framework in self.matmuls else []
        for task in rotate(tasks, index):
            if isinstance(task, Candidate):
                self._measure_candidate(task)
            else:
                self._measure_matmul(task)

    def write_profile(self, folder: str) -> None:
        """Writes a profile of the base."""
        try:
            self._pool.call(JAX, "write_trace", candidate=self.base, folder=folder)
        except WorkerError as error:
            raise RunError(f"the profile in {folder} cannot be written: {error}") from error

    def results(self) -> list[Result]:
        """Summarizes the measurements of all candidates."""
        # The matmul of the faster framework counts as the peak of the machine.
        peak = max(self.matmuls.values(), key=statistics.median, default=None)
        base_times = self._times[self.base.name]
        return [self._result(candidate, base_times, peak) for candidate in self._candidates]

    def _result(
        self, candidate: Candidate, base_times: list[float], peak: list[float] | None
    ) -> Result:
        name = candidate.name
        if name in self._failed:
            return Result(name, self._failed[name])
        times, latencies = self._times[name], self._latencies[name]
        seconds = statistics.median(times)
        return Result(
            name,
            images_per_second=self._workload.batch_size / seconds,
            step_seconds=seconds,
            mfu=mfu(self._workload.flops, times, peak) if peak else None,
            latency_seconds=statistics.median(latencies) if latencies else None,
            cached_first_step_seconds=self._cached_first_step.get(name),
            relative_time=median_ratio(times, base_times),
            **_median_costs(self._costs[name]),
        )

    def _measure_matmul(self, framework: str) -> None:
        try:
            self.matmuls[framework].append(self._pool.call(framework, "measure_matmul"))
        except WorkerError:
            # Without it, MFU is relative to the other framework's matmul, or unknown.
            del self.matmuls[framework]

    def _measure_candidate(self, candidate: Candidate) -> None:
        name, call = candidate.name, self._pool.call
        with self._catch_failure(name):
            seconds = call(candidate.framework, "measure_step", candidate=candidate)
            self._times.setdefault(name, []).append(seconds)
            latencies = call(candidate.framework, "measure_latencies", candidate=candidate)
            self._latencies.setdefault(name, []).extend(latencies)

    def _remaining(self, *frameworks: str) -> list[Candidate]:
        return [
            candidate
            for candidate in self._candidates
            if candidate.framework in frameworks and candidate.name not in self._failed
        ]

    @contextlib.contextmanager
    def _catch_failure(self, name: str) -> Iterator[None]:
        """Records the failure of a candidate and continues."""
        try:
            yield
        except WorkerError as error:
            self._failed.setdefault(name, str(error))
            if name.startswith(MIXER_JAX) and not error.out_of_memory:
                # An error of this package, to be fixed.
                print(error.trace, file=sys.stderr)


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


def _median_costs(costs: Sequence[CompileCosts]) -> dict[str, Any]:
    """Returns the median of every cost; None if unknown."""
    columns = zip(*costs, strict=True)
    return {
        name: None if None in values else statistics.median(values)
        for name, values in zip(CompileCosts._fields, columns, strict=True)
    }


def find_batch_size(
    workload: Workload, candidate: Candidate, platform: str
) -> tuple[Workload, list[Trial]]:
    """Searches for a good batch size; returns the workload with it, and all trials.

    Raises:
        RunError: The candidate fails, or batch size 1 does not fit into memory.
    """
    with Worker(JAX, workload) as worker:

        def measure(batch_size: int) -> float | None:
            log(f"{workload.mode}: trying {batch_size} images per step")
            for _ in range(2):
                try:
                    rate: float = worker.call(
                        "images_per_second", candidate=candidate, batch_size=batch_size
                    )
                except WorkerError as error:
                    if not error.out_of_memory:
                        raise RunError(f"{candidate.name} failed: {error}") from error
                    # The second try is in a new process, whose memory is not fragmented.
                    worker.stop()
                else:
                    return rate
            return None

        batch_size, trials = search_batch_size(measure, 8 if platform == "cpu" else 64)
    if not batch_size:
        raise RunError("batch size 1 does not fit into the device's memory")
    return workload._replace(batch_size=batch_size), trials


def search_batch_size(
    measure: Callable[[int], float | None], start: int
) -> tuple[int, list[Trial]]:
    """Finds the smallest batch size that twice its size beats by no more than 2 %.

    Args:
        measure: Function from a batch size to images/s, or None if it does not fit into memory.
        start: First batch size; doubled while it pays, halved while it does not fit.

    Returns:
        The batch size, 0 if batch size 1 does not fit, and all trials in order.
    """
    size, rate = start, measure(start)
    trials = [Trial(size, rate)]
    while rate is None and size > 1:
        size //= 2
        rate = measure(size)
        trials.append(Trial(size, rate))
    if rate is None:
        return 0, trials
    while size >= start:
        larger = measure(2 * size)
        trials.append(Trial(2 * size, larger))
        if larger is None or larger <= _MIN_GAIN * rate:
            break
        size, rate = 2 * size, larger
    return size, trials
