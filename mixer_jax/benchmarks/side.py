"""One framework's part of a comparison: programs that are made once and timed again and again."""

import abc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from mixer_jax.benchmarks.contestants import Contestant, Setting

# A timing lasts so long at least, or one step.
_LEAST_SECONDS = 0.2
_MOST_STEPS = 1000


class Program(NamedTuple):
    """A contestant, ready to be timed.

    Attributes:
        step: begins one step of the batch, and returns what to wait for.
        one: begins one step of a single image; None: latency is not measured.
    """

    step: Callable[[], Any]
    one: Callable[[], Any] | None


class Costs(NamedTuple):
    """What a contestant costs once.

    Attributes:
        compile_seconds: from lowered program to executable; None: cannot be told apart.
        first_step_seconds: from the function to its first finished step.
        memory_bytes: of a step: state, batch, results and all between; None: not known.
    """

    compile_seconds: float | None
    first_step_seconds: float
    memory_bytes: int | None


class Side(abc.ABC):
    """A framework, its device, and its programs.

    Attributes:
        setting: the work.
        asynchronous: whether the device works while the host goes on.
    """

    def __init__(self, setting: Setting, asynchronous: bool):
        self.setting = setting
        self.asynchronous = asynchronous
        self._programs: dict[str, Program] = {}
        self._counts: dict[str, tuple[int, int]] = {}

    @abc.abstractmethod
    def facts(self) -> dict[str, str]:
        """Returns what is measured on, and with which versions."""

    @abc.abstractmethod
    def make(self, contestant: Contestant, alone: bool) -> tuple[Program, Costs]:
        """Makes a contestant's program and takes its first step.

        Args:
            contestant: of this framework.
            alone: whether to make it for a single image, too.
        """

    @abc.abstractmethod
    def make_product(self) -> tuple[Program, int]:
        """Makes a large square matrix product, and says its FLOPs."""

    @abc.abstractmethod
    def wait(self, value: Any) -> None:
        """Waits until what a step returned is there."""

    @abc.abstractmethod
    def rest(self) -> None:
        """Gives back what memory can be given back to others."""

    def costs(self, contestant: Contestant) -> Costs:
        """Returns what a contestant costs once, and keeps nothing."""
        return self.make(contestant, alone=False)[1]

    def prepare(self, contestant: Contestant) -> Costs:
        """Makes a contestant ready to be timed."""
        program, costs = self.make(contestant, alone=self.setting.mode == "infer")
        self._add(contestant.name, program)
        return costs

    def prepare_product(self, name: str) -> int:
        """Makes the matrix product ready to be timed; returns its FLOPs."""
        program, flops = self.make_product()
        self._add(name, program)
        return flops

    def rate(self, contestant: Contestant, batch_size: int) -> float:
        """Returns a contestant's images a second at another batch size, and keeps nothing."""
        self.setting = self.setting._replace(batch_size=batch_size)
        self.prepare(contestant)
        seconds = statistics.median(self.time(contestant.name) for _ in range(3))
        self._programs.clear()
        return batch_size / seconds

    def time(self, name: str) -> float:
        """Returns seconds a step: many steps, one after the other, timed as one."""
        step, count = self._programs[name].step, self._counts[name][0]
        if self.asynchronous:
            # The device may have rested, and its memory may have been given back.
            self._seconds(step, 1)
        seconds = self._seconds(step, count)
        self.rest()
        return seconds

    def latencies(self, name: str) -> list[float]:
        """Returns the seconds of single calls, each from one image to its logits."""
        one, count = self._programs[name].one, self._counts[name][1]
        if one is None:
            return []
        self._seconds(one, 1)
        found = [self._seconds(one, 1) for _ in range(count)]
        self.rest()
        return found

    def _add(self, name: str, program: Program) -> None:
        self._programs[name] = program
        alone = self._count(program.one) if program.one else 0
        self._counts[name] = (self._count(program.step), alone)
        self.rest()

    def _count(self, step: Callable[[], Any]) -> int:
        """Returns how many steps last long enough."""
        count = 1
        for _ in range(3 if self.asynchronous else 1):
            seconds = self._seconds(step, count)
            count = min(max(math.ceil(_LEAST_SECONDS / seconds), 1), _MOST_STEPS)
        return count

    def _seconds(self, step: Callable[[], Any], count: int) -> float:
        """Times steps, and returns the mean."""
        start = time.perf_counter()
        for _ in range(count):
            value = step()
            if not self.asynchronous:
                # Nor would the steps of some frameworks wait for each other.
                self.wait(value)
        self.wait(value)
        return (time.perf_counter() - start) / count
