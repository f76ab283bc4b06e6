"""Metrics of a run: `metrics.jsonl`, TensorBoard, Weights & Biases, progress on the terminal."""

import collections
import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath
from tqdm import tqdm

from mixer_jax.checkpoints.resolve import METRICS_FILE, read_metrics
from mixer_jax.errors import NonFiniteError, summarize_error
from mixer_jax.files import LineFile
from mixer_jax.training.tracking import WandbRun

EVENTS_FOLDER = "events"
CURVES_FILE = "curves.png"
# Interval at which events are uploaded to object stores, in seconds; on disks they are written
# immediately.
_UPLOAD_INTERVAL = 30.0
# How far a single host may be ahead of its devices, if that is more than one step.
_MAX_SECONDS_AHEAD = 0.01
# Measured by the clock, so they differ between repetitions of a run; everything else is identical.
TIMINGS = ("images_per_second", "images_per_second_per_device", "model_flops_utilization")


class MetricsLogger:
    """Reads the metrics of each step, at least one step late, and checks, writes and prints them.

    Metrics of each step are read after the next step has been dispatched, so that the device never
    waits for the host. The host is one step ahead or, if it is the only one, as many short steps as
    take 10 ms: waking up after each of them would take as long as the step. Several hosts read the
    same step at the same time, so that all of them raise the same error.

    Attributes:
        progress: Progress report on the terminal.
        loss_window: Losses since the last line was written; the next line has their mean. It is
            saved with every checkpoint, so that a resumed run writes the same means.
    """

    def __init__(
        self,
        workdir: str,
        start_step: int,
        num_steps: int,
        *,
        batch_size: int,
        log_every_steps: int,
        throughput_metrics: Callable[[float], dict[str, float]],
        loss_window: list[float],
        is_primary: bool,
        tensorboard: bool,
        wandb_run: WandbRun | None = None,
    ):
        """Opens the metrics of a run that starts or resumes at `start_step`.

        Args:
            workdir: Absolute path or URL of the run.
            start_step: Steps taken before.
            num_steps: Steps of the whole run.
            batch_size: Images per step.
            log_every_steps: Interval of lines; the last step is always written.
            throughput_metrics: Function from images per second to the metrics of throughput.
            loss_window: Saved `loss_window`; empty for a new run.
            is_primary: Whether this process writes and prints.
            tensorboard: Whether to write TensorBoard events.
            wandb_run: Run of Weights & Biases that the metrics are also logged to.
        """
        # Commands import this module before their arguments are checked.
        import jax

        self.progress = Progress(start_step, num_steps, is_primary)
        self.loss_window = list(loss_window)
        self._writer = MetricsWriter(workdir, start_step, is_primary, tensorboard, wandb_run)
        self._num_steps, self._batch_size = num_steps, batch_size
        self._log_every_steps = log_every_steps
        self._throughput_metrics = throughput_metrics
        # Steps that were dispatched and not yet read, and how many the host may be ahead.
        self._pending: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque()
        self._max_ahead = 1
        self._is_single_host = jax.process_count() == 1
        self._has_compiled = False
        # The memory of CPUs is that of the host.
        self._is_copying = jax.default_backend() != "cpu"

    def should_log(self, step: int) -> bool:
        """Returns whether the metrics of this step are written."""
        return step % self._log_every_steps == 0 or step == self._num_steps

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Stores the scalar arrays of a dispatched step, and reads those of earlier ones.

        Raises:
            NonFiniteError: A metric of an earlier step is not finite.
        """
        if self._is_copying:
            for value in metrics.values():
                value.copy_to_host_async()
        self._pending.append((step, metrics))
        while len(self._pending) > self._max_ahead:
            self._read_next()

    def flush_pending(self) -> None:
        """Waits for the recorded steps, checks their metrics, and writes them if they are due.

        Raises:
            NonFiniteError: A metric is not finite.
        """
        while self._pending:
            self._read_next()

    def _read_next(self) -> None:
        step, metrics = self._pending.popleft()
        # Calling float() on arrays takes three times as long.
        values = {name: value.item() for name, value in metrics.items()}
        self.check_finite(step, values)
        self.progress.advance()
        self.loss_window.append(values["loss"])
        is_due = self.should_log(step)
        if is_due:
            values["loss"] = math.fsum(self.loss_window) / len(self.loss_window)
            self.loss_window.clear()
        if not self._has_compiled:
            # The first step includes compilation: the clock starts after it.
            self.progress.restart_clock(step)
            self._has_compiled = True
        elif is_due:
            steps_per_second = self.progress.lap(step)
            if self._is_single_host:
                num_steps = int(steps_per_second * _MAX_SECONDS_AHEAD)
                # Lines are written, and their throughput is measured, when the host reads the
                # step. The bound limits both the delay of a line and the error of its throughput
                # to about a fifth.
                self._max_ahead = max(1, min(num_steps, self._log_every_steps // 5))
            throughput = self._throughput_metrics(steps_per_second * self._batch_size)
            self.progress.report(
                step, values["loss"], steps_per_second, throughput["images_per_second"]
            )
            values |= throughput
        if is_due:
            self._writer.write(step, values)

    def check_finite(self, step: int, values: Mapping[str, float]) -> None:
        """Raises NonFiniteError unless all values of the step are finite."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"{name} must be finite, got {value} at step {step}.")

    def log_eval(self, step: int, name: str, values: Mapping[str, float], text: str) -> None:
        """Writes the metrics of an evaluation, and prints `text`."""
        self._writer.write(step, {f"{name}/{key}": value for key, value in values.items()})
        self.progress.print(f"step {step:,}: {name} {text}")

    def flush(self) -> None:
        """Waits until all lines are written, which a resumed run does not write again."""
        self._writer.flush()

    def close(self) -> None:
        """Waits until everything is written."""
        self.progress.close()
        self._writer.close()


