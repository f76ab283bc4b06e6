"""One fault: a run in a folder of its own that is disturbed, resumed and compared.

Random times and calls are drawn from an undisturbed run.
"""

import dataclasses
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixer_jax.checkpoints.resolve import list_steps
from tests.campaign import runs
from tests.campaign.runs import Folders, LostError, Process, Result
from tests.helpers.faults import Faults
from tests.helpers.images import encode
from tests.helpers.processes import RUN, STEPS, first_reported_step, last_step

# One block compiles faster than two.
SETTINGS = RUN | {"model__num_blocks": 1, "model__stochastic_depth": 0.0}
# A run that resumes may repeat the steps since its last checkpoint. The save of that one may have
# been unfinished; then also those since the one before.
_MAX_REPEATED_STEPS = 2 * SETTINGS["checkpoint__every_steps"] + SETTINGS["log_every_steps"]
# The log may lag behind the run by the steps since the last save, at which it is flushed, and those
# since the last line.
_MAX_UNLOGGED_STEPS = _MAX_REPEATED_STEPS
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
    """The run has ended, undisturbed and correctly, before the fault, or it began after it."""


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
    _references: dict[bool, Reference] = dataclasses.field(default_factory=dict)

    @property
    def cache(self) -> Path:
        """Compiled programs."""
        return self.folder / "cache"

    def reference(self, has_images: bool = False) -> Reference:
        """Returns an undisturbed run, after running it at the first call.

        Args:
            has_images: Whether it trains on image files, instead of a TFDS dataset.

        Raises:
            LostError: It fails, or a second one ends with another result.
        """
        if has_images not in self._references:
            # Compiles all programs, and is compared with the second one.
            first = self._run_undisturbed(has_images, "first")
            second = self._run_undisturbed(has_images, "second")
            if difference := second.result.difference(first.result):
                raise LostError(f"two undisturbed runs differ: {difference}")
            self._references[has_images] = second
        return self._references[has_images]

    def _run_undisturbed(self, has_images: bool, name: str) -> Reference:
        kind = "images" if has_images else "digits"
        folders = Folders(self.folder / f"reference_{kind}" / name, self.cache)
        shutil.rmtree(folders.root, ignore_errors=True)
        folders.create()
        settings = write_images(folders.images) if has_images else SETTINGS
        self.faults.arm(folders.disk)
        start = time.monotonic()
        process = runs.start(folders, "run", self.data_dir, settings)
        progress = [(0.0, 0)]
        while process.wait(_INTERVAL_SECONDS) is None and progress[-1][0] < runs.TIMEOUT_SECONDS:
            progress.append((time.monotonic() - start, self.faults.num_calls))
        if process.finish() != 0:
            raise LostError(f"an undisturbed run fails: {process.err}")
        self.faults.disarm()
        calls = self.faults.count_calls()
        # After the last call, the process only reads what the run has saved.
        progress = [entry for entry in progress if entry[1] < calls.total()]
        return Reference(runs.read_result(folders, process), calls, progress)

    def interrupted_run(self) -> Path:
        """Returns the workdir of a run that was stopped after two checkpoints; do not change it."""
        folders = Folders(self.folder / "interrupted", self.cache)
        if not (folders.root / "done").exists():
            shutil.rmtree(folders.root, ignore_errors=True)
            process = runs.start(folders, "run", self.data_dir, SETTINGS)
            while process.wait(0.01) is None and 30 not in list_steps(str(folders.workdir)):
                pass
            process.send(signal.SIGTERM)
            if process.finish() != 143:
                raise LostError(f"the run to damage was not interrupted: {process.err}")
            (folders.root / "done").touch()
        return folders.workdir


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
        self.settings: dict[str, Any] = SETTINGS
        self._has_images = False
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
        return self.campaign.reference(self._has_images)

    def use_images(self, **changes: Any) -> None:
        """Makes it a run on image files of its own, with changes of its settings."""
        self._has_images = True
        # Now, not while the run is in progress.
        self.campaign.reference(has_images=True)
        self.settings = write_images(self.folders.images) | changes

    def record(self, **parameters: Any) -> None:
        """Adds parameters of the fault to the log."""
        self.parameters |= parameters

    def draw_call(self, names: Sequence[str]) -> int:
        """Draws the index of a random system call, from 1, among those with these names."""
        call = self.rng.randint(1, sum(self.reference.calls[name] for name in names))
        self.record(call=call)
        return call

    def start_until_random_time(self) -> Process:
        """Starts the run, and waits until a random time during it.

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
        self.faults.arm(self.folders.disk)
        process = self.start()
        while self.faults.num_calls < call and process.wait(0.0) is None:
            time.sleep(_POLL_SECONDS)
        deadline = time.monotonic() + delay
        while self.faults.num_calls <= call and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if process.wait(0.0) is not None:
            self.check_undisturbed(process)
        return process

    def start(self, before: Callable[[], object] = lambda: None) -> Process:
        """Starts or resumes the run."""
        self._num_starts += 1
        name = f"start{self._num_starts}"
        return runs.start(self.folders, name, self.campaign.data_dir, self.settings, before)

    def copy_interrupted_run(self) -> None:
        """Makes the workdir a copy of a run that was stopped after two checkpoints."""
        shutil.copytree(self.campaign.interrupted_run(), self.workdir)

    def check_end(self, process: Process, codes: Sequence[int]) -> int:
        """Waits for the end of a disturbed run; returns its exit code.

        Args:
            process: Process of the run.
            codes: Exit codes that are right after the fault, or signals as negative numbers, other
                than 0. With 1 and 2, the run must print one line on standard error; with others
                except `CRASHES`, none.

        Raises:
            LostError: It hangs, prints something else, or ends otherwise.
        """
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

    def resume(self) -> Process:
        """Resumes the run without a fault, to its end.

        Raises:
            LostError: It fails, repeats too many steps, or leaves files behind.
        """
        self.faults.disarm()
        before = last_step(self.workdir)
        process = self.start()
        if process.finish() != 0:
            raise LostError(f"the same command fails: {process.err.strip()}")
        if last_step(self.workdir) > before:
            resumed_from = first_reported_step(process.out)
            self.record(resumed_from=resumed_from)
            if before - resumed_from > _MAX_REPEATED_STEPS:
                raise LostError(f"resumed from step {resumed_from} after step {before}")
        self._check_files(process)
        return process

    def recover(self) -> str:
        """Resumes the run and compares its end with the undisturbed run; returns "recovered".

        Raises:
            LostError: It fails, repeats too many steps, leaves files behind, or differs.
        """
        self.check_result(self.resume())
        return "recovered"

    def check_result(self, process: Process) -> None:
        """Raises LostError if a finished run differs from the undisturbed one."""
        self._check_files(process)
        result = runs.read_result(self.folders, process)
        if difference := result.difference(self.reference.result):
            raise LostError(f"differs from the undisturbed run in its {difference}")

    def check_arrays(self, process: Process) -> None:
        """Raises LostError if the arrays of a finished run differ from the undisturbed one."""
        if runs.read_result(self.folders, process).arrays != self.reference.result.arrays:
            raise LostError("differs from the undisturbed run in its arrays")

    def _check_files(self, process: Process) -> None:
        """Raises LostError if a finished run has printed an error or left files behind."""
        if process.err:
            raise LostError(f"{process.name} has finished and printed an error")
        for path in runs.find_leftovers(self.workdir):
            raise LostError(f"{path.relative_to(self.workdir)} is left behind")
        self.folders.check_outside()

    def check_stopped(self, code: int, step: int) -> None:
        """Raises LostError if a run has finished although a signal should have stopped it.

        Args:
            code: Its exit code.
            step: Last step in its log after the signal was sent.
        """
        if code == 0 and step + _MAX_UNLOGGED_STEPS < STEPS:
            raise LostError(f"finished although it was stopped at about step {step}")

    def check_undisturbed(self, process: Process) -> None:
        """Checks a run that has finished before the fault.

        Raises:
            LostError: It has failed or differs.
            NotInjectedError: It is correct.
        """
        self.check_end(process, [])
        self.check_result(process)
        raise NotInjectedError
