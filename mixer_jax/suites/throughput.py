"""Cost of a model: inference throughput at the best batch size, and duration of training."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixer_jax.checkpoints.weights import PretrainedWeights
from mixer_jax.models.layers import normalize_images
from mixer_jax.suites.results import Throughput

_SECONDS_PER_DAY = 86_400
# The search doubles the batch size until the gain is below 2 % or the time is over.
_MIN_GAIN = 1.02
_SEARCH_SECONDS = 30.0
_SECONDS_PER_BATCH_SIZE = 0.5
_MAX_BATCH_SIZE = 4_096


def measure_throughput(weights: PretrainedWeights) -> Throughput:
    """Measures the inference throughput of a model on one device, at its image size."""
    device = jax.local_devices()[0]
    model = weights.model_info.build_model()
    image_size = weights.model_info.image_size
    classify = jax.jit(lambda params, x: model.apply({"params": params}, normalize_images(x)))
    params = weights.params

    def seconds_per_batch(batch_size: int) -> float:
        nonlocal params
        images = np.zeros((batch_size, *image_size, 3), np.uint8)
        params = jax.device_put(params, device)
        return _time(classify, params, jax.device_put(images, device))

    images_per_second, batch_size = search_batch_size(seconds_per_batch)
    return Throughput(images_per_second, batch_size, device.device_kind, image_size)


def search_batch_size(seconds_per_batch: Callable[[int], float]) -> tuple[float, int]:
    """Doubles the batch size while that increases the throughput and fits into memory.

    Args:
        seconds_per_batch: Measures a batch size.

    Returns:
        Images per second and the best batch size; zeros if batch size 1 does not fit.
    """
    best_rate, best_size = 0.0, 0
    batch_size, end = 1, time.monotonic() + _SEARCH_SECONDS
    while batch_size <= _MAX_BATCH_SIZE and time.monotonic() < end:
        try:
            rate = batch_size / seconds_per_batch(batch_size)
        except jax.errors.JaxRuntimeError:
            # Out of memory: smaller sizes have been measured.
            break
        if rate < best_rate * _MIN_GAIN and batch_size > 8:
            break
        if rate > best_rate:
            best_rate, best_size = rate, batch_size
        batch_size *= 2
    return best_rate, best_size


def _time(classify: Any, params: Any, images: jax.Array) -> float:
    """Measures the median seconds per batch, after compiling."""
    jax.block_until_ready(classify(params, images))
    seconds: list[float] = []
    start = time.perf_counter()
    while len(seconds) < 3 or time.perf_counter() - start < _SECONDS_PER_BATCH_SIZE:
        before = time.perf_counter()
        jax.block_until_ready(classify(params, images))
        seconds.append(time.perf_counter() - before)
    return statistics.median(seconds)


def training_seconds(lines: list[dict[str, Any]], batch_size: int) -> float:
    """Estimates the duration of a run's steps, without compilation, evaluation and checkpoints.

    Args:
        lines: Metrics of the run, from `read_metrics`.
        batch_size: Images per step.
    """
    steps = last = timed = 0
    seconds = 0.0
    for line in lines:
        if "loss" not in line:
            continue
        passed, last = line["step"] - last, line["step"]
        steps += passed
        # The first step after each start compiles, and has no rate.
        if rate := line.get("images_per_second"):
            timed += passed
            seconds += passed * batch_size / rate
    return seconds * steps / timed if timed else 0.0


def device_days(lines: list[dict[str, Any]], batch_size: int) -> float:
    """Estimates the duration of training in days, times the number of devices.

    Args:
        lines: Metrics of the run, from `read_metrics`.
        batch_size: Images per step.
    """
    rates = [line for line in lines if line.get("images_per_second_per_device")]
    if not rates:
        return 0.0
    devices = rates[-1]["images_per_second"] / rates[-1]["images_per_second_per_device"]
    return training_seconds(lines, batch_size) * devices / _SECONDS_PER_DAY


def measure_matmul_flops() -> float:
    """Measures the FLOP/s of float32 matmuls on one device, in a moment."""
    size = 1_024
    matrix = jnp.ones((size, size), jnp.float32)
    matmul = jax.jit(jnp.matmul)
    jax.block_until_ready(matmul(matrix, matrix))
    seconds = []
    for _ in range(5):
        before = time.perf_counter()
        jax.block_until_ready(matmul(matrix, matrix))
        seconds.append(time.perf_counter() - before)
    return 2 * size**3 / statistics.median(seconds)