class MetricsWriter:
    """Writer of metrics. Only the primary process writes; in others it does nothing."""

    def __init__(
        self,
        workdir: str,
        start_step: int,
        is_primary: bool,
        tensorboard: bool = True,
        wandb_run: WandbRun | None = None,
    ):
        """Opens the files of a run, dropping what was written after `start_step`."""
        self._is_primary = is_primary
        if not is_primary:
            return
        self._events_folder = str(epath.Path(workdir) / EVENTS_FOLDER)
        self._start_step = start_step
        kept = [line for line in read_metrics(workdir) if line["step"] <= start_step]
        # A finished run that is started again evaluates the same checkpoint.
        self._last_lines = {json.dumps(line) for line in kept if line["step"] == start_step}
        self._file = LineFile(epath.Path(workdir) / METRICS_FILE, map(json.dumps, kept))
        self._background = ThreadPoolExecutor(max_workers=1)
        # Opened with the first values.
        self._events: _EventFile | None = None
        self._has_events = tensorboard
        self._wandb_run = wandb_run

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the values of one step, unless the step at which the run resumed has them."""
        line = json.dumps({"step": step, **values})
        if not self._is_primary or line in self._last_lines:
            return
        self._file.append(line)
        self._background.submit(self._write_events, step, time.time(), values)
        if self._wandb_run is not None:
            self._wandb_run.log(step, values)

    def flush(self) -> None:
        """Waits until all lines of `metrics.jsonl` are written."""
        if self._is_primary:
            self._file.flush()

    def close(self) -> None:
        """Waits until everything is written."""
        if not self._is_primary:
            return
        self._file.close()
        self._background.submit(self._close_events)
        self._background.shutdown(wait=True)

    def _write_events(self, step: int, wall_time: float, values: dict[str, float]) -> None:
        if not self._has_events:
            return
        with self._disable_on_error():
            if self._events is None:
                self._events = _EventFile(self._events_folder, self._start_step)
            self._events.write(step, wall_time, values)

    def _close_events(self) -> None:
        if self._has_events and self._events is not None:
            with self._disable_on_error():
                self._events.close()

    @contextlib.contextmanager
    def _disable_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Not worth ending a run for: metrics.jsonl has the same values.
            self._has_events = False
            reason = summarize_error(error)
            print(f"TensorBoard events are disabled: {reason}", file=sys.stderr)


class _EventFile:
    """File of TensorBoard events, on disks and object stores."""

    def __init__(self, folder: str, start_step: int):
        """Creates a file of a run that starts or resumes at `start_step`."""
        # Imported in the thread that writes, while the device works.
        from tensorboardX import record_writer
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event_pb2, self._summary_pb2 = event_pb2, summary_pb2
        scheme, separator, _ = folder.partition("://")
        self._interval = 0.0
        if separator:
            record_writer.register_writer_factory(scheme, _UploadedFile)
            self._interval = _UPLOAD_INTERVAL
        record_writer.directory_check(folder)
        self._writer = EventsWriter(f"{folder}/events")
        self._flushed_at = time.monotonic()
        # TensorBoard drops later steps of older files, which this run repeats.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(
            event_pb2.Event(wall_time=time.time(), step=start_step + 1, session_log=start)
        )

    def write(self, step: int, wall_time: float, values: Mapping[str, float]) -> None:
        """Writes the values of one step; on object stores, they are uploaded later."""
        value = self._summary_pb2.Summary.Value
        scalars = [value(tag=name, simple_value=number) for name, number in values.items()]
        summary = self._summary_pb2.Summary(value=scalars)
        self._writer.write_event(
            self._event_pb2.Event(wall_time=wall_time, step=step, summary=summary)
        )
        if time.monotonic() - self._flushed_at >= self._interval:
            self._flushed_at = time.monotonic()
            self._writer.flush()

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class _UploadedFile:
    """File of an object store, which is uploaded as a whole, for tensorboardX."""

    def __init__(self, path: str):
        self._path, self._buffer = epath.Path(path), io.BytesIO()

    @staticmethod
    def directory_check(path: str) -> None:
        """Does nothing, as object stores have no folders."""

    @classmethod
    def open(cls, path: str) -> "_UploadedFile":
        """Returns a new file."""
        return cls(path)

    def write(self, data: bytes) -> None:
        """Appends data, without uploading it."""
        self._buffer.write(data)

    def flush(self) -> None:
        """Uploads everything."""
        self._path.write_bytes(self._buffer.getvalue())

    def close(self) -> None:
        """Does nothing, as tensorboardX flushes before."""


class Progress:
    """Progress of a run: a bar on a terminal, lines elsewhere; throughput excludes pauses."""

    def __init__(self, start_step: int, num_steps: int, is_primary: bool):
        """Starts at `start_step` of `num_steps`; prints only in the primary process."""
        self._num_steps, self._is_primary = num_steps, is_primary
        self._bar: tqdm | None = None
        if is_primary and sys.stderr.isatty():
            self._bar = tqdm(initial=start_step, total=num_steps, unit="step", dynamic_ncols=True)
        self.restart_clock(start_step)

    def restart_clock(self, step: int) -> None:
        """Starts measuring the throughput from this step on."""
        self._lap_step, self._lap_start, self._paused = step, time.perf_counter(), 0.0

    def advance(self) -> None:
        """Counts one step."""
        if self._bar is not None:
            self._bar.update()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time of a block from the throughput."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def lap(self, step: int) -> float:
        """Computes the steps per second since the last lap, and starts a new one."""
        seconds = time.perf_counter() - self._lap_start - self._paused
        steps_per_second = (step - self._lap_step) / seconds
        self.restart_clock(step)
        return steps_per_second

    def report(
        self, step: int, loss: float, steps_per_second: float, images_per_second: float
    ) -> None:
        """Prints step, loss, throughput and remaining time."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4g}, {images_per_second:,.0f} images/s")
        elif self._is_primary:
            remaining = _format_duration((self._num_steps - step) / steps_per_second)
            print(
                f"step {step:,}/{self._num_steps:,}  loss {loss:.4g}  "
                f"{images_per_second:,.0f} images/s  {remaining} left",
                flush=True,
            )

    def print(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        elif self._is_primary:
            print(text, flush=True)

    def close(self) -> None:
        """Closes the progress bar."""
        if self._bar is not None:
            self._bar.close()


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
