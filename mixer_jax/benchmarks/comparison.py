"""Contestants compared at one setting: prepared, then timed in turn, round by round."""

import statistics
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

from mixer_jax.benchmarks import rounds
from mixer_jax.benchmarks.contestants import OURS, Contestant, Setting, check_device
from mixer_jax.benchmarks.field import JAX, TORCH, Field
from mixer_jax.benchmarks.outputs import say
from mixer_jax.benchmarks.workers import FailedError, Worker
from mixer_jax.errors import RunError
from mixer_jax.models.mixer_config import forward_flops, get_config

_PRODUCT = "matrix product"


class Row(NamedTuple):
    """What one contestant can do. None: not known, or not measured.

    Attributes:
        name: of it.
        failed: why it was not measured; empty: it was.
        images_per_second: at the median time over rounds.
        step_seconds: that median.
        utilisation: model FLOPs over time over the rate of a bare matrix product in that round.
        memory_bytes: of a step: state, batch, results and all between.
        latency_seconds: median, from one image to its logits.
        compile_seconds: from lowered program to executable.
        first_step_seconds: from the function to its first finished step.
        cached_first_step_seconds: likewise, in a later process that finds the program compiled.
        ratio: median over rounds of its time to that of the first of ours in the round.
    """

    name: str
    failed: str = ""
    images_per_second: float | None = None
    step_seconds: float | None = None
    utilisation: float | None = None
    memory_bytes: int | None = None
    latency_seconds: float | None = None
    compile_seconds: float | None = None
    first_step_seconds: float | None = None
    cached_first_step_seconds: float | None = None
    ratio: float | None = None


class Comparison(NamedTuple):
    """Contestants at one setting.

    Attributes:
        setting: the work.
        product_rates: FLOP/s of a bare matrix product, median over rounds, by framework.
        apart: frameworks whose process was started anew in every round, for lack of memory.
        rows: in the order of the contestants.
    """

    setting: Setting
    product_rates: dict[str, float]
    apart: list[str]
    rows: list[Row]


def compare(
    setting: Setting,
    contestants: Sequence[Contestant],
    num_rounds: int,
    platform: str,
    profile: str = "",
    num_compilations: int = 1,
) -> Comparison:
    """Returns what the contestants can do.

    Args:
        setting: the work.
        contestants: to compare; the first of ours that fits is the base of the ratios.
        num_rounds: timings of each.
        platform: as JAX calls it.
        profile: folder for a trace of the first of ours; empty: none is written.
        num_compilations: of each of JAX's; what they take is the median.

    Raises:
        RunFailedError: all of ours failed.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        Field(setting, contestants, platform, folder) as field,
    ):
        field.prepare(num_compilations)
        _base(field)
        products = _prepare_products(field)
        times, latencies = _take_turns(field, list(products), num_rounds)
        if profile:
            field.ask(JAX, "profile", name=_base(field), folder=profile)
        product_times = {name: times.pop(name) for name in products if name in times}
        rates = {
            framework: [flops / seconds for seconds in product_times[name]]
            for name, (framework, flops) in products.items()
            if name in product_times
        }
        rows = _make_rows(setting, field, times, latencies, rates)
        medians = {name: statistics.median(values) for name, values in rates.items()}
        return Comparison(setting, medians, sorted(field.apart), rows)


def ask_facts(setting: Setting, contestants: Sequence[Contestant]) -> dict[str, Any]:
    """Returns the device that JAX finds, its type for `setting.dtype`, and versions.

    Args:
        setting: the work.
        contestants: that are to do it.

    Raises:
        UserError: kernels of one of them are not for this device.
        RunFailedError: JAX does not start.
    """
    with Worker(JAX, setting) as worker:
        try:
            facts: dict[str, Any] = worker.ask("facts")
        except FailedError as error:
            raise RunError(f"JAX does not start: {error}") from error
    check_device(contestants, facts["platform"])
    return facts


def _base(field: Field) -> str:
    """Returns the first of ours that can be measured."""
    for contestant in field.contestants:
        if contestant.kind == OURS and contestant.name not in field.failed:
            return contestant.name
    name, reason = next(iter(field.failed.items()))
    raise RunError(f"{name} cannot be measured: {reason}")


def _prepare_products(field: Field) -> dict[str, tuple[str, int]]:
    """Returns framework and FLOPs of every matrix product that is ready, by its name."""
    made = {}
    for framework in field.frameworks:
        if field.names(framework):
            name = f"{_PRODUCT} by {framework}"
            try:
                made[name] = (framework, field.prepare_product(framework, name))
            except FailedError as error:
                field.fail(name, error)
    return made


def _take_turns(
    field: Field, products: Sequence[str], num_rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Returns the times of all, by round, and the latencies of those that have one."""
    frameworks = {c.name: c.framework for c in field.contestants} | {
        f"{_PRODUCT} by {framework}": framework for framework in field.frameworks
    }
    times: dict[str, list[float]] = {}
    latencies: dict[str, list[float]] = {}
    for number in range(num_rounds):
        say(f"round {number + 1} of {num_rounds}")
        groups = [
            [
                *field.names(name),
                *(p for p in products if frameworks[p] == name and p not in field.failed),
            ]
            for name in (JAX, TORCH)
        ]
        everyone = rounds.order(groups[0] + groups[1], number)
        if field.apart:
            everyone = rounds.order_apart(groups[0], groups[1], number)
        for name in everyone:
            try:
                times.setdefault(name, []).append(field.ask(frameworks[name], "time", name=name))
                latencies.setdefault(name, []).extend(
                    field.ask(frameworks[name], "latencies", name=name)
                )
            except FailedError as error:
                field.fail(name, error)
                times.pop(name)
    return times, latencies


def _make_rows(
    setting: Setting,
    field: Field,
    times: dict[str, list[float]],
    latencies: dict[str, list[float]],
    rates: dict[str, list[float]],
) -> list[Row]:
    flops = model_flops(setting)
    product = max(rates.values(), key=statistics.median, default=None)
    base = times[_base(field)]
    rows = []
    for contestant in field.contestants:
        name = contestant.name
        if name in field.failed:
            rows.append(Row(name, field.failed[name]))
            continue
        seconds = statistics.median(times[name])
        calls = latencies.get(name)
        measured: dict[str, Any] = {
            "images_per_second": setting.batch_size / seconds,
            "step_seconds": seconds,
            "utilisation": product and rounds.utilisation(flops, times[name], product),
            "latency_seconds": statistics.median(calls) if calls else None,
            "cached_first_step_seconds": field.first_steps.get(name),
            "ratio": rounds.ratio(times[name], base),
        }
        rows.append(Row(name, **measured, **field.costs[name]))
    return rows


def model_flops(setting: Setting) -> int:
    """Returns the model FLOPs of a step: one forward an image, or three in training."""
    widths = get_config(setting.variant)
    forward = forward_flops(widths, setting.image_size, setting.num_classes)
    return forward * setting.batch_size * (3 if setting.mode == "train" else 1)
