"""One fault: a run in a folder of its own that is disturbed, resumed and compared.

Random times and calls are drawn from an undisturbed run.
"""

import dataclasses
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mixer_jax.training import loop
from tests.campaign import runs
from tests.campaign.runs import Folders, LostError, Process, Result, Run
from tests.helpers.faults import Faults
from tests.helpers.images import encode
from tests.helpers.processes import RUN, first_reported_step, last_step

# One block compiles faster than two.
SETTINGS = RUN | {"model__num_blocks": 1, "model__stochastic_depth": 0.0}
# All hosts write a part of each array. Hosts that share cores need more time for a step.
HOST_SETTINGS = SETTINGS | {
    "num_steps": 20,
    "log_every_steps": 2,
    "checkpoint__every_steps": 5,
    "evals__test__every_steps": 10,
    "recipe__ema_decay": 0.0,
    "distributed_timeout": runs.HEARTBEAT_TIMEOUT_SECONDS,
}
# Signals by which libraries end a process that has no memory left.
CRASHES = (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)

# A run on image files in `Folders.images`, of which none may be bad.
IMAGE_SETTINGS = SETTINGS | {
    "bad_images__max_count": 0,
    "bad_images__max_fraction": 0.0,
    "preprocess__max_shift": 0,
}
_NUM_IMAGES = 80
# Interval of `Reference.progress`.
_INTERVAL_SECONDS = 0.01
_POLL_SECONDS = 0.002


class NotInjectedError(Exception):
    """A fault has not been injected, for the reason in the message; the run is correct."""


class Kind(NamedTuple):
    """Kind of faults.

    Attributes:
        description: Row of the table.
        inject: Function that disturbs a run, checks how it ends, resumes it, and returns
            "recovered" or "refused".
        weight: Relative number of faults.
    """

    description: str
    inject: Callable[["Trial"], str]
    weight: float = 1.0


