"""XProf trace of some steps of a training run."""

import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from mixer_jax.errors import summarize_error
from mixer_jax.training.metrics import Progress

PROFILE_FOLDER = "profile"


class StepProfiler:
    """Profiler of the steps in a range, whose trace is written to `workdir`/profile.

    Only the primary process has one, since the devices of all hosts run the same program. An error
    of the profiler is printed and does not end the run.
    """

    def __init__(self, steps: range, workdir: str, progress: Progress, start_step: int = 0):
        """Prepares a profile.

        Args:
            steps: Steps to profile; those that the run does not take are skipped.
            workdir: Absolute path or URL of the run.
            progress: Progress report, whose clock stops while the profiler starts and writes.
            start_step: Last step that the run has already taken.
        """
        self._steps, self._progress = steps, progress
        self._target = epath.Path(workdir) / PROFILE_FOLDER
        self._first = self._last = 0
        # The profiler does not write to object stores.
        self._temporary = tempfile.TemporaryDirectory() if "://" in workdir and steps else None
        self._folder = self._temporary.name if self._temporary else str(self._target)
        if steps and steps[-1] <= start_step:
            progress.print(
                f"config.profile_steps must be after step {start_step:,}, the last completed one, "
                f"got '{steps.start}:{steps.stop}'. No profile is written."
            )

    def before_step(self, step: int, state: Any) -> None:
        """Starts the trace if the step is the first one of the range that the run takes.

        Args:
            step: Step that is dispatched next.
            state: State of the run. The trace starts when it is computed, so that the devices do
                not work on earlier steps.
        """
        if self._first or step not in self._steps:
            return
        jax.block_until_ready(state)
        try:
            with self._progress.pause():
                jax.profiler.start_trace(self._folder)
        except Exception as error:
            self._disable(error)
            return
        self._first = step

    def after_step(self, step: int, state: Any) -> None:
        """Writes the trace if the step was the last one of the range, once `state` is computed."""
        if self._first:
            self._last = step
            if step + 1 not in self._steps:
                jax.block_until_ready(state)
                self.close()

    def close(self) -> None:
        """Writes a trace that has started, also if the run ends before the end of the range."""
        if self._first:
            first, self._first, self._steps = self._first, 0, range(0)
            try:
                with self._progress.pause():
                    jax.profiler.stop_trace()
                    self._upload()
            except Exception as error:
                self._disable(error)
            else:
                self._progress.print(
                    f"profile of steps {first:,} to {self._last:,}: {self._target}"
                )
        if self._temporary is not None:
            self._temporary.cleanup()

    def _upload(self) -> None:
        if self._temporary is None:
            return
        for path in Path(self._folder).rglob("*"):
            if path.is_file():
                target = self._target / path.relative_to(self._folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())

    def _disable(self, error: Exception) -> None:
        self._steps = range(0)
        self._progress.print(f"profile {self._target} cannot be written: {summarize_error(error)}.")
