"""What a person sees of a run: a progress bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Progress:
    """Reports steps, throughput and the time left; leaves evaluation and saving out of the rate."""

    def __init__(self, first_step: int, num_steps: int, active: bool):
        """Begins at `first_step` of `num_steps`; without `active`, reports nothing."""
        self._num_steps, self._active = num_steps, active
        self._bar: tqdm | None = None
        if active and sys.stderr.isatty():
            self._bar = tqdm(initial=first_step, total=num_steps, unit="step", dynamic_ncols=True)
        self.restart(first_step)

    def restart(self, step: int) -> None:
        """Starts the clock anew."""
        self._lap_step, self._lap_start, self._paused = step, time.perf_counter(), 0.0

    def advance(self) -> None:
        """Counts one step."""
        if self._bar is not None:
            self._bar.update()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves the time spent inside out of the throughput."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def lap(self, step: int) -> float:
        """Returns steps a second since the last lap."""
        seconds = time.perf_counter() - self._lap_start - self._paused
        rate = (step - self._lap_step) / seconds
        self.restart(step)
        return rate

    def report(
        self, step: int, loss: float, steps_per_second: float, images_per_second: float
    ) -> None:
        """Shows where the run stands."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4g}, {images_per_second:,.0f} images/s")
        elif self._active:
            left = _duration((self._num_steps - step) / steps_per_second)
            print(
                f"step {step:,}/{self._num_steps:,}  loss {loss:.4g}  "
                f"{images_per_second:,.0f} images/s  {left} left",
                flush=True,
            )

    def say(self, text: str) -> None:
        """Prints a line for people, past the progress bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        elif self._active:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the progress bar."""
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
