"""The contestants of one comparison in their processes, and how these share a device's memory."""

import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from mixer_jax.benchmarks.contestants import OURS, Contestant, Setting
from mixer_jax.benchmarks.outputs import say
from mixer_jax.benchmarks.workers import FailedError, Worker

JAX, TORCH = "jax", "torch"


class Field:
    """Contestants, each ready to be timed or failed.

    Attributes:
        contestants: all of them.
        costs: of those that were prepared, in a process of their own and for the first time.
        first_steps: seconds to their first step in a later process, which finds what of it XLA
            compiled; of JAX's contestants that were timed.
        failed: why the others were not, or did not go on, by name.
        apart: frameworks whose process ends before the other's works, and starts anew afterwards,
            because there is not enough memory for both.
    """

    def __init__(
        self,
        setting: Setting,
        contestants: Sequence[Contestant],
        platform: str,
        folder: str,
    ):
        """Takes who is compared, at what.

        Args:
            setting: the work.
            contestants: all, the first of them JAX's.
            platform: as JAX calls it.
            folder: empty, for what is compiled: a process that is started anew finds it there.
        """
        self.contestants = list(contestants)
        self.costs: dict[str, dict[str, Any]] = {}
        self.first_steps: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self.apart: set[str] = set()
        self._products: dict[str, str] = {}
        self._setting, self._folder = setting, folder
        environments = {JAX: _jax_environment(folder), TORCH: _torch_environment(folder)}
        self._workers = {
            name: Worker(name, setting, platform, environments[name])
            for name in (JAX, TORCH)
            if any(contestant.framework == name for contestant in contestants)
        }

    def __enter__(self) -> "Field":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers.values():
            worker.stop()

    @property
    def frameworks(self) -> list[str]:
        """Those that have contestants, JAX first."""
        return list(self._workers)

    def names(self, framework: str) -> list[str]:
        """Returns the contestants of a framework that can be timed."""
        return [
            c.name
            for c in self.contestants
            if c.framework == framework and c.name in self.costs and c.name not in self.failed
        ]

    def prepare(self, num_rounds: int = 1) -> None:
        """Makes all contestants ready, or notes why not.

        Args:
            num_rounds: how often JAX's are compiled anew; costs are the medians.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        for number in range(num_rounds):
            for contestant in self.contestants:
                if contestant.name in self.failed or (number and contestant.framework == TORCH):
                    continue
                say(f"{self._setting.mode}: {contestant.name} is made")
                try:
                    costs = self._prepare_first(contestant, number)
                except FailedError as error:
                    self.fail(contestant.name, error)
                else:
                    found.setdefault(contestant.name, []).append(costs)
        self.costs = {name: _medians(costs) for name, costs in found.items()}

    def _prepare_first(self, contestant: Contestant, number: int) -> dict[str, Any]:
        if contestant.framework == TORCH:
            return dict(self.ask(TORCH, "prepare", contestant=contestant))
        # In a process and with a cache of its own: what XLA learns by compiling one, it would know
        # when it compiles the next, which may even be the same program.
        with tempfile.TemporaryDirectory() as own:
            with Worker(JAX, self._setting, environment=_jax_environment(own)) as worker:
                costs = dict(worker.ask("costs", contestant=contestant))
            if number == 0:
                shutil.copytree(own, self._folder, dirs_exist_ok=True)
        return costs

    def prepare_product(self, framework: str, name: str) -> int:
        """Makes a framework's matrix product ready, and returns its FLOPs."""
        flops: int = self.ask(framework, "prepare_product", name=name)
        self._products[framework] = name
        return flops

    def fail(self, name: str, error: FailedError) -> None:
        """Notes that a contestant cannot be measured."""
        self.failed.setdefault(name, str(error))
        if name.startswith(OURS) and not error.out_of_memory:
            # A mistake of ours, and where.
            print(error.trace, file=sys.stderr)

    def ask(self, framework: str, do: str, **arguments: Any) -> Any:
        """Asks a framework's process, which is started, or started anew, where it is not there.

        Raises:
            FailedError: it failed.
        """
        for other in self.apart - {framework}:
            self._workers[other].stop()
        try:
            return self._ask(framework, do, arguments)
        except FailedError as error:
            others = [o for o in self._others(framework) if self._workers[o].running]
            if not (error.out_of_memory and others):
                raise
        told = f"{framework} and {others[0]} do not fit together: {others[0]}'s process starts anew"
        print(f"{told} in every round", file=sys.stderr)
        self.apart.update(others)
        for name in (framework, *others):
            self._workers[name].stop()
        return self._ask(framework, do, arguments)

    def _ask(self, framework: str, do: str, arguments: dict[str, Any]) -> Any:
        if not self._workers[framework].running:
            self._prepare_again(framework)
        return self._workers[framework].ask(do, **arguments)

    def _others(self, framework: str) -> list[str]:
        return [name for name in self._workers if name != framework]

    def _prepare_again(self, framework: str) -> None:
        """Starts a process and makes ready what was ready in one before."""
        worker = self._workers[framework]
        for contestant in self.contestants:
            if contestant.name not in self.names(framework):
                continue
            try:
                costs = worker.ask("prepare", contestant=contestant)
            except FailedError as error:
                if error.out_of_memory and any(
                    self._workers[other].running for other in self._others(framework)
                ):
                    raise
                self.fail(contestant.name, error)
                if not worker.running:
                    # It took the others with it.
                    self._prepare_again(framework)
                    return
            else:
                self.first_steps.setdefault(contestant.name, costs["first_step_seconds"])
        if framework in self._products:
            worker.ask("prepare_product", name=self._products[framework])


def _medians(costs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the median of every cost, None where it is not known."""
    return {
        name: None if None in values else statistics.median(values)
        for name in costs[0]
        for values in [[cost[name] for cost in costs]]
    }


def _jax_environment(folder: str) -> dict[str, str]:
    return {
        "JAX_COMPILATION_CACHE_DIR": f"{folder}/xla",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # Whole programs only: what is known of parts of them would speed up others.
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
    }


def _torch_environment(folder: str) -> dict[str, str]:
    return {
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TRITON_CACHE_DIR": f"{folder}/triton",
    }
