"""Report of a plan as text, with suggestions if the run does not fit, or as a JSON object."""

import textwrap
from typing import Any

from mixer_jax.planning.cost_model import estimate_memory
from mixer_jax.planning.planner import CompiledStep, Plan
from mixer_jax.planning.run_spec import REMAT_POLICIES, RunSpec
from mixer_jax.planning.topology import GIB, larger_topologies

_WIDTH = 100
_MB, _GB, _TERA = 1e6, 1e9, 1e12
_BOUND_NOTE = (
    "The bound is not a forecast. It assumes peak rates, and that arithmetic, memory traffic and\n"
    "communication overlap. Measured steps take longer. Loading images is not included."
)
_FAST_COMPILE_NOTE = (
    "Compiled with --quick. The program of the run is better optimized, keeps more data on-chip,\n"
    "and may have half as much memory traffic."
)


def format_plan(plan: Plan) -> str:
    """Formats a plan as text of at most 100 columns."""
    sections = [_format_header(plan), _format_memory(plan)]
    if plan.bound is not None:
        sections += [_format_bounds(plan), _format_collectives(plan)]
    if plan.num_unknown_loops:
        loops = "1 loop" if plan.num_unknown_loops == 1 else f"{plan.num_unknown_loops} loops"
        sections.append(
            f"WARNING: the trip count of {loops} with matmuls or collectives is unknown and\n"
            "counted as 1, so the step may take longer, and move and send more, than this plan says"
        )
    if not plan.fits:
        sections.append(_format_misfit(plan))
    else:
        notes = [_BOUND_NOTE, _FAST_COMPILE_NOTE] if plan.fast_compile else [_BOUND_NOTE]
        sections += [_format_cost(plan), "\n".join(notes)]
    return "\n\n".join(sections)


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Converts a plan to a JSON object, in bytes, seconds and FLOPs, without rounding."""
    config, topology, run, bound = plan.config, plan.topology, plan.run, plan.bound
    return {
        "family": run.family.name,
        "variant": config.model.variant,
        "topology": topology.name,
        "num_slices": topology.num_slices,
        "num_chips": topology.num_chips,
        "num_devices": topology.num_devices,
        "compiled": plan.train_step is not None,
        "fast_compile": plan.fast_compile,
        "fits": plan.fits,
        "settings": {
            "batch_size": run.batch_size,
            "num_microbatches": run.num_microbatches,
            "fsdp": run.fsdp,
            "remat": run.remat,
            "scan_unroll": run.scan_unroll,
        },
        "num_steps": run.num_steps,
        "num_params": run.num_params,
        "available_bytes": plan.available_bytes,
        "memory_estimate": plan.memory_estimate._asdict(),
        "eval_memory_estimate": plan.eval_memory_estimate,
        "train_step": plan.train_step._asdict() if plan.train_step else None,
        "eval_step": plan.eval_step._asdict() if plan.eval_step else None,
        "model_flops": run.model_flops,
        "recomputed_flops": run.recomputed_flops,
        "hbm_bytes": plan.hbm_bytes,
        "num_unknown_loops": plan.num_unknown_loops,
        "collectives": [
            {name: value for name, value in c._asdict().items() if name != "replica_groups"}
            for c in plan.collectives
        ],
        "bound": bound._asdict() | {"seconds": bound.seconds, "limit": bound.limit}
        if bound
        else None,
        "cost": plan.cost._asdict() if plan.cost else None,
    }


def _format_header(plan: Plan) -> str:
    config, run = plan.config, plan.run
    microbatches = f" in {run.num_microbatches} microbatches" if run.num_microbatches > 1 else ""
    method = "estimated by formula (steps are only compiled for TPUs)"
    if plan.train_step:
        seconds = f"{plan.train_step.compile_seconds:.0f} s"
        if plan.eval_step:
            seconds += f" + {plan.eval_step.compile_seconds:.0f} s"
        method = f"compiled in {seconds}"
    return (
        f"{run.family.full_name(config.model.variant)}, {run.image_size} px, "
        f"{run.num_classes:,} classes, {run.num_params:,} parameters\n"
        f"batch size {run.batch_size:,}, {run.images_per_device:g} per device{microbatches}; "
        f"remat {run.remat}, unroll {run.scan_unroll or 'all'}, fsdp {run.fsdp}\n"
        f"{plan.topology.describe()}; {method}"
    )


def _format_memory(plan: Plan) -> str:
    estimate = plan.memory_estimate
    steps = {"train step": plan.train_step, "eval step": plan.eval_step}
    compiled = {name: step for name, step in steps.items() if step is not None}
    title = f"memory per device, GiB ({plan.available_bytes / GIB:.2f} available)"
    lines = [f"{title:<46}" + "".join(f"{name:>13}" for name in [*compiled, "estimate"])]

    def add_row(name: str, values: list[float | None], estimated: float | None) -> None:
        if compiled or estimated is not None:
            cells = [*values, estimated] if values else [*[None] * len(compiled), estimated]
            lines.append(f"  {name:<44}" + "".join(f"{_format_gib(cell):>13}" for cell in cells))

    fitting = [step if step.fits else None for step in compiled.values()]
    add_row("parameters", [], estimate.parameters)
    add_row("optimizer moments, averaged parameters", [], estimate.moments)
    add_row("batch", [], estimate.batch)
    add_row("arguments: state and batch", [step and step.argument_bytes for step in fitting], None)
    add_row("activations", [], estimate.activations)
    add_row("gradients, cast parameters", [], estimate.gradients)
    add_row("all temporaries", [step and step.temporary_bytes for step in fitting], None)
    add_row("code", [step and step.code_bytes for step in fitting], None)
    add_row("total", [step.needed_bytes for step in compiled.values()], estimate.total)
    verdicts = [step.fits for step in compiled.values()] + [estimate.total <= plan.available_bytes]
    lines.append(f"  {'':<44}" + "".join(map(_format_verdict, verdicts)))
    if not compiled:
        add_row("total of the evaluation step", [], plan.eval_memory_estimate)
        lines.append(f"  {'':<44}{_format_verdict(plan.eval_step_fits)}")
    return "\n".join(lines)


def _format_gib(num_bytes: float | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / GIB:.2f}"


def _format_verdict(fits: bool) -> str:
    return f"{'fits' if fits else 'TOO LARGE':>13}"


def _format_bounds(plan: Plan) -> str:
    assert plan.bound is not None
    chip, run, bound = plan.topology.chip, plan.run, plan.bound
    recomputed = run.recomputed_flops / (run.model_flops + run.recomputed_flops)
    sent = sum(collective.num_bytes for collective in plan.collectives)
    bandwidth = f"{plan.topology.ici_bandwidth / _GB:.0f} GB/s per chip"
    leaves_domain = plan.topology.num_slices > 1 or bool(
        chip.nvlink_domain and plan.topology.num_chips > chip.nvlink_domain
    )
    if leaves_domain and chip.network_bandwidth:
        bandwidth += f", network {chip.network_bandwidth / _GB:g}"
    elif leaves_domain:
        bandwidth += ", network unknown"
    rows = [
        (
            "arithmetic",
            f"{run.executed_flops / _TERA:.2f} TFLOP, {recomputed:.0%} recomputed",
            bound.arithmetic,
            f"{chip.flops / chip.devices_per_chip / _TERA:.0f} TFLOP/s",
        ),
        (
            "memory",
            f"{plan.hbm_bytes / _GB:.2f} GB" + ("" if plan.train_step else " or more"),
            bound.memory,
            f"{chip.memory_bandwidth / chip.devices_per_chip / _GB:.0f} GB/s",
        ),
        ("network", f"{sent / _GB:.3f} GB", bound.network, bandwidth),
    ]
    lines = [f"{'per step and device':<46}{'lower bound':>15}"]
    lines += [
        f"  {name:<12}{amount:<32}{seconds * 1e3:>12.2f} ms   {rate}"
        for name, amount, seconds, rate in rows
    ]
    return "\n".join(lines)


def _format_collectives(plan: Plan) -> str:
    if not plan.collectives:
        return "collectives: none"
    lines = [f"{'collectives per step':<24}{'dtype':<6}{'axis':<8}{'count':>6}{'MB':>12}   tensors"]
    lines += [
        f"  {c.op:<22}{c.dtype:<6}{c.mesh_axis:<8}{c.num_executions:>6,}"
        f"{c.num_bytes / _MB:>12,.3f}   {c.tensor_role}"
        for c in plan.collectives
    ]
    unexpected = sum(c.num_bytes for c in plan.collectives if c.is_unexpected)
    if unexpected:
        lines.append(
            f"  WARNING: {unexpected / _MB:,.1f} MB are activations, which a data-parallel step "
            "should not send"
        )
    return "\n".join(lines)


def _format_cost(plan: Plan) -> str:
    assert plan.bound is not None
    assert plan.cost is not None
    bound, cost = plan.bound, plan.cost
    return (
        f"bound: {bound.seconds * 1e3:.1f} ms per step, limited by {bound.limit} "
        f"({bound.serial_seconds * 1e3:.1f} ms without overlap)\n"
        f"  {cost.images_per_second:,.0f} images/s, {cost.images_per_second_per_chip:,.0f} per "
        f"chip; model FLOPs utilization {cost.model_flops_utilization:.1%}\n"
        f"  {plan.run.num_steps:,} steps: {cost.days:.2f} days, {cost.core_days:,.1f} core-days "
        f"({plan.topology.num_devices:,} devices × days)"
    )


def _format_misfit(plan: Plan) -> str:
    lines = []
    for name, step in (("training", plan.train_step), ("evaluation", plan.eval_step)):
        if step and not step.fits:
            lines.append(_format_compiled_misfit(name, step))
    if plan.train_step is None:
        estimates = {
            "training": plan.memory_estimate.total,
            "evaluation": plan.eval_memory_estimate,
        }
        lines += [
            f"the {name} step exceeds device memory by about "
            f"{(num_bytes - plan.available_bytes) / GIB:.1f} GiB, according to the estimate"
            for name, num_bytes in estimates.items()
            if num_bytes > plan.available_bytes
        ]
    if not plan.eval_step_fits:
        lines.append(f"  lower config.eval_batch_size={plan.config.eval_batch_size}")
    if plan.train_step_fits or (plan.train_step and plan.train_step.needed_bytes is None):
        return "\n".join(lines)
    if suggestions := suggest_flags(plan):
        lines.append("according to estimates, each of these flags makes it fit:")
        lines += [f"  {suggestion}" for suggestion in suggestions]
    else:
        lines.append("no single setting saves enough memory; try combinations with --sweep")
    return "\n".join(lines)


def _format_compiled_misfit(name: str, step: CompiledStep) -> str:
    if step.needed_bytes is None:
        text = f"the {name} step does not fit, by an unknown amount: {step.message}"
        return textwrap.fill(text, _WIDTH)
    excess = (step.needed_bytes - step.available_bytes) / GIB
    return f"the {name} step exceeds device memory by about {excess:.1f} GiB"


def suggest_flags(plan: Plan) -> list[str]:
    """Suggests flags that make a run fit according to estimates, one change each, cheapest first.

    If the compiler needs more memory than estimated, estimates are scaled by its ratio.
    """
    run, config = plan.run, plan.config
    needed = plan.train_step.needed_bytes if plan.train_step else None
    scale = max(1.0, (needed or 0.0) / plan.memory_estimate.total)
    more_recomputation = REMAT_POLICIES[REMAT_POLICIES.index(run.remat) + 1 :]
    larger = larger_topologies(plan.topology)
    variations: dict[str, dict[Any, RunSpec]] = {
        "--config.model.remat": {name: run._replace(remat=name) for name in more_recomputation},
        "--config.recipe.grad_accum_steps": {
            number: run._replace(num_microbatches=number)
            for number in _doubled(run.num_microbatches)
        },
        "--config.mesh.fsdp": {fsdp: run._replace(fsdp=fsdp) for fsdp in _doubled(run.fsdp)},
        "--topology": {t.name: run._replace(num_devices=t.num_devices) for t in larger},
    }
    suggestions = []
    for flag, runs in variations.items():
        changes_mesh = flag in ("--config.mesh.fsdp", "--topology")
        # With a fixed data axis, the mesh would not fit another number of devices.
        infer_data = " --config.mesh.data=0" if changes_mesh and config.mesh.data else ""
        for value, changed in runs.items():
            size = estimate_memory(changed).total * scale
            if size <= plan.available_bytes and _is_divisible(
                changed, plan.topology.num_slices, config.eval_batch_size
            ):
                setting = f"{flag}={value}{infer_data}"
                suggestions.append(f"{setting:<40} about {size / GIB:.1f} GiB")
                break
    return suggestions


def _is_divisible(run: RunSpec, num_slices: int, eval_batch_size: int) -> bool:
    """Returns whether a run's parameters and batches divide evenly over its devices."""
    return not (
        (run.num_devices // num_slices) % run.fsdp
        or run.batch_size % (run.num_devices * run.num_microbatches)
        or eval_batch_size % run.num_devices
    )


def _doubled(number: int) -> list[int]:
    return [number * 2**power for power in range(1, 8)]
