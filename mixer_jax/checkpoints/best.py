"""Best checkpoint of a run, and early stopping, by a metric of one of its evaluations.

Both are functions of the logged values alone, so that a run that was killed and resumed keeps the
same checkpoint and stops at the same step as one that was not.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from mixer_jax.config.schema import RunConfig

# Step of a run's checkpoint, or the one with the best `checkpoint.best_metric`.
Step = int | Literal["best"]
BEST: Literal["best"] = "best"
# Metrics that are better the smaller they are.
_SMALLER_IS_BETTER = ("loss", "calibration_error")
# Metrics that are formatted as percentages, besides the accuracies of few-shot probes.
_FRACTIONS = (
    "top1",
    "top5",
    "calibration_error",
    "mean_average_precision",
    "micro_average_precision",
    "linear",
    "knn",
)


class BestCheckpoint(NamedTuple):
    """Checkpoint with the best value of a metric; of several equal ones, the earliest.

    Attributes:
        metric: Name as in metrics.jsonl, e.g. "validation/top1".
    """

    step: int
    metric: str
    value: float


class MetricHistory:
    """Values of an evaluation metric by step.

    Attributes:
        name: Name as in metrics.jsonl, e.g. "validation/top1"; "" for none.
        values: Values by step, in order.
    """

    def __init__(self, name: str, lines: Iterable[Mapping[str, Any]] = ()):
        """Collects the values of a metric from the lines of metrics.jsonl."""
        self.name = name
        self.values: dict[int, float] = {}
        for line in lines:
            if name and name in line:
                self.add(line["step"], line[name])

    def add(self, step: int, value: float) -> None:
        """Adds the value of a step.

        If the checkpoint of a step is evaluated again, the first value counts: other devices may
        round differently, which must not change which checkpoint is best.
        """
        self.values.setdefault(step, float(value))

    def best_step(self, steps: Iterable[int] | None = None) -> int | None:
        """Returns the earliest step with the best value; None if no value is finite.

        Args:
            steps: Steps to choose from; None: all.
        """
        candidates = self.values if steps is None else sorted(self.values.keys() & {*steps})
        finite = [step for step in candidates if math.isfinite(self.values[step])]
        return max(finite, key=lambda step: self._rank(self.values[step]), default=None)

    def best_checkpoint(self, steps: Iterable[int]) -> BestCheckpoint | None:
        """Returns the best of the checkpoints of some steps; None if none has a finite value."""
        step = self.best_step(steps)
        return None if step is None else BestCheckpoint(step, self.name, self.values[step])

    def count_evals_without_improvement(self, every_steps: int, min_delta: float) -> int:
        """Counts the evaluations since the last one that improved by more than `min_delta`.

        Args:
            every_steps: Interval of the evaluation. Values at other steps do not count; they are
                from the last step of a run that was then continued.
            min_delta: Smallest difference to the value of the last improvement that is one itself.
        """
        count, best = 0, -math.inf
        for step, value in self.values.items():
            if step % every_steps:
                continue
            rank = self._rank(value) if math.isfinite(value) else -math.inf
            if rank > best + min_delta:
                count, best = 0, rank
            else:
                count += 1
        return count

    def _rank(self, value: float) -> float:
        is_smaller_better = self.name.rpartition("/")[2] in _SMALLER_IS_BETTER
        return -value if is_smaller_better else value


def has_stopped_early(config: RunConfig, history: MetricHistory) -> bool:
    """Returns whether a run stops early after the logged values of `checkpoint.best_metric`."""
    if not config.early_stopping_patience:
        return False
    every_steps = config.evals[history.name.rpartition("/")[0]].every_steps
    count = history.count_evals_without_improvement(every_steps, config.early_stopping_min_delta)
    return count >= config.early_stopping_patience


def format_metric(name: str, value: float) -> str:
    """Formats a metric with its name, e.g. "validation/top1 97.22%"."""
    return f"{name} {format_value(name, value)}"


def format_value(name: str, value: float) -> str:
    """Formats the value of a metric, fractions as percentages."""
    return f"{value:.2%}" if is_fraction(name) else f"{value:.4f}"


def is_fraction(name: str) -> bool:
    """Returns whether a metric is a fraction, such as an accuracy or mean average precision."""
    metric = name.rpartition("/")[2]
    return metric in _FRACTIONS or metric.endswith("_shot")
