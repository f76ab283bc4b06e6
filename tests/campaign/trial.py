"""One fault: a run in a folder of its own that is disturbed, resumed and compared."""

import contextlib
import dataclasses
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mixer_jax.checkpoints.resolve import list_steps
from tests.campaign import runs
from tests.campaign.preload import Call, Faults
from tests.campaign.runs import Folders, LostError, Process, Result
from tests.helpers.processes import RUN, STEPS, first_reported_step, last_step

# One block compiles faster than two.
SETTINGS = RUN | {"model__num_blocks": 1, "model__stochastic_depth": 0.0}
# A run that resumes may repeat the steps since its last checkpoint. The save of that one may have
# been unfinished; then also those since the one before.
_MAX_REPEATED_STEPS = 2 * SETTINGS["checkpoint__every_steps"] + SETTINGS["log_every_steps"]


class NotInjectedError(Exception):
    """The run has ended, undisturbed and correctly, before the fault."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """Undisturbed run.

    Attributes:
        result: What it ended with.
        seconds: Duration.
        calls: System calls that changed its workdir.
    """

    result: Result
    seconds: float
    calls: tuple[Call, ...]

    def num_calls(self, names: Sequence[str]) -> int:
        """Number of calls with one of these names."""
        return sum(call.name in names for call in self.calls)


@dataclasses.dataclass
class Campaign:
    """What all trials share.

    Attributes:
        folder: Folder of the campaign.
        faults: State of the preload library.
        data_dir: TFDS folder with the digits.
    """

    folder: Path
    faults: Faults
    data_dir: str
    _reference: Reference | None = None

    @property
    def cache(self) -> Path:
        """Compiled programs."""
        return self.folder / "cache"

    def reference(self) -> Reference:
        """Returns the undisturbed run, after running it at the first call.

        Raises:
            LostError: It fails, or a second one ends with another result.
        """
        if self._reference is None:
            # Compiles all programs, and is compared with the second one.
            first = self._run_undisturbed("first")
            self._reference = self._run_undisturbed("second")
            if difference := self._reference.result.difference(first.result):
                raise LostError(f"two undisturbed runs differ: {difference}")
        return self._reference

    def _run_undisturbed(self, name: str) -> Reference:
        folders = Folders(self.folder / "reference" / name, self.cache)
        shutil.rmtree(folders.root, ignore_errors=True)
        self.faults.arm(folders.disk, is_logging=True)
        start = time.monotonic()
        process = runs.start(folders, "run", self.data_dir, SETTINGS)
        if process.finish() != 0:
            raise LostError(f"an undisturbed run fails: {process.err}")
        seconds = time.monotonic() - start
        self.faults.disarm()
        result = runs.read_result(folders, process, STEPS)
        return Reference(result, seconds, tuple(self.faults.read_log()))

    def interrupted_run(self) -> Path:
        """Returns the workdir of a run that was stopped after two checkpoints; do not change it."""
        folders = Folders(self.folder / "interrupted", self.cache)
        if not (folders.root / "done").exists():
            shutil.rmtree(folders.root, ignore_errors=True)
            process = runs.start(folders, "run", self.data_dir, SETTINGS)
            while process.wait(0.01) is None and 30 not in list_steps(str(folders.workdir)):
                pass
            process.send(runs.signal.SIGTERM)
            if process.finish() != 143:
                raise LostError(f"the run to damage was not interrupted: {process.err}")
            (folders.root / "done").touch()
        return folders.workdir


class Trial:
    """One fault.

    Attributes:
        campaign: Campaign of the trial.
        rng: Source of all random parameters.
        index: Index among the faults of its kind.
        folders: Folders of the run.
        parameters: Parameters of the fault, for the log.
    """

    def __init__(self, campaign: Campaign, rng: random.Random, index: int, folder: Path):
        """Starts with an empty folder."""
        self.campaign, self.rng, self.index = campaign, rng, index
        self.folders = Folders(folder, campaign.cache)
        self.parameters: dict[str, Any] = {}
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
        return self.campaign.reference()

    @property
    def timeout(self) -> float:
        """Duration after which a run hangs, in seconds."""
        return max(60.0, 10 * self.reference.seconds)

    def record(self, **parameters: Any) -> None:
        """Adds parameters of the fault to the log."""
        self.parameters |= parameters

    def draw_seconds(self) -> float:
        """Draws a random time during the run."""
        seconds = self.rng.uniform(0, self.reference.seconds)
        self.record(seconds=round(seconds, 3))
        return seconds

    def draw_call(self, names: Sequence[str]) -> int:
        """Draws a random call during the run, among those with these names."""
        call = self.rng.randint(1, self.reference.num_calls(names))
        self.record(call=call)
        return call

    def start(self, before: Callable[[], object] = lambda: None) -> Process:
        """Starts or resumes the run."""
        self._num_starts += 1
        name = f"start{self._num_starts}"
        return runs.start(self.folders, name, self.campaign.data_dir, SETTINGS, before)

    def copy_interrupted_run(self) -> None:
        """Makes the workdir a copy of a run that was stopped after two checkpoints."""
        shutil.copytree(self.campaign.interrupted_run(), self.workdir)

    def check_end(self, process: Process, codes: Sequence[int]) -> int:
        """Waits for the end of a disturbed run; returns its exit code.

        Args:
            process: Process of the run.
            codes: Exit codes that are right after the fault, or signals as negative numbers, other
                than 0. With 1 and 2, the run must print one line on standard error.

        Raises:
            LostError: It hangs, prints a stack trace, or ends otherwise.
        """
        code = process.finish(self.timeout)
        if code in (1, 2):
            self.record(message=process.error_line)
        if code != 0 and code not in codes:
            raise LostError(f"{process.name} ended with {code}")
        if code in (0, 143, 129) and process.err:
            raise LostError(f"{process.name} ended with {code} and an error")
        return code

    def recover(self) -> str:
        """Resumes the run without a fault, and compares its end; returns "recovered".

        Raises:
            LostError: It fails, repeats too many steps, or ends otherwise than the undisturbed run.
        """
        self.faults.disarm()
        before = last_step(self.workdir)
        process = self.start()
        if process.finish(self.timeout) != 0:
            raise LostError(f"the same command fails: {process.err.strip()}")
        if last_step(self.workdir) > before:
            resumed_from = first_reported_step(process.out)
            self.record(resumed_from=resumed_from)
            if before - resumed_from > _MAX_REPEATED_STEPS:
                raise LostError(f"resumed from step {resumed_from} after step {before}")
        self.check_result(process)
        return "recovered"

    def check_result(self, process: Process) -> None:
        """Raises LostError if a finished run differs from the undisturbed one."""
        if process.err:
            raise LostError(f"{process.name} has finished and printed an error")
        result = runs.read_result(self.folders, process, STEPS)
        if difference := result.difference(self.reference.result):
            raise LostError(f"differs from the undisturbed run in its {difference}")
        for path in runs.find_leftovers(self.workdir):
            raise LostError(f"{path.relative_to(self.workdir)} is left behind")
        self.folders.check_outside()

    def check_undisturbed(self, process: Process) -> None:
        """Checks a run that has finished before the fault.

        Raises:
            LostError: It has failed or differs.
            NotInjectedError: It is correct.
        """
        self.check_end(process, [])
        self.check_result(process)
        raise NotInjectedError

    def inode_sizes(self) -> dict[int, int]:
        """Returns the sizes of all files by inode."""
        found = {}
        for path in self.folders.disk.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                found[path.stat().st_ino] = path.stat().st_size
        return found

    def save_log(self, outcome: dict[str, Any]) -> None:
        """Writes the outcome next to the output of the run."""
        (self.folders.root / "outcome.json").write_text(json.dumps(outcome, indent=2) + "\n")
