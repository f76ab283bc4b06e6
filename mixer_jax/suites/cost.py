"""Cost of a suite: the dry run's text, and measured throughput, matmul rate and training time."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.weights import PretrainedWeights
from mixer_jax.distributed.hardware import peak_flops
from mixer_jax.errors import is_out_of_memory
from mixer_jax.models.layers import normalize_images
from mixer_jax.models.registry import get_family
from mixer_jax.planning.batch_size import search_batch_size
from mixer_jax.suites.datasets import SuiteData
from mixer_jax.suites.plan import TransferPlan
from mixer_jax.suites.tasks import NETWORK_TITLES, FineTuneTask, ProbeTask, Task, task_splits
from mixer_jax.suites.workdir import Throughput

_SECONDS_PER_DAY = 86_400
# Assumed utilization, as a fraction of a chip's peak or of its measured matmul rate.
_FRACTION_OF_PEAK, _FRACTION_OF_MATMUL = 0.4, 0.5
# The search for the batch size starts no measurement after this time.
_SEARCH_SECONDS = 30.0
_SECONDS_PER_BATCH_SIZE = 0.5
_FIRST_BATCH_SIZE, _MAX_BATCH_SIZE = 8, 4_096


def format_dry_run(plan: TransferPlan, tasks: Sequence[Task], data: SuiteData) -> str:
    """Formats every run of some tasks with steps, rates, sizes, splits and duration."""
    flops_per_second, assumption = assumed_rate()
    lines = [f"{plan.model_info.name}, from {plan.checkpoint}: {plan.suite.title}", ""]
    total_seconds, num_runs = 0.0, 0
    for task in tasks:
        sizes = _split_sizes(task, data)
        if isinstance(task, FineTuneTask):
            runs = list(_fine_tuning_runs(plan, task, sizes))
        else:
            runs = list(_probe_runs(plan, task, sizes))
        seconds = sum(flops for _, flops in runs) / flops_per_second
        total_seconds, num_runs = total_seconds + seconds, num_runs + len(runs)
        counts = ", ".join(
            f"{split}: {f'{size:,}' if size else '?'}"
            for split, size in zip(task_splits(task), sizes, strict=True)
        )
        missing = " (missing)" if task.name in data.missing else ""
        num_classes = f", {task.num_classes:,} classes" if task.num_classes else ""
        lines.append(
            f"{task.name}  {task.dataset}{missing}{num_classes}, {plan.image_sizes[task.name]} px, "
            f"about {format_duration(seconds)}; images: {counts}"
        )
        lines += [f"  {description}" for description, _ in runs]
    duration = format_duration(total_seconds)
    lines += ["", f"{len(tasks)} tasks, {num_runs} runs, {duration} of computing {assumption}"]
    lines += data.notes
    if data.missing:
        names = ", ".join(data.missing)
        lines += ["", f"missing: the data of {len(data.missing)} of {len(tasks)} tasks: {names}"]
        lines += [f"  {hint}" for hint in data.hints]
    else:
        lines.append("all data are available")
    return "\n".join(lines)


def _fine_tuning_runs(
    plan: TransferPlan, task: FineTuneTask, split_sizes: list[int]
) -> Iterator[tuple[str, float]]:
    """Yields the description and the FLOPs of each run."""
    forward = _forward_flops(plan.model_info, plan.image_sizes[task.name], task.num_classes)
    _, num_val, _, num_test = split_sizes
    sweep = plan.sweep_runs(task)
    for rate, run in sweep.items():
        steps, batch = run.config.num_steps, run.config.batch_size
        yield (
            f"sweep  learning rate {rate:g}, {steps:,} steps of {batch:,} on "
            f"{task.sweep_train_split}, evaluated on {task.sweep_val_split}",
            forward * (3 * steps * batch + num_val),
        )
    selected = "the best" if sweep else f"{task.learning_rates[0]:g}"
    for seed, run in plan.final_runs(task, task.learning_rates[0]).items():
        steps, batch = run.config.num_steps, run.config.batch_size
        extra = "".join(f" and {dataset} {split}" for dataset, split in task.extra_evals.values())
        yield (
            f"final  learning rate {selected}, seed {seed}, {steps:,} steps of {batch:,} on "
            f"{task.train_split}, evaluated on {task.test_split}{extra}",
            forward * (3 * steps * batch + (1 + len(task.extra_evals)) * num_test),
        )


def _probe_runs(
    plan: TransferPlan, task: ProbeTask, split_sizes: list[int]
) -> Iterator[tuple[str, float]]:
    """Yields the description and the FLOPs of each probe."""
    forward = _forward_flops(plan.model_info, plan.image_sizes[task.name], num_classes=0)
    num_train, num_test = split_sizes
    method = task.method
    if method == "few_shot":
        method += f" with {', '.join(map(str, task.shots))} shots, {len(task.seeds)} seeds"
        num_shots = max(task.shots) * len(task.seeds) * task.num_classes
        num_train = min(num_train, num_shots) or num_train
    for network in task.networks:
        yield (
            f"probe  {NETWORK_TITLES[network]}, {method}, trained on {task.train_split}, "
            f"evaluated on {task.test_split}",
            forward * (num_train + num_test),
        )


def _forward_flops(info: ModelInfo, image_size: int, num_classes: int) -> float:
    """Returns the FLOPs per image of the resized model."""
    family, size = get_family(info.family), (image_size, image_size)
    config = family.resize_config(info.config, info.image_size, size).config
    return float(family.forward_flops(config, size, num_classes))


def _split_sizes(task: Task, data: SuiteData) -> list[int]:
    """Returns the number of examples of each split, from the data or the task; 0 if unknown."""
    if task.name in data.sources:
        return [len(source) for source in data.sources[task.name]]
    return list(task.num_examples or [0] * len(task_splits(task)))


def assumed_rate() -> tuple[float, str]:
    """Returns the assumed FLOP/s of all devices, and the assumption in words."""
    device_kind, count = jax.devices()[0].device_kind, jax.device_count()
    if peak := peak_flops(device_kind):
        assumption = f"at {_FRACTION_OF_PEAK:.0%} of the peak of {count} × {device_kind}"
        return _FRACTION_OF_PEAK * peak * count, assumption
    assumption = f"at {_FRACTION_OF_MATMUL:.0%} of the matmul rate measured on {device_kind}"
    return _FRACTION_OF_MATMUL * measure_matmul_flops(), assumption


def format_duration(seconds: float) -> str:
    """Formats a duration with a unit between seconds and days."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3_600:
        return f"{seconds / 60:.0f} min"
    if seconds < 100 * 3_600:
        return f"{seconds / 3_600:.1f} h"
    return f"{seconds / _SECONDS_PER_DAY:,.1f} days"


