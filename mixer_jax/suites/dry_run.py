"""Dry run of a suite: every run, its estimated duration, and missing data."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.distributed.hardware import peak_flops
from mixer_jax.models.registry import get_family
from mixer_jax.suites.datasets import SuiteData, task_splits
from mixer_jax.suites.plan import TransferPlan
from mixer_jax.suites.results import CHECKPOINT, NETWORK_TITLES, RANDOM_INIT
from mixer_jax.suites.tasks import FineTuneTask, ProbeTask, Task
from mixer_jax.suites.throughput import measure_matmul_flops

# Assumed utilization, as a fraction of a chip's peak or of its measured matmul rate.
_FRACTION_OF_PEAK, _FRACTION_OF_MATMUL = 0.4, 0.5


class _PlannedRun(NamedTuple):
    description: str
    flops: float


def format_dry_run(plan: TransferPlan, tasks: Sequence[Task], data: SuiteData) -> str:
    """Formats every run of some tasks with steps, rates, sizes, splits and duration.

    Args:
        plan: Plan of the suite.
        tasks: Tasks to list.
        data: Available and missing data.
    """
    flops_per_second, assumption = _assumed_rate()
    info = plan.model_info
    lines = [f"{info.name}, from {plan.settings.checkpoint}: {plan.suite.title}", ""]
    total_seconds, num_runs = 0.0, 0
    for task in tasks:
        runs = list(_list_runs(plan, task, data))
        seconds = sum(run.flops for run in runs) / flops_per_second
        total_seconds, num_runs = total_seconds + seconds, num_runs + len(runs)
        lines.append(_format_task(plan, task, seconds, data))
        lines += [f"  {run.description}" for run in runs]
    duration = _format_duration(total_seconds)
    lines += ["", f"{len(tasks)} tasks, {num_runs} runs, {duration} of computing {assumption}"]
    lines += data.notes
    if data.missing:
        names = ", ".join(data.missing)
        lines += ["", f"missing: the data of {len(data.missing)} of {len(tasks)} tasks: {names}"]
        lines += [f"  {hint}" for hint in data.hints]
    else:
        lines.append("all data are available")
    return "\n".join(lines)


def _format_task(plan: TransferPlan, task: Task, seconds: float, data: SuiteData) -> str:
    num_classes = f", {task.num_classes:,} classes" if task.num_classes else ""
    counts = [f"{count:,}" if count else "?" for count in _split_sizes(task, data)]
    splits = ", ".join(
        f"{split}: {count}" for split, count in zip(task_splits(task), counts, strict=True)
    )
    missing = " (missing)" if task.name in data.missing else ""
    return (
        f"{task.name}  {task.dataset}{missing}{num_classes}, {plan.image_sizes[task.name]} px, "
        f"about {_format_duration(seconds)}; images: {splits}"
    )


def _list_runs(plan: TransferPlan, task: Task, data: SuiteData) -> Iterator[_PlannedRun]:
    if isinstance(task, FineTuneTask):
        yield from _fine_tuning_runs(plan, task, data)
    else:
        yield from _probe_runs(plan, task, data)


def _fine_tuning_runs(
    plan: TransferPlan, task: FineTuneTask, data: SuiteData
) -> Iterator[_PlannedRun]:
    forward = _forward_flops(plan.model_info, plan.image_sizes[task.name], task.num_classes)
    _, num_val, _, num_test = _split_sizes(task, data)
    sweep = plan.sweep_runs(task)
    for rate, run in sweep.items():
        steps, batch = run.config.num_steps, run.config.batch_size
        yield _PlannedRun(
            f"sweep  learning rate {rate:g}, {steps:,} steps of {batch:,} on "
            f"{task.sweep_train_split}, evaluated on {task.sweep_val_split}",
            forward * (3 * steps * batch + num_val),
        )
    selected = "the best" if sweep else f"{task.learning_rates[0]:g}"
    for seed, run in plan.final_runs(task, task.learning_rates[0]).items():
        steps, batch = run.config.num_steps, run.config.batch_size
        extra = "".join(f" and {dataset} {split}" for dataset, split in task.extra_evals.values())
        yield _PlannedRun(
            f"final  learning rate {selected}, seed {seed}, {steps:,} steps of {batch:,} on "
            f"{task.train_split}, evaluated on {task.test_split}{extra}",
            forward * (3 * steps * batch + (1 + len(task.extra_evals)) * num_test),
        )


def _probe_runs(plan: TransferPlan, task: ProbeTask, data: SuiteData) -> Iterator[_PlannedRun]:
    forward = _forward_flops(plan.model_info, plan.image_sizes[task.name], num_classes=0)
    num_train, num_test = _split_sizes(task, data)
    method = task.method
    if method == "few_shot":
        method += f" with {', '.join(map(str, task.shots))} shots, {len(task.seeds)} seeds"
        num_shots = max(task.shots) * len(task.seeds) * task.num_classes
        num_train = min(num_train, num_shots) or num_train
    for network in (CHECKPOINT, RANDOM_INIT) if task.compare_random_init else (CHECKPOINT,):
        yield _PlannedRun(
            f"probe  {NETWORK_TITLES[network]}, {method}, trained on {task.train_split}, "
            f"evaluated on {task.test_split}",
            forward * (num_train + num_test),
        )


def _forward_flops(info: ModelInfo, image_size: int, num_classes: int) -> float:
    """Returns the FLOPs per image of the resized model."""
    family, size = get_family(info.family), (image_size, image_size)
    config = family.resize_config(info.config, info.image_size, size).config
    return float(family.forward_flops(config, size, num_classes))


def _assumed_rate() -> tuple[float, str]:
    """Returns the assumed FLOP/s of all devices, and the assumption in words."""
    device_kind, count = jax.devices()[0].device_kind, jax.device_count()
    if peak := peak_flops(device_kind):
        assumption = f"at {_FRACTION_OF_PEAK:.0%} of the peak of {count} × {device_kind}"
        return _FRACTION_OF_PEAK * peak * count, assumption
    assumption = f"at {_FRACTION_OF_MATMUL:.0%} of the matmul rate measured on {device_kind}"
    return _FRACTION_OF_MATMUL * measure_matmul_flops(), assumption


def _split_sizes(task: Task, data: SuiteData) -> list[int]:
    """Returns the number of examples of each split, from the data or the task; 0 if unknown."""
    if task.name in data.sources:
        return [len(source) for source in data.sources[task.name]]
    return list(task.num_examples or [0] * len(task_splits(task)))


def _format_duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3_600:
        return f"{seconds / 60:.0f} min"
    if seconds < 100 * 3_600:
        return f"{seconds / 3_600:.1f} h"
    return f"{seconds / 86_400:,.1f} days"