class RunType(NamedTuple):
    """Type of an undisturbed run.

    Attributes:
        has_images: Whether it trains on image files, instead of a TFDS dataset.
        num_hosts: Number of hosts.
        is_resumed: Whether it resumes a run that was stopped after two checkpoints.
    """

    has_images: bool = False
    num_hosts: int = 1
    is_resumed: bool = False

    def __str__(self) -> str:
        data = "images" if self.has_images else "digits"
        start = "resumed" if self.is_resumed else "new"
        return f"{data}_{start}_{self.num_hosts}"

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of a run, without those of image files."""
        return SETTINGS if self.num_hosts == 1 else HOST_SETTINGS | {"mesh__fsdp": self.num_hosts}


@dataclasses.dataclass(frozen=True)
class Reference:
    """Undisturbed run.

    Attributes:
        result: What it ended with.
        calls: Number of system calls that change files, by name.
        progress: Time since the start in seconds, and number of these calls so far; at equal
            intervals until the last one.
    """

    result: Result
    calls: Counter[str]
    progress: Sequence[tuple[float, int]]


@dataclasses.dataclass
class Campaign:
    """State that all trials share.

    Attributes:
        folder: Folder of the campaign.
        faults: State of the preload library.
        data_dir: TFDS folder with the digits.
    """

    folder: Path
    faults: Faults
    data_dir: str
    _references: dict[RunType, Reference] = dataclasses.field(default_factory=dict)

    @property
    def cache(self) -> Path:
        """Compiled programs."""
        return self.folder / "cache"

    def reference(self, run_type: RunType) -> Reference:
        """Returns an undisturbed run, after running it at the first call.

        Raises:
            LostError: It fails, or a second one, or one that resumes, ends with another result.
        """
        if run_type not in self._references:
            # Compiles all programs, and is compared with the second one.
            first = self._run_undisturbed(run_type, "first")
            second = self._run_undisturbed(run_type, "second")
            expected = first.result
            if run_type.is_resumed:
                expected = self.reference(run_type._replace(is_resumed=False)).result
            for run in (first, second):
                if difference := run.result.difference(expected):
                    raise LostError(f"undisturbed runs differ: {difference}")
            self._references[run_type] = second
        return self._references[run_type]

    def _run_undisturbed(self, run_type: RunType, name: str) -> Reference:
        folders = Folders(self.folder / f"reference_{run_type}" / name, self.cache)
        shutil.rmtree(folders.root, ignore_errors=True)
        folders.create()
        settings = write_images(folders.images) if run_type.has_images else run_type.settings
        if run_type.is_resumed:
            shutil.copytree(self.interrupted_run(run_type.num_hosts), folders.workdir)
        self.faults.arm(folders.disk)
        start = time.monotonic()
        run = self.start(folders, "run", settings, run_type.num_hosts)
        progress = [(0.0, 0)]
        while run.wait(_INTERVAL_SECONDS) is None and progress[-1][0] < runs.TIMEOUT_SECONDS:
            progress.append((time.monotonic() - start, self.faults.num_calls))
        if run.finish() != 0:
            raise LostError(f"an undisturbed run fails: {run.err}")
        self.faults.disarm()
        calls = self.faults.count_calls()
        # After the last call, the process only reads what the run has saved.
        progress = [entry for entry in progress if entry[1] < calls.total()]
        return Reference(runs.read_result(folders, run), calls, progress)

    def interrupted_run(self, num_hosts: int = 1) -> Path:
        """Returns the workdir of a run that was stopped after two checkpoints; do not change it."""
        folders = Folders(self.folder / f"interrupted_{num_hosts}", self.cache)
        if not (folders.root / "done").exists():
            shutil.rmtree(folders.root, ignore_errors=True)
            settings = RunType(num_hosts=num_hosts).settings
            stop_step = settings["num_steps"] // 2 + 2
            run = self.start(
                folders, "run", settings, num_hosts, lambda host: _stop_after(stop_step)
            )
            if run.finish() != 143:
                raise LostError(f"the run to resume was not interrupted: {run.err}")
            (folders.root / "done").touch()
        return folders.workdir

    def start(
        self,
        folders: Folders,
        name: str,
        settings: Mapping[str, Any],
        num_hosts: int,
        before: Callable[[int], object] = lambda host: None,
    ) -> Run:
        """Starts or resumes a run on one or several hosts."""
        if num_hosts > 1:
            return runs.start_hosts(folders, name, self.data_dir, settings, num_hosts, before)
        process = runs.start(folders, name, self.data_dir, settings, lambda: before(0))
        return Run(name, [process])


def _stop_after(stop_step: int) -> None:
    """Lets a run in this process receive SIGTERM after a step."""
    take_step = loop.TrainLoop.take_step

    def take_last_step(self: Any, step: int, batch: Any) -> None:
        take_step(self, step, batch)
        if step == stop_step:
            os.kill(os.getpid(), signal.SIGTERM)

    loop.TrainLoop.take_step = take_last_step  # type: ignore[method-assign]


def write_images(folder: Path) -> dict[str, Any]:
    """Writes image files of two classes; returns the settings of a run on them."""
    rng = np.random.default_rng(0)
    for split, count in (("train", _NUM_IMAGES), ("test", 20)):
        for index in range(count):
            path = folder / split / f"{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(rng.integers(256, size=(16, 16, 3), dtype=np.uint8), "PNG"))
    return IMAGE_SETTINGS | {"dataset__name": f"folder:{folder}"}


class Trial:
    """One fault.

    Attributes:
        campaign: Campaign of the trial.
        rng: Source of all random parameters.
        index: Index among the faults of its kind.
        folders: Folders of the run.
        parameters: Parameters of the fault, for the log.
        settings: Settings of the run.
    """

    def __init__(self, campaign: Campaign, rng: random.Random, index: int, folder: Path):
        """Starts with an empty folder."""
        self.campaign, self.rng, self.index = campaign, rng, index
        self.folders = Folders(folder, campaign.cache)
        self.parameters: dict[str, Any] = {}
        self._type = RunType()
        self.settings = self._type.settings
        self._is_on_one_host = False
        self._num_starts = 0
        shutil.rmtree(folder, ignore_errors=True)
        self.folders.create()

    @property
    def faults(self) -> Faults:
        """State of the preload library."""
        return self.campaign.faults

    @property
    def workdir(self) -> Path:
        """Workdir of the run."""
        return self.folders.workdir

    @property
    def reference(self) -> Reference:
        """Undisturbed run."""
        return self.campaign.reference(self._type)

    def use_images(self, **changes: Any) -> None:
        """Makes it a run on image files of its own, with changes of its settings."""
        self._change_type(has_images=True)
        self.settings = write_images(self.folders.images) | changes

    def use_hosts(self, num_hosts: int) -> None:
        """Makes it a run on several hosts."""
        self._change_type(num_hosts=num_hosts)

    def use_one_host(self) -> None:
        """Makes a run on several hosts resume on one, with the devices of all."""
        self._is_on_one_host = True

    def draw_start(self) -> None:
        """Makes it a new run or, with the same probability, one that resumes."""
        is_resumed = self.rng.random() < 0.5
        self.record(is_resumed=is_resumed)
        if is_resumed:
            self.copy_interrupted_run()

    def copy_interrupted_run(self) -> None:
        """Makes it a run that resumes one that was stopped after two checkpoints."""
        self._change_type(is_resumed=True)
        shutil.copytree(self.campaign.interrupted_run(self.num_hosts), self.workdir)

    def _change_type(self, **changes: Any) -> None:
        self._type = self._type._replace(**changes)
        self.settings = self._type.settings
        # Now, not while the run is in progress.
        self.campaign.reference(self._type)

    @property
    def num_hosts(self) -> int:
        """Number of hosts of the run."""
        return self._type.num_hosts

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.settings["num_steps"]

    @property
    def max_repeated_steps(self) -> int:
        """Steps that a run which resumes may repeat: those since its last checkpoint.

        The save of that one may have been unfinished; then also those since the one before. The log
        may lag behind the run by the steps since the last save, at which it is flushed, and those
        since the last line.
        """
        return 2 * self.settings["checkpoint__every_steps"] + self.settings["log_every_steps"]

    def record(self, **parameters: Any) -> None:
        """Adds parameters of the fault to the log."""
        self.parameters |= parameters

    def draw_call(self, names: Sequence[str]) -> int:
        """Draws the index of a random system call, from 1, among those with these names."""
        call = self.rng.randint(1, sum(self.reference.calls[name] for name in names))
        self.record(call=call)
        return call

    def start_until_random_time(self) -> Run:
        """Starts the run, and waits until a random time during it; see `wait_for_random_time`."""
        self.faults.arm(self.folders.disk)
        run = self.start()
        self.wait_for_random_time(run)
        return run

    def wait_for_random_time(self, run: Run) -> None:
        """Waits until a random time during a run that has started after `faults` was armed.

        The time is drawn uniformly from the undisturbed run, and expressed by the last system call
        before it and a delay, which the next call ends. So it does not depend on how busy the
        machine is, now or then.

        Raises:
            LostError: The run has ended before, and has failed or differs.
            NotInjectedError: The run has ended before, and is correct.
        """
        progress = self.reference.progress
        seconds, call = self.rng.choice(progress)
        delay = seconds - next(start for start, calls in progress if calls == call)
        self.record(after_call=call, delay_seconds=round(delay, 3))
        while self.faults.num_calls < call and run.wait(0.0) is None:
            time.sleep(_POLL_SECONDS)
        deadline = time.monotonic() + delay
        while self.faults.num_calls <= call and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if run.wait(0.0) is not None:
            self.check_undisturbed(run)

    def start(self, before: Callable[[int], object] = lambda host: None) -> Run:
        """Starts or resumes the run; calls a function on each host before, with its index."""
        self._num_starts += 1
        name = f"start{self._num_starts}"
        if not self._is_on_one_host:
            return self.campaign.start(self.folders, name, self.settings, self.num_hosts, before)

        def use_devices(host: int) -> None:
            jax.config.update("jax_num_cpu_devices", self.num_hosts)
            before(host)

        return self.campaign.start(self.folders, name, self.settings, 1, use_devices)

    def check_end(self, run: Run, codes: Sequence[int]) -> int:
        """Waits for the end of a disturbed run; returns its exit code.

        Args:
            run: The run, whose hosts all must end with the same code.
            codes: Exit codes that are right after the fault, or signals as negative numbers, other
                than 0. With 1 and 2, each host must print one line on standard error; with others
                except `CRASHES`, none.

        Raises:
            LostError: It hangs, prints something else, or ends otherwise.
        """
        found = {self._check_process_end(process, codes) for process in run.processes}
        if len(found) > 1:
            raise LostError(f"the hosts of {run.name} ended with {found}")
        return found.pop()

    def _check_process_end(self, process: Process, codes: Sequence[int]) -> int:
        code = process.finish()
        if code in (1, 2):
            self.record(message=process.error_line)
        if code != 0 and code not in codes:
            raise LostError(f"{process.name} ended with {code}")
        # Ctrl-C before the run handles signals.
        is_interrupted = code == 130 and process.err == "interrupted\n"
        if process.err and code not in (1, 2, *CRASHES) and not is_interrupted:
            raise LostError(f"{process.name} ended with {code} and printed an error")
        return code

    def resume(self) -> Run:
        """Resumes the run without a fault, to its end.

        Raises:
            LostError: It fails, repeats too many steps, or leaves files behind.
        """
        self.faults.disarm()
        before = last_step(self.workdir)
        run = self.start()
        if run.finish() != 0:
            raise LostError(f"the same command fails: {run.err.strip()}")
        if last_step(self.workdir) > before:
            resumed_from = first_reported_step(run.out)
            self.record(resumed_from=resumed_from)
            if before - resumed_from > self.max_repeated_steps:
                raise LostError(f"resumed from step {resumed_from} after step {before}")
        self._check_files(run)
        return run

    def recover(self) -> str:
        """Resumes the run and compares its end with the undisturbed run; returns "recovered".

        Raises:
            LostError: It fails, repeats too many steps, leaves files behind, or differs.
        """
        self.check_result(self.resume())
        return "recovered"

    def check_result(self, run: Run) -> None:
        """Raises LostError if a finished run differs from the undisturbed one."""
        self._check_files(run)
        result = runs.read_result(self.folders, run)
        if difference := result.difference(self.reference.result):
            raise LostError(f"differs from the undisturbed run in its {difference}")

    def check_arrays(self, run: Run) -> None:
        """Raises LostError if the arrays of a finished run differ from the undisturbed one."""
        if runs.read_result(self.folders, run).arrays != self.reference.result.arrays:
            raise LostError("differs from the undisturbed run in its arrays")

    def _check_files(self, run: Run) -> None:
        """Raises LostError if a finished run has printed an error or left files behind."""
        if run.err:
            raise LostError(f"{run.name} has finished and printed an error")
        for path in runs.find_leftovers(self.workdir):
            raise LostError(f"{path.relative_to(self.workdir)} is left behind")
        self.folders.check_outside()

    def check_stopped(self, code: int, step: int) -> None:
        """Raises LostError if a run has finished although a signal should have stopped it.

        Args:
            code: Its exit code.
            step: Last step in its log after the signal was sent.
        """
        if code == 0 and step + self.max_repeated_steps < self.num_steps:
            raise LostError(f"finished although it was stopped at about step {step}")

    def check_undisturbed(self, run: Run) -> None:
        """Checks a run that has finished before the fault.

        Raises:
            LostError: It has failed or differs.
            NotInjectedError: It is correct.
        """
        if (code := run.finish()) != 0:
            raise LostError(f"{run.name} ended with {code} before the fault")
        self.check_result(run)
        raise NotInjectedError("the run had ended before")
