"""Tests of the best checkpoint and of early stopping as functions of logged values."""

import dataclasses
import math

import pytest

from mixer_jax.checkpoints.best import MetricHistory, format_metric, has_stopped_early
from mixer_jax.config.schema import CheckpointConfig, EvalConfig, RunConfig


def history_of(values: list[float], name: str = "val/top1", every_steps: int = 10) -> MetricHistory:
    steps = range(every_steps, every_steps * len(values) + 1, every_steps)
    lines = [{"step": s, name: v, "loss": 0.1} for s, v in zip(steps, values, strict=True)]
    return MetricHistory(name, lines)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("val/top1", [0.1, 0.3, 0.2], 20),
        ("val/log_likelihood", [-2.0, -1.0, -3.0], 20),
        ("val/calibration_error", [0.3, 0.1, 0.2], 20),
        ("val/loss", [0.3, 0.1, 0.2], 20),
        # Of several, the earliest.
        ("val/top1", [0.1, 0.3, 0.3], 20),
        ("val/loss", [0.1, 0.1, 0.3], 10),
        # Values that are not finite are never best.
        ("val/loss", [math.nan, 0.1, -math.inf], 20),
        ("val/top1", [math.nan, math.inf], None),
        ("val/top1", [], None),
    ],
)
def test_best_step(name: str, values: list[float], expected: int | None) -> None:
    assert history_of(values, name).best_step() == expected


def test_best_step_is_chosen_from_the_given_steps() -> None:
    history = history_of([0.1, 0.9, 0.5, 0.7])
    assert history.best_step([40, 30, 10]) == 40
    assert history.best_step([5, 45]) is None
    assert MetricHistory("", [{"step": 1, "": 1.0}]).best_step() is None


def test_the_first_value_of_a_step_counts() -> None:
    history = history_of([0.5, 0.4])
    history.add(20, 0.6)
    assert history.best_step() == 10


@pytest.mark.parametrize(
    ("values", "min_delta", "expected"),
    [
        ([], 0.0, 0),
        ([0.5], 0.0, 0),
        ([0.5, 0.5, 0.4], 0.0, 2),
        ([0.5, 0.4, 0.6, 0.6], 0.0, 1),
        # Steps of less than min_delta add up, because they do not move what is improved on.
        ([0.5, 0.54, 0.58, 0.62, 0.63], 0.1, 1),
        ([0.5, math.nan, math.inf], 0.0, 2),
        ([math.nan, 0.1], 0.0, 0),
    ],
)
def test_evaluations_without_improvement(
    values: list[float], min_delta: float, expected: int
) -> None:
    history = history_of(values)
    assert history.count_evals_without_improvement(10, min_delta) == expected
    # Smaller is better for a loss.
    history = history_of([-value for value in values], "val/loss")
    assert history.count_evals_without_improvement(10, min_delta) == expected


def test_values_between_two_evaluations_are_no_evaluations() -> None:
    history = history_of([0.5, 0.4])
    history.add(25, 0.9)
    assert history.count_evals_without_improvement(10, 0.0) == 1
    assert history.best_step() == 25


def test_has_stopped_early_after_patience() -> None:
    config = RunConfig(
        checkpoint=CheckpointConfig(best_metric="val/top1"),
        evals={"val": EvalConfig(every_steps=10)},
        early_stopping_patience=2,
    )
    values = [0.1, 0.3, 0.2, 0.3, 0.4]
    stopped = [has_stopped_early(config, history_of(values[:n])) for n in range(6)]
    assert stopped == [False] * 4 + [True, False]
    patient = dataclasses.replace(config, early_stopping_patience=3)
    assert not has_stopped_early(patient, history_of(values[:4]))
    strict = dataclasses.replace(config, early_stopping_min_delta=0.25)
    assert has_stopped_early(strict, history_of(values[:3]))
    off = dataclasses.replace(config, early_stopping_patience=0)
    assert not has_stopped_early(off, history_of([0.1] * 9))


def test_format_metric() -> None:
    assert format_metric("val/top1", 0.98765) == "val/top1 98.77%"
    assert format_metric("val/10_shot", 0.5) == "val/10_shot 50.00%"
    assert format_metric("val/log_likelihood", -0.12345) == "val/log_likelihood -0.1235"
