"""Tests of the cost of a model: search for the batch size, and duration of training."""

import jax
import numpy as np
import pytest

from mixer_jax.suites import throughput
from mixer_jax.suites.throughput import search_batch_size
from tests.helpers.random_weights import random_weights


def test_search_batch_size_stops_when_larger_batches_are_slower() -> None:
    seconds = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0, 32: 1.9, 64: 4.0, 128: 8.0}
    measured = []

    def seconds_per_batch(batch_size: int) -> float:
        measured.append(batch_size)
        return seconds[batch_size]

    assert search_batch_size(seconds_per_batch) == (32 / 1.9, 32)
    assert measured == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    ("capacity", "expected"), [(0, (0.0, 0)), (1, (4.0, 1)), (40, (128.0, 32))]
)
def test_search_batch_size_stops_when_memory_is_full(
    capacity: int, expected: tuple[float, int]
) -> None:
    def seconds_per_batch(batch_size: int) -> float:
        if batch_size > capacity:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return 0.25

    assert search_batch_size(seconds_per_batch) == expected


def test_search_batch_size_raises_other_errors() -> None:
    with pytest.raises(ZeroDivisionError):
        search_batch_size(lambda batch_size: 1 / 0)


def test_measure_throughput_of_a_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_MAX_BATCH_SIZE", 2)
    measured = throughput.measure_throughput(random_weights())
    assert measured.images_per_second > 100
    assert np.log2(measured.batch_size) % 1 == 0
    assert measured[2:] == ("cpu", (16, 16))


def test_training_seconds_extrapolates_to_steps_without_a_rate() -> None:
    lines = [
        # The first line after a start has no rate, because it compiled.
        {"step": 10, "loss": 1.0},
        {"step": 20, "loss": 1.0, "images_per_second": 100.0, "images_per_second_per_device": 25.0},
        {"step": 20, "test/top1": 0.5},
        {"step": 40, "loss": 1.0, "images_per_second": 50.0, "images_per_second_per_device": 12.5},
    ]
    # 30 steps of 10 images: 10 at 100 images/s, 20 at 50; the other 10 at their mean.
    assert throughput.training_seconds(lines, 10) == pytest.approx((1 + 4) * 40 / 30)
    assert throughput.device_days(lines, 10) == pytest.approx((1 + 4) * 40 / 30 * 4 / 86_400)
    assert throughput.training_seconds(lines[:1], 10) == throughput.device_days(lines[:1], 10) == 0
