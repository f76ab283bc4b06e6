"""Programs of one framework: built once, then timed in many rounds. Does not import JAX."""

import abc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mixer_jax.benchmarks.candidates import Candidate, Workload

# Shortest time to measure, unless a single step takes longer.
_MIN_SECONDS = 0.2
_MAX_STEPS = 1000

# Starts one step and returns a value to wait for.
Step = Callable[[], Any]


class CompileCosts(NamedTuple):
    """One-time costs of a candidate.

    Attributes:
        compile_seconds: Time from lowered program to executable; None if it cannot be separated.
        first_step_seconds: Time from the function to the end of its first step.
        memory_bytes: Memory per step: state, batch, results and temporaries; None if unknown.
    """

    compile_seconds: float | None
    first_step_seconds: float
    memory_bytes: int | None


class _TimedStep(NamedTuple):
    """Step, and the number of calls that are long enough to time."""

    step: Step
    num_calls: int


class FrameworkRunner(abc.ABC):
    """One framework on one device, with the programs built so far.

    A program that is measured is built first where it is missing, e.g. because this process had to
    be started again. `asynchronous` steps return before the device has finished.
    """

    def __init__(self, workload: Workload, asynchronous: bool):
        self.workload = workload
        self.asynchronous = asynchronous
        # By candidate and batch size.
        self._steps: dict[tuple[str, int], _TimedStep] = {}
        self._matmul: tuple[_TimedStep, int] | None = None

    @abc.abstractmethod
    def build(
        self, candidate: Candidate, batch_sizes: Sequence[int]
    ) -> tuple[list[Step], CompileCosts]:
        """Builds and runs one step per batch size; returns the costs of the first."""

    @abc.abstractmethod
    def build_matmul(self) -> tuple[Step, int]:
        """Builds a large square matmul; returns it with its FLOPs."""

    @abc.abstractmethod
    def wait(self, value: Any) -> None:
        """Waits until the step's result is computed."""

    @abc.abstractmethod
    def release_memory(self) -> None:
        """Returns cached memory to the device, as far as the framework can."""

    def measure_costs(self, candidate: Candidate) -> CompileCosts:
        """Measures the one-time costs of a candidate without keeping its program."""
        return self.build(candidate, [self.workload.batch_size])[1]

    def prepare(self, candidate: Candidate) -> CompileCosts:
        """Builds the programs of a candidate and keeps them: inference also of a single image."""
        batch_sizes = [self.workload.batch_size]
        if self.workload.mode == "infer":
            batch_sizes.append(1)
        steps, costs = self.build(candidate, batch_sizes)
        for batch_size, step in zip(batch_sizes, steps, strict=True):
            self._steps[candidate.name, batch_size] = self._calibrate(step)
        self.release_memory()
        return costs

    def measure_step(self, candidate: Candidate) -> float:
        """Measures the seconds per step over many consecutive steps."""
        return self._measure(self._get_step(candidate, self.workload.batch_size))

    def measure_latencies(self, candidate: Candidate) -> list[float]:
        """Measures single calls from one image to its logits, in seconds; none in training."""
        if self.workload.mode != "infer":
            return []
        step, num_calls = self._get_step(candidate, 1)
        self._time(step, 1)
        latencies = [self._time(step, 1) for _ in range(num_calls)]
        self.release_memory()
        return latencies

    def measure_matmul(self) -> float:
        """Measures the FLOP/s of a large matmul."""
        if self._matmul is None:
            matmul, flops = self.build_matmul()
            self._matmul = self._calibrate(matmul), flops
        timed, flops = self._matmul
        return flops / self._measure(timed)

    def images_per_second(self, candidate: Candidate, batch_size: int) -> float:
        """Measures a candidate at another batch size without keeping its program."""
        (step,), _ = self.build(candidate, [batch_size])
        timed = self._calibrate(step)
        self.release_memory()
        return batch_size / statistics.median(self._measure(timed) for _ in range(3))

    def _get_step(self, candidate: Candidate, batch_size: int) -> _TimedStep:
        if (candidate.name, batch_size) not in self._steps:
            self.prepare(candidate)
        return self._steps[candidate.name, batch_size]

    def _calibrate(self, step: Step) -> _TimedStep:
        """Chooses the number of calls that take long enough to time."""
        num_calls = 1
        for _ in range(3 if self.asynchronous else 1):
            seconds = self._time(step, num_calls)
            num_calls = min(max(math.ceil(_MIN_SECONDS / seconds), 1), _MAX_STEPS)
        return _TimedStep(step, num_calls)

    def _measure(self, timed: _TimedStep) -> float:
        if self.asynchronous:
            # The device may have been idle, and its memory may have been released.
            self._time(timed.step, 1)
        seconds = self._time(timed.step, timed.num_calls)
        self.release_memory()
        return seconds

    def _time(self, step: Step, num_calls: int) -> float:
        """Returns the mean seconds per call."""
        start = time.perf_counter()
        for _ in range(num_calls):
            value = step()
            if not self.asynchronous:
                # Steps of some frameworks on CPUs would not wait for each other.
                self.wait(value)
        self.wait(value)
        return (time.perf_counter() - start) / num_calls
