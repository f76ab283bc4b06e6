"""Where a run's numbers go: `metrics.jsonl` at once, and TensorBoard events behind it."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from mixer_jax.errors import UserError
from mixer_jax.files import atomic_write

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "events"
# Measured by the clock, so different each time a run is repeated; all else repeats to the bit.
TIMINGS = ("images_per_second", "images_per_second_per_device", "model_flops_utilization")


def read_metrics(workdir: str) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`; one cut off by a crash is left out."""
    path = epath.Path(workdir) / METRICS_FILE
    lines = path.read_text().split("\n") if path.exists() else []
    # A whole line ends in a newline, so what follows the last one is empty or cut off.
    try:
        return [json.loads(line) for line in lines[:-1]]
    except ValueError as error:
        raise UserError(f"{str(path)!r} has lines that are no JSON; move it away") from error


class MetricsWriter:
    """Writes the metrics of a run. One host of several writes; the others' writers do nothing."""

    def __init__(self, workdir: str, first_step: int, active: bool, tensorboard: bool = True):
        """Opens a run's metrics; a resumed run forgets what it wrote after its checkpoint.

        Args:
            workdir: absolute path or URL of the run.
            first_step: steps done when the run begins or is resumed.
            active: whether this host is the one that writes.
            tensorboard: whether it writes events too.
        """
        self._active = active
        if not active:
            return
        self._events_folder = str(epath.Path(workdir) / EVENTS_FOLDER)
        self._path = epath.Path(workdir) / METRICS_FILE
        kept = [line for line in read_metrics(workdir) if line["step"] <= first_step]
        self._text = "".join(json.dumps(line) + "\n" for line in kept)
        atomic_write(self._path, self._text)
        self._background = ThreadPoolExecutor(max_workers=1)
        # Opened with the first values; False: there are none, or no more.
        self._events: Any = None if tensorboard else False

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the values of one step."""
        if not self._active:
            return
        line = json.dumps({"step": step, **values}) + "\n"
        if "://" in str(self._path):
            # Object stores cannot append; a run's metrics are small enough to be written anew.
            self._text += line
            atomic_write(self._path, self._text)
        else:
            with self._path.open("a") as file:
                file.write(line)
        self._background.submit(self._write_events, step, values)

    def close(self) -> None:
        """Waits until everything is written."""
        if not self._active:
            return
        self._background.shutdown(wait=True)
        if self._events:
            self._events.close()

    def _write_events(self, step: int, values: dict[str, float]) -> None:
        if self._events is False:
            return
        # clu brings TensorFlow, which takes seconds: in this thread, while the device works.
        try:
            if self._events is None:
                from clu import metric_writers

                self._events = metric_writers.SummaryWriter(self._events_folder)
            self._events.write_scalars(step, values)
        except Exception as error:
            # A picture less is no reason to lose a run: metrics.jsonl has the same numbers.
            self._events = False
            print(f"no TensorBoard events from here on: {error}", file=sys.stderr)
