"""A plan for people, on one screen, and for programs, as JSON."""

import textwrap
from typing import Any

from mixer_jax.planning.planner import CompiledStep, Plan
from mixer_jax.planning.suggestions import suggest_flags
from mixer_jax.planning.topology import GIB

_WIDTH = 100
_MB, _GB, _TERA = 1e6, 1e9, 1e12
_ASSUMED = (
    "The bound is a floor, not a forecast: peak rates, and arithmetic, memory and network at the "
    "same\ntime. Steps measured on hardware take longer; reading and decoding images is not in it."
)


_QUICK = (
    "Compiled quickly: a run's own program is optimized for longer, keeps more on chip, and may "
    "move\nhalf as many bytes to and from memory."
)


def format_plan(plan: Plan) -> str:
    """Returns a plan as text of at most 100 columns."""
    parts = [_head(plan), _memory(plan)]
    if plan.bound is None:
        return "\n\n".join([*parts, _too_large(plan)])
    parts += [_moved(plan), _collectives(plan)]
    if plan.uncounted:
        parts.append(_uncounted(plan.uncounted))
    if plan.fits:
        notes = [_ASSUMED, _QUICK] if plan.quick else [_ASSUMED]
        return "\n\n".join([*parts, _cost(plan), "\n".join(notes)])
    return "\n\n".join([*parts, _too_large(plan)])


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Returns a plan as what JSON can hold; bytes, seconds and FLOPs, no rounding."""
    config, topology = plan.config, plan.topology
    return {
        "variant": config.model.variant,
        "topology": topology.text,
        "slices": topology.slices,
        "chips": topology.num_chips,
        "devices": topology.num_devices,
        "compiled": plan.training is not None,
        "quick": plan.quick,
        "fits": plan.fits,
        "settings": {
            "batch_size": config.batch_size,
            "accumulation_steps": config.recipe.grad_accum_steps,
            "fsdp": config.mesh.fsdp,
            "remat": config.model.remat,
            "unroll": config.model.scan_unroll,
        },
        "num_steps": plan.work.num_steps,
        "num_parameters": plan.work.num_parameters,
        "allowed_bytes": plan.allowed,
        "estimate": plan.estimate._asdict(),
        "evaluation_estimate": plan.scoring,
        "training": plan.training._asdict() if plan.training else None,
        "evaluation": plan.evaluation._asdict() if plan.evaluation else None,
        "model_flops": plan.work.model_flops,
        "recomputed_flops": plan.work.recomputed_flops,
        "memory_bytes": plan.memory_bytes,
        "uncounted_loops": plan.uncounted,
        "collectives": [
            {name: value for name, value in sent._asdict().items() if name != "groups"}
            for sent in plan.transfers
        ],
        "bound": plan.bound._asdict() | {"seconds": plan.bound.seconds, "limit": plan.bound.limit}
        if plan.bound
        else None,
        "cost": plan.cost._asdict() if plan.cost else None,
    }


def _head(plan: Plan) -> str:
    config, work = plan.config, plan.work
    unroll = config.model.scan_unroll or "all"
    pieces = f" in {work.pieces} pieces" if work.pieces > 1 else ""
    how = "by formula alone: nothing is compiled for GPUs"
    if plan.training:
        seconds = f"{plan.training.seconds:.0f} s"
        if plan.evaluation:
            seconds += f" and {plan.evaluation.seconds:.0f} s"
        how = f"compiled in {seconds}"
    return (
        f"Mixer-{config.model.variant}, {config.image_size} px, {work.num_classes:,} classes, "
        f"{work.num_parameters:,} parameters\n"
        f"batch {work.batch_size:,}, {work.batch_size / work.devices:g} a device{pieces}; "
        f"remat {work.remat}, unroll {unroll}, fsdp {work.fsdp}\n"
        f"{plan.topology.describe()}; {how}"
    )


def _memory(plan: Plan) -> str:
    lies = plan.estimate
    steps: list[CompiledStep | None] = [plan.training, plan.evaluation]
    columns = [step for step in steps if step is not None]
    titles = ["training", "evaluation"][: len(columns)]
    head = f"memory of a device, GiB ({plan.allowed / GIB:.2f} allowed)"
    titles_text = "".join(f"{t:>13}" for t in [*titles, "by formula"])
    lines = [f"{head:<46}" + titles_text]
    blank: list[float | None] = [None] * len(columns)
    rows: list[tuple[str, list[float | None], float | None]] = [
        ("parameters", blank, lies.parameters),
        ("moments and averages", blank, lies.moments),
        ("batch", blank, lies.batch),
        ("state and batch", [s.arguments if s.fits else None for s in columns], None),
        ("activations", blank, lies.activations),
        ("gradients, parameters as computed with", blank, lies.gradients),
        ("all temporaries", [s.temporaries if s.fits else None for s in columns], None),
        ("code", [s.code if s.fits else None for s in columns], None),
        ("in all", [s.needed for s in columns], lies.total),
    ]
    for name, compiled, estimate in rows:
        if columns or estimate is not None:
            numbers = "".join(f"{_gib(number):>13}" for number in [*compiled, estimate])
            lines.append(f"  {name:<44}" + numbers)
    verdicts = "".join(f"{'fits' if step.fits else 'TOO LARGE':>13}" for step in columns)
    expected = "fits" if lies.total <= plan.allowed else "too large"
    lines.append(f"  {'':<44}{verdicts}{expected:>13}")
    if not columns:
        expected = "fits" if plan.scoring <= plan.allowed else "too large"
        lines.append(f"  {'in all, where a batch is only scored':<44}{_gib(plan.scoring):>13}")
        lines.append(f"  {'':<44}{expected:>13}")
    return "\n".join(lines)


def _gib(number: float | None) -> str:
    return "" if number is None else f"{number / GIB:.2f}"


def _moved(plan: Plan) -> str:
    assert plan.bound is not None
    chip, work, least = plan.topology.chip, plan.work, plan.bound
    executed = (work.model_flops + work.recomputed_flops) / work.devices
    again = work.recomputed_flops / (work.model_flops + work.recomputed_flops)
    sent = sum(transfer.num_bytes for transfer in plan.transfers)
    speed = f"{plan.topology.egress / _GB:.0f} GB/s a chip"
    beyond = plan.topology.slices > 1 or bool(
        chip.nvlink_domain and plan.topology.num_chips > chip.nvlink_domain
    )
    if beyond and chip.network_bandwidth:
        speed += f", {chip.network_bandwidth / _GB:g} beyond"
    elif beyond:
        speed += ", ? beyond"
    rows = [
        (
            "arithmetic",
            f"{executed / _TERA:.2f} TFLOP, {again:.0%} of it recomputed",
            least.arithmetic,
            f"{chip.flops / chip.devices_per_chip / _TERA:.0f} TFLOP/s",
        ),
        (
            "memory",
            f"{plan.memory_bytes / _GB:.2f} GB" + ("" if plan.training else " at the least"),
            least.memory,
            f"{chip.memory_bandwidth / chip.devices_per_chip / _GB:.0f} GB/s",
        ),
        ("network", f"{sent / _GB:.3f} GB", least.network, speed),
    ]
    lines = ["a step on a device" + " " * 42 + "at the least"]
    lines += [
        f"  {name:<12}{what:<42}{seconds * 1e3:>12.2f} ms   {rate}"
        for name, what, seconds, rate in rows
    ]
    return "\n".join(lines)


def _collectives(plan: Plan) -> str:
    if not plan.transfers:
        return "collectives: none"
    head = f"{'collectives of a step':<24}{'type':<6}{'along':<8}{'times':>6}{'MB':>12}   carries"
    lines = [head]
    lines += [
        f"  {sent.kind:<22}{sent.dtype:<6}{sent.axis:<8}{sent.times:>6,}"
        f"{sent.num_bytes / _MB:>12,.3f}   {sent.carries}"
        for sent in plan.transfers
    ]
    wrong = sum(sent.num_bytes for sent in plan.transfers if sent.is_unexpected)
    if wrong:
        lines.append(
            f"  WARNING: {wrong / _MB:,.1f} MB are activations, which a data-parallel step need "
            "not send"
        )
    return "\n".join(lines)


def _uncounted(number: int) -> str:
    what = (
        f"{number} loops with products or collectives run"
        if number > 1
        else ("a loop with products or collectives runs")
    )
    return (
        f"WARNING: how often {what} is not known; counted as once,\n"
        "so the step may take longer, and send and move more, than is told here"
    )


def _cost(plan: Plan) -> str:
    assert plan.bound is not None
    assert plan.cost is not None
    least, run = plan.bound, plan.cost
    return (
        f"bound: {least.seconds * 1e3:.1f} ms a step, set by {least.limit} "
        f"({least.serial_seconds * 1e3:.1f} ms if nothing overlapped)\n"
        f"  {run.images_per_second:,.0f} images/s, {run.images_per_second_per_chip:,.0f} a chip; "
        f"model FLOP utilisation {run.model_flops_utilization:.1%}\n"
        f"  {plan.work.num_steps:,} steps: {run.days:.2f} days, {run.core_days:,.1f} core-days "
        f"({plan.topology.num_devices:,} devices × days)"
    )


def _too_large(plan: Plan) -> str:
    lines = []
    steps = [("training", plan.training), ("evaluation", plan.evaluation)]
    for name, step in steps:
        if step and not step.fits:
            lines.append(_refused(name, step))
    if plan.training is None:
        estimates = [("training", plan.estimate.total), ("evaluation", plan.scoring)]
        lines += [
            f"by estimate the {name} step does not fit: about "
            f"{(size - plan.allowed) / GIB:.1f} GiB too much a device"
            for name, size in estimates
            if size > plan.allowed
        ]
    if not _evaluation_fits(plan):
        lines.append(f"  lower config.eval_batch_size={plan.config.eval_batch_size}")
    if plan.train_step_fits or (plan.training and plan.training.needed is None):
        return "\n".join(lines)
    flags = suggest_flags(plan)
    if flags:
        lines += ["by estimate, any one of these would fit:", *(f"  {flag}" for flag in flags)]
    else:
        lines.append("none of the settings that save memory is enough alone; combine them: --sweep")
    return "\n".join(lines)


def _refused(name: str, step: CompiledStep) -> str:
    if step.needed is None:
        text = f"the {name} step does not fit, and the compiler does not say by how much: "
        return textwrap.fill(text + step.said, _WIDTH)
    over = (step.needed - step.allowed) / GIB
    return f"the {name} step does not fit: about {over:.1f} GiB too much a device"


def _evaluation_fits(plan: Plan) -> bool:
    if plan.training is None:
        return plan.scoring <= plan.allowed
    return plan.evaluation is None or plan.evaluation.fits
