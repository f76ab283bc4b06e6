"""What a model costs: images a second at the best batch size, and the pre-training of a run."""

import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixer_jax.checkpoints.load import PretrainedWeights
from mixer_jax.checkpoints.to_device import model_from_info
from mixer_jax.models.layers import normalize_images

_SECONDS_A_DAY = 86_400
# The search doubles the batch until it gains less than this, or the time is over.
_LEAST_GAIN = 1.02
_SEARCH_SECONDS = 30.0
_SECONDS_A_BATCH_SIZE = 0.5
_LARGEST_BATCH = 4_096


class Throughput(NamedTuple):
    """How fast a model classifies on one device.

    Attributes:
        images_per_second: at the best batch size; 0: not even one image fits.
        batch_size: that.
        device: what it was measured on.
        image_size: height and width, pixels.
    """

    images_per_second: float
    batch_size: int
    device: str
    image_size: tuple[int, int]


def measure_throughput(weights: PretrainedWeights) -> Throughput:
    """Returns the throughput of weights at their image size, by a short search.

    Batch sizes are doubled from 1 for as long as that gains anything.

    Args:
        weights: on the host.
    """
    device = jax.local_devices()[0]
    model = model_from_info(weights.model_info)
    classify = jax.jit(lambda params, x: model.apply({"params": params}, normalize_images(x)))
    best = Throughput(0.0, 0, device.device_kind, weights.model_info.image_size)
    params, size, end = weights.params, 1, time.monotonic() + _SEARCH_SECONDS
    while size <= _LARGEST_BATCH and time.monotonic() < end:
        images = np.zeros((size, *weights.model_info.image_size, 3), np.uint8)
        try:
            # They stay there after the first time.
            params = jax.device_put(params, device)
            rate = size / _time(classify, params, jax.device_put(images, device))
        except jax.errors.JaxRuntimeError:
            # The device's memory is full: the sizes before have been measured.
            break
        if rate < best.images_per_second * _LEAST_GAIN and size > 8:
            break
        if rate > best.images_per_second:
            best = best._replace(images_per_second=rate, batch_size=size)
        size *= 2
    return best


def _time(classify: Any, params: Any, images: jax.Array) -> float:
    """Returns seconds a batch, the median of several, after compiling."""
    jax.block_until_ready(classify(params, images))
    seconds: list[float] = []
    start = time.perf_counter()
    while len(seconds) < 3 or time.perf_counter() - start < _SECONDS_A_BATCH_SIZE:
        before = time.perf_counter()
        jax.block_until_ready(classify(params, images))
        seconds.append(time.perf_counter() - before)
    return statistics.median(seconds)


def training_seconds(lines: list[dict[str, Any]], batch_size: int) -> float:
    """Returns the time that a run's steps took, without compiling, scoring and saving.

    Args:
        lines: of its metrics, as `read_metrics` gives them.
        batch_size: images a step.
    """
    steps = last = timed = 0
    seconds = 0.0
    for line in lines:
        if "loss" not in line:
            continue
        passed, last = line["step"] - last, line["step"]
        steps += passed
        # Of the first step after each start, which compiles, no rate is known.
        if rate := line.get("images_per_second"):
            timed += passed
            seconds += passed * batch_size / rate
    return seconds * steps / timed if timed else 0.0


def device_days(lines: list[dict[str, Any]], batch_size: int) -> float:
    """Returns the days that training took, times the devices it ran on; as `training_seconds`."""
    rates = [line for line in lines if line.get("images_per_second_per_device")]
    if not rates:
        return 0.0
    devices = rates[-1]["images_per_second"] / rates[-1]["images_per_second_per_device"]
    return training_seconds(lines, batch_size) * devices / _SECONDS_A_DAY


def measure_matmul_flops() -> float:
    """Returns the FLOP/s of matrix products on one device, float32, measured in a moment."""
    size = 1_024
    matrix = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(matrix, matrix))
    seconds = []
    for _ in range(5):
        before = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        seconds.append(time.perf_counter() - before)
    return 2 * size**3 / statistics.median(seconds)