def measure_matmul_flops() -> float:
    """Measures the FLOP/s of float32 matmuls on one device, in a moment."""
    size = 1_024
    matrix = jnp.ones((size, size), jnp.float32)
    return 2 * size**3 / _median_seconds(jax.jit(jnp.matmul), matrix, matrix, min_seconds=0.1)


def measure_throughput(weights: PretrainedWeights) -> Throughput:
    """Measures the inference throughput of a model on one device, at its image size."""
    device = jax.local_devices()[0]
    model = weights.model_info.build_model()
    image_size = weights.model_info.image_size
    classify = jax.jit(lambda params, x: model.apply({"params": params}, normalize_images(x)))
    params = weights.params
    end = time.monotonic() + _SEARCH_SECONDS

    def images_per_second(batch_size: int) -> float | None:
        nonlocal params
        is_over = batch_size > _MAX_BATCH_SIZE or time.monotonic() > end
        if is_over and batch_size > _FIRST_BATCH_SIZE:
            return None
        try:
            # Transferred here rather than before the search, which handles running out of memory.
            params = jax.device_put(params, device)
            images = jax.device_put(np.zeros((batch_size, *image_size, 3), np.uint8), device)
            seconds = _median_seconds(classify, params, images, min_seconds=_SECONDS_PER_BATCH_SIZE)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return batch_size / seconds

    batch_size, trials = search_batch_size(images_per_second, _FIRST_BATCH_SIZE)
    rate = {trial.batch_size: trial.images_per_second or 0.0 for trial in trials}
    return Throughput(rate.get(batch_size, 0.0), batch_size, device.device_kind, image_size)


def _median_seconds(compute: Callable[..., Any], *inputs: Any, min_seconds: float) -> float:
    """Measures the median duration of a call, after compiling, over three calls or more."""
    jax.block_until_ready(compute(*inputs))
    seconds: list[float] = []
    start = time.perf_counter()
    while len(seconds) < 3 or time.perf_counter() - start < min_seconds:
        before = time.perf_counter()
        jax.block_until_ready(compute(*inputs))
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
    """Estimates `training_seconds` in days, times the number of devices."""
    rates = [line for line in lines if line.get("images_per_second_per_device")]
    if not rates:
        return 0.0
    devices = rates[-1]["images_per_second"] / rates[-1]["images_per_second_per_device"]
    return training_seconds(lines, batch_size) * devices / _SECONDS_PER_DAY
