"""Programs of one framework: built once, then timed in many rounds. Does not import JAX."""

import abc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from mixer_jax.benchmarks.candidates import Candidate, Workload

# Shortest time to measure, unless a single step takes longer.
_MIN_SECONDS = 0.2
_MAX_STEPS = 1000


class Program(NamedTuple):
    """Steps of one candidate, ready to run.

    Attributes:
        step: Starts one step of a whole batch and returns a value to wait for.
        single_image_step: Starts one step of a single image; None if latency is not measured.
    """

    step: Callable[[], Any]
    single_image_step: Callable[[], Any] | None


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


class _TimedCall(NamedTuple):
    """Function, and the number of calls that are long enough to time."""

    function: Callable[[], Any]
    num_calls: int


class FrameworkRunner(abc.ABC):
    """One framework on one device, with the programs built so far.

    A program that is measured is built first where it is missing, e.g. because this process had to
    be started again.

    Attributes:
        workload: Work of all candidates.
        asynchronous: Whether steps return before the device has finished.
    """

    def __init__(self, workload: Workload, asynchronous: bool):
        self.workload = workload
        self.asynchronous = asynchronous
        self._steps: dict[str, _TimedCall] = {}
        self._single_image_steps: dict[str, _TimedCall] = {}
        self._matmul: tuple[_TimedCall, int] | None = None

    @abc.abstractmethod
    def environment(self) -> dict[str, str]:
        """Returns the device and the versions of the libraries."""

    @abc.abstractmethod
    def build(self, candidate: Candidate, single_image: bool) -> tuple[Program, CompileCosts]:
        """Builds the steps of a batch and, if requested, of a single image; runs them once."""

    @abc.abstractmethod
    def build_matmul(self) -> tuple[Callable[[], Any], int]:
        """Builds a large square matmul; returns it with its FLOPs."""

    @abc.abstractmethod
    def wait(self, value: Any) -> None:
        """Waits until the step's result is computed."""

    @abc.abstractmethod
    def release_memory(self) -> None:
        """Returns cached memory to the device, as far as the framework can."""

    def measure_costs(self, candidate: Candidate) -> CompileCosts:
        """Measures the one-time costs of a candidate without keeping its program."""
        return self.build(candidate, single_image=False)[1]

    def prepare(self, candidate: Candidate) -> CompileCosts:
        """Builds the program of a candidate and keeps it."""
        program, costs = self.build(candidate, single_image=self.workload.mode == "infer")
        if program.single_image_step:
            self._single_image_steps[candidate.name] = self._calibrate(program.single_image_step)
        self._steps[candidate.name] = self._calibrate(program.step)
        self.release_memory()
        return costs

    def measure_step(self, candidate: Candidate) -> float:
        """Measures the seconds per step over many consecutive steps."""
        if candidate.name not in self._steps:
            self.prepare(candidate)
        return self._measure(self._steps[candidate.name])

    def measure_latencies(self, candidate: Candidate) -> list[float]:
        """Measures single calls from one image to its logits, in seconds; none in training."""
        if self.workload.mode != "infer":
            return []
        if candidate.name not in self._single_image_steps:
            self.prepare(candidate)
        call, num_calls = self._single_image_steps[candidate.name]
        self._time(call, 1)
        latencies = [self._time(call, 1) for _ in range(num_calls)]
        self.release_memory()
        return latencies

    def measure_matmul(self) -> float:
        """Measures the FLOP/s of a large matmul."""
        if self._matmul is None:
            function, flops = self.build_matmul()
            self._matmul = self._calibrate(function), flops
        call, flops = self._matmul
        return flops / self._measure(call)

    def images_per_second(self, candidate: Candidate, batch_size: int) -> float:
        """Measures a candidate at another batch size without keeping its program."""
        self.workload = self.workload._replace(batch_size=batch_size)
        self.prepare(candidate)
        seconds = statistics.median(self.measure_step(candidate) for _ in range(3))
        self._steps.clear()
        self._single_image_steps.clear()
        return batch_size / seconds

    def _calibrate(self, function: Callable[[], Any]) -> _TimedCall:
        """Chooses the number of calls that take long enough to time."""
        num_calls = 1
        for _ in range(3 if self.asynchronous else 1):
            seconds = self._time(function, num_calls)
            num_calls = min(max(math.ceil(_MIN_SECONDS / seconds), 1), _MAX_STEPS)
        return _TimedCall(function, num_calls)

    def _measure(self, call: _TimedCall) -> float:
        if self.asynchronous:
            # The device may have been idle, and its memory may have been released.
            self._time(call.function, 1)
        seconds = self._time(call.function, call.num_calls)
        self.release_memory()
        return seconds

    def _time(self, function: Callable[[], Any], num_calls: int) -> float:
        """Returns the mean seconds per call."""
        start = time.perf_counter()
        for _ in range(num_calls):
            value = function()
            if not self.asynchronous:
                # Steps of some frameworks on CPUs would not wait for each other.
                self.wait(value)
        self.wait(value)
        return (time.perf_counter() - start) / num_calls
