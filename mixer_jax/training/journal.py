"""Reads a run's metrics one step late, checks them, writes them and shows them."""

import math

import jax

from mixer_jax.errors import NonFiniteError
from mixer_jax.training.metrics import MetricsWriter
from mixer_jax.training.progress import Progress
from mixer_jax.training.setup import AnyScores, Experiment, throughput_metrics
from mixer_jax.training.step import Metrics


class MetricsLogger:
    """Keeps the book of a run.

    A step's metrics are read when the next step is already under way, so the device never waits
    for the host, and the host never runs further ahead than one step.
    """

    def __init__(
        self,
        workdir: str,
        experiment: Experiment,
        first_step: int,
        active: bool,
        window: list[float],
    ):
        """Opens the book.

        Args:
            workdir: absolute path or URL of the run.
            experiment: that is run.
            first_step: steps done when the run begins or is resumed.
            active: whether this host is the one that writes and prints.
            window: what `self.window` was when the run was last saved; empty for a new run.
        """
        self.progress = Progress(first_step, experiment.num_steps, active)
        tensorboard = experiment.config.tensorboard
        self._writer = MetricsWriter(workdir, first_step, active, tensorboard)
        self._experiment = experiment
        # Losses since the last line written, whose mean is written next. Saved with every
        # checkpoint, so that a resumed run writes the same means.
        self.window = list(window)
        self._pending: tuple[int, Metrics] | None = None
        self._timed = False

    def is_due(self, step: int) -> bool:
        """Returns whether the metrics of a step are written down."""
        num_steps = self._experiment.num_steps
        return step % self._experiment.config.log_every_steps == 0 or step == num_steps

    def record(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that has just been started; settles those of the last."""
        self.settle()
        self._pending = (step, metrics)

    def settle(self) -> None:
        """Waits for the recorded step and writes it down if it is due.

        Raises:
            DivergedError: one of its metrics is not a finite number.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.check(step, values)
        self.progress.advance()
        self.window.append(values["loss"])
        due = self.is_due(step)
        if due:
            values["loss"] = math.fsum(self.window) / len(self.window)
            self.window.clear()
        if not self._timed:
            # The first step compiles: the clock starts after it.
            self.progress.restart(step)
            self._timed = True
        elif due:
            steps_per_second = self.progress.lap(step)
            images = steps_per_second * self._experiment.config.batch_size
            rates = throughput_metrics(self._experiment, images)
            self.progress.report(step, values["loss"], steps_per_second, rates["images_per_second"])
            values |= rates
        if due:
            self._writer.write(step, values)

    def check(self, step: int, values: dict[str, float]) -> None:
        """Raises DivergedError unless what was measured at a step are finite numbers."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"{name} is {value} at step {step}")

    def log_eval(self, step: int, name: str, scores: AnyScores) -> None:
        """Writes down and shows the scores of one evaluation."""
        self._writer.write(step, {f"{name}/{key}": x for key, x in scores.as_dict().items()})
        self.progress.say(f"step {step:,}: {name} {scores.format_progress()}")

    def close(self) -> None:
        """Waits until everything is written."""
        self.progress.close()
        self._writer.close()
