"""What a suite would do, before it does anything: every run, the time it takes, what is missing."""

from collections.abc import Iterator, Sequence

import jax

from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.distributed.hardware import peak_flops
from mixer_jax.models.registry import get_family
from mixer_jax.suites.datasets import SuiteData, task_splits
from mixer_jax.suites.plan import TransferPlan
from mixer_jax.suites.results import RANDOM_INIT
from mixer_jax.suites.tasks import FineTuneTask, ProbeTask, Task
from mixer_jax.suites.throughput import measure_matmul_flops

# What runs reach of a chip's peak, or of its measured matrix products, to reckon with.
_SHARE_OF_PEAK, _SHARE_OF_PRODUCTS = 0.4, 0.5


def format_dry_run(plan: TransferPlan, tasks: Sequence[Task], data: SuiteData) -> str:
    """Returns every run of some tasks with steps, rates, sizes, splits and time, for people.

    Args:
        plan: of the suite.
        tasks: to tell of.
        data: what is there of their data.
    """
    rate, source = _rate()
    lines = [f"{plan.about.name}, from {plan.setting.checkpoint}: {plan.suite.title}", ""]
    total = 0.0
    for task in tasks:
        seconds = sum(flops for _, flops in _runs(plan, task, data)) / rate
        total += seconds
        lines.append(_head(plan, task, seconds, data))
        lines += [f"  {run}" for run, _ in _runs(plan, task, data)]
    runs = sum(1 for task in tasks for _ in _runs(plan, task, data))
    lines += ["", f"{len(tasks)} tasks, {runs} runs, {_tell(total)} of computing {source}"]
    lines += data.notes
    if data.missing:
        names = ", ".join(data.missing)
        lines += ["", f"missing: the data of {len(data.missing)} of {len(tasks)} tasks: {names}"]
        lines += [f"  {advice}" for advice in data.advice]
    else:
        lines.append("all data are there")
    return "\n".join(lines)


def _head(plan: TransferPlan, task: Task, seconds: float, data: SuiteData) -> str:
    counts = _counts(task, data)
    classes = f", {task.num_classes:,} classes" if task.num_classes else ""
    parts = ", ".join(
        f"{split}: {count}" for split, count in zip(task_splits(task), counts, strict=True)
    )
    missing = " (missing)" if task.name in data.missing else ""
    return (
        f"{task.name}  {task.dataset}{missing}{classes}, {plan.image_sizes[task.name]} px, about "
        f"{_tell(seconds)}; images in {parts}"
    )


def _runs(plan: TransferPlan, task: Task, data: SuiteData) -> Iterator[tuple[str, float]]:
    """Yields each run of a task in words, and its FLOPs."""
    if isinstance(task, FineTuneTask):
        yield from _fine_tuning(plan, task, data)
    else:
        yield from _probing(plan, task, data)


def _fine_tuning(
    plan: TransferPlan, task: FineTuneTask, data: SuiteData
) -> Iterator[tuple[str, float]]:
    side = plan.image_sizes[task.name]
    forward = _forward(plan.about, side, task.num_classes)
    _, validation, _, test = _numbers(task, data)
    rates = plan.choosing(task)
    for rate, run in rates.items():
        steps, batch = run.config.num_steps, run.config.batch_size
        yield (
            f"choose  learning rate {rate:g}, {steps:,} steps of {batch:,} on {task.choose_split}, "
            f"scored on {task.validation_split}",
            forward * (3 * steps * batch + validation),
        )
    chosen = "the best" if rates else f"{task.learning_rates[0]:g}"
    for seed, run in plan.final(task, task.learning_rates[0]).items():
        steps, batch = run.config.num_steps, run.config.batch_size
        also = "".join(f" and {dataset} {split}" for dataset, split in task.also.values())
        yield (
            f"final   learning rate {chosen}, seed {seed}, {steps:,} steps of {batch:,} on "
            f"{task.train_split}, scored on {task.test_split}{also}",
            forward * (3 * steps * batch + (1 + len(task.also)) * test),
        )


def _probing(plan: TransferPlan, task: ProbeTask, data: SuiteData) -> Iterator[tuple[str, float]]:
    forward = _forward(plan.about, plan.image_sizes[task.name], 0)
    train, test = _numbers(task, data)
    what = task.method
    if task.method == "few_shot":
        what += f" of {', '.join(map(str, task.shots))}, {len(task.seeds)} seeds"
        train = min(train, max(task.shots) * len(task.seeds) * task.num_classes) or train
    for network in ("the checkpoint", RANDOM_INIT) if task.beside_fresh else ("the checkpoint",):
        yield (
            f"probe   {network}, {what}, learnt from {task.train_split}, scored on "
            f"{task.test_split}",
            forward * (train + test),
        )


def _forward(about: ModelInfo, side: int, num_classes: int) -> float:
    """Returns the FLOPs of an image, with weights resized."""
    family = get_family(about.family)
    resized = family.resize_config(about.config, about.image_size, (side, side))
    return float(family.forward_flops(resized.config, side, num_classes))


def _rate() -> tuple[float, str]:
    """Returns FLOP/s to reckon with, over all devices, and where they come from."""
    device = jax.devices()[0]
    count = jax.device_count()
    peak = peak_flops(device.device_kind)
    if peak:
        where = f"at {_SHARE_OF_PEAK:.0%} of the peak of {count} × {device.device_kind}"
        return _SHARE_OF_PEAK * peak * count, where
    where = f"at {_SHARE_OF_PRODUCTS:.0%} of the matrix products measured on {device.device_kind}"
    return _SHARE_OF_PRODUCTS * measure_matmul_flops(), where


def _numbers(task: Task, data: SuiteData) -> list[int]:
    """Returns how many examples each split of a task has, as found or as the task says; or 0."""
    if task.name in data.sources:
        return [len(source) for source in data.sources[task.name]]
    return list(task.num_examples or [0] * len(task_splits(task)))


def _counts(task: Task, data: SuiteData) -> list[str]:
    return [f"{count:,}" if count else "?" for count in _numbers(task, data)]


def _tell(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3_600:
        return f"{seconds / 60:.0f} min"
    if seconds < 100 * 3_600:
        return f"{seconds / 3_600:.1f} h"
    return f"{seconds / 86_400:,.1f} days"
