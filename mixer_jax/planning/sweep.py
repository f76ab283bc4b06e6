"""Sweep over settings that change only speed and memory, ranked by the bound on the step time."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mixer_jax.config.schema import RunConfig
from mixer_jax.distributed.sharding import check_divisible, check_mesh
from mixer_jax.errors import UserError
from mixer_jax.planning.cost_model import estimate_memory
from mixer_jax.planning.planner import Plan, add_eval_step, make_plan
from mixer_jax.planning.report import plan_to_dict
from mixer_jax.planning.run_spec import REMAT_POLICIES, RunSpec, resolve_for_platform, run_spec
from mixer_jax.planning.topology import GIB, Topology, tpu_devices

DIMENSIONS = ("accumulation", "fsdp", "remat", "unroll")
# Estimates are accurate to about this factor; anything that exceeds memory by more is not compiled.
_ESTIMATE_TOLERANCE = 1.5
# Numbers of microbatches, and sizes of the fsdp axis.
_SIZES = (1, 2, 4, 8)
_MIN_MICROBATCH_PER_DEVICE = 8
# Compile time on two cores, in seconds: per program, and per unrolled block.
_PROGRAM_SECONDS, _BLOCK_SECONDS = 60, 12
_FAST_COMPILE_SPEEDUP = 5


class SweepPoint(NamedTuple):
    """Settings that a sweep changes, named as in `RunSpec`."""

    num_microbatches: int
    fsdp: int
    remat: str
    scan_unroll: int

    def flags(self) -> str:
        """Formats the settings as command-line flags."""
        return (
            f"--config.recipe.grad_accum_steps={self.num_microbatches} --config.mesh.data=0 "
            f"--config.mesh.fsdp={self.fsdp} --config.model.remat={self.remat} "
            f"--config.model.scan_unroll={self.scan_unroll}"
        )

    def apply(self, config: RunConfig) -> RunConfig:
        """Returns a copy of a config with these settings."""
        replace = dataclasses.replace
        return replace(
            config,
            recipe=replace(config.recipe, grad_accum_steps=self.num_microbatches),
            mesh=replace(config.mesh, data=0, fsdp=self.fsdp),
            model=replace(config.model, remat=self.remat, scan_unroll=self.scan_unroll),
        )


class SweepResult(NamedTuple):
    """Settings and the plan of a run with them.

    Attributes:
        estimated_bytes: Estimated bytes of the training step, per device.
        plan: Plan of the run; None if the estimate rules it out.
        is_current: Whether the config has these settings.
    """

    point: SweepPoint
    estimated_bytes: float
    plan: Plan | None
    is_current: bool = False

    @property
    def fits(self) -> bool:
        """True if the planned steps fit into memory; the evaluation step may not be planned."""
        return self.plan is not None and self.plan.fits

    @property
    def sort_key(self) -> tuple[bool, float, float, float]:
        """Key that sorts fitting results first, then by bound, bound without overlap, compile time.

        Bounds that differ by less than a microsecond are equal.
        """
        bound = self.plan.bound if self.plan else None
        train_step = self.plan.train_step if self.plan else None
        return (
            not (self.plan and self.plan.train_step_fits),
            round(bound.seconds, 6) if bound else math.inf,
            bound.serial_seconds if bound else math.inf,
            train_step.compile_seconds if train_step else self.estimated_bytes,
        )


def sweep(
    config: RunConfig, topology: Topology, dimensions: str, *, fast_compile: bool = False
) -> list[SweepResult]:
    """Plans a run with different settings and ranks them, the best first.

    Settings are skipped if they cannot fit according to the estimate, or if a result with fewer
    microbatches fits, since more only add traffic. For TPUs, the evaluation step is compiled for
    the best result only. Progress is logged to stderr. Ctrl-C ranks the results so far.

    Args:
        config: Run to plan.
        topology: Topology to run on.
        dimensions: "all", or a comma-separated list of `DIMENSIONS`.
        fast_compile: Whether to compile in less time to less optimized programs.

    Raises:
        UserError: A dimension is unknown, or a mesh axis or a batch is not divisible.
    """
    config = resolve_for_platform(config, topology.chip.platform)
    names = _parse_dimensions(dimensions)
    run = run_spec(config, topology.num_devices)
    check_mesh(config.mesh.data, run.fsdp, run.num_devices, topology.num_slices)
    min_microbatches = 1 if "accumulation" in names else run.num_microbatches
    check_divisible("config.batch_size", run.batch_size, run.num_devices, min_microbatches)
    check_divisible("config.eval_batch_size", config.eval_batch_size, run.num_devices)

    current = current_point(run)
    limit = topology.hbm_bytes * _ESTIMATE_TOLERANCE
    results = [
        SweepResult(
            point, estimate_memory(run._replace(**point._asdict())).total, None, point == current
        )
        for point in candidates(run, names, topology)
    ]
    possible = [result for result in results if result.estimated_bytes <= limit]
    duration = _format_duration(run, possible, fast_compile) if topology.chip.is_tpu else ""
    _log(f"{len(possible)} of {len(results)} settings may fit into memory{duration}")
    devices = tpu_devices(topology) if topology.chip.is_tpu else None
    ruled_out = [result for result in results if result.estimated_bytes > limit]
    planned: list[SweepResult] = []
    for number, result in enumerate(possible, start=1):
        if any(_fits_with_fewer_microbatches(other, result.point) for other in planned):
            continue
        try:
            plan = make_plan(
                result.point.apply(config),
                topology,
                devices=devices,
                with_eval=False,
                fast_compile=fast_compile,
            )
        except KeyboardInterrupt:
            if not planned:
                raise
            _log("interrupted; ranking the results so far, without an evaluation step")
            return sorted(ruled_out + planned, key=lambda result: result.sort_key)
        planned.append(result._replace(plan=plan))
        _log(f"[{number}/{len(possible)}] {_format_progress(result.point, plan)}")
    best, *others = sorted(ruled_out + planned, key=lambda result: result.sort_key)
    if best.fits and best.plan:
        best = best._replace(plan=add_eval_step(best.plan))
    return [best, *others]


def _parse_dimensions(dimensions: str) -> tuple[str, ...]:
    names = DIMENSIONS if dimensions == "all" else tuple(dimensions.split(","))
    for name in names:
        if name not in DIMENSIONS:
            raise UserError(
                f"--sweep must be all or a list of {', '.join(DIMENSIONS)}, got {name!r}."
            )
    return names


def current_point(run: RunSpec) -> SweepPoint:
    """Returns the settings of a run."""
    return SweepPoint(run.num_microbatches, run.fsdp, run.remat, run.scan_unroll)


def _fits_with_fewer_microbatches(result: SweepResult, point: SweepPoint) -> bool:
    """Returns whether a result fits that differs from a point only in fewer microbatches."""
    same_otherwise = result.point._replace(num_microbatches=point.num_microbatches) == point
    fewer = result.point.num_microbatches < point.num_microbatches
    return fewer and result.fits and same_otherwise


def candidates(run: RunSpec, dimensions: Sequence[str], topology: Topology) -> Iterator[SweepPoint]:
    """Yields settings to try: the current ones, then those first that compile fast."""
    current, num_blocks = current_point(run), run.num_blocks
    images = run.batch_size // run.num_devices
    microbatches = [
        n
        for n in _SIZES
        if n == 1 or (images % n == 0 and images // n >= _MIN_MICROBATCH_PER_DEVICE)
    ]
    slice_devices = topology.num_devices // topology.num_slices
    max_fsdp = max(n for n in _SIZES if slice_devices % n == 0)
    unrolls = {1, 4 if num_blocks % 4 == 0 else min(2, num_blocks)}
    values: dict[str, Sequence[Any]] = {
        "accumulation": microbatches,
        "fsdp": sorted({1, max_fsdp}),
        "remat": REMAT_POLICIES,
        # Formulas do not depend on unrolling.
        "unroll": sorted(unrolls) if topology.chip.is_tpu and num_blocks else [run.scan_unroll],
    }
    choices = [
        values[name] if name in dimensions else [value]
        for name, value in zip(DIMENSIONS, current, strict=True)
    ]
    points = {SweepPoint(*point) for point in itertools.product(*choices)} - {current}
    if images % current.num_microbatches == 0:
        yield current

    def compile_order(point: SweepPoint) -> tuple[int, int, int, int]:
        unroll = point.scan_unroll or num_blocks
        return unroll, point.fsdp, REMAT_POLICIES.index(point.remat), point.num_microbatches

    yield from sorted(points, key=compile_order)


def format_ranking(results: list[SweepResult]) -> str:
    """Formats the results of a sweep as a table, with the flags of the best."""
    header = (
        f"{'microbatches':>12} {'fsdp':>4} {'remat':>10} {'unroll':>6} {'GiB':>6} {'':>9} "
        f"{'bound, ms':>9} {'limit':>10} {'images/s':>9} {'compile, s':>10}"
    )
    lines = [header, *map(_format_row, results), ""]
    if any(result.is_current for result in results):
        lines.append("* current settings")
    lines.append("fits: the training step; the evaluation step is compiled for the best only")
    best = results[0]
    if best.plan is None or not best.plan.train_step_fits:
        lines.append("no setting fits; use more chips")
    else:
        lines.append(f"best: {best.point.flags()}")
        if not best.fits:
            size = best.plan.config.eval_batch_size
            lines.append(f"its evaluation step does not fit; lower config.eval_batch_size={size}")
    return "\n".join(line.rstrip() for line in lines)


def _format_row(result: SweepResult) -> str:
    plan, point = result.plan, result.point
    memory, verdict, compile_time = f"~{result.estimated_bytes / GIB:.1f}", "ruled out", ""
    bound, limit, throughput = "", "", ""
    if plan is not None:
        verdict = "fits" if plan.train_step_fits else "too large"
        step = plan.train_step
        needed = step.needed_bytes if step else plan.memory_estimate.total
        memory = "?" if needed is None else f"{needed / GIB:.1f}"
        compile_time = f"{step.compile_seconds:.0f}" if step else ""
        if plan.bound and plan.cost:
            bound, limit = f"{plan.bound.seconds * 1e3:.1f}", plan.bound.limit
            throughput = f"{plan.cost.images_per_second:,.0f}"
    return (
        f"{point.num_microbatches:>12} {point.fsdp:>4} {point.remat:>10} "
        f"{point.scan_unroll or 'all':>6} {memory:>6} {verdict:>9} "
        f"{bound:>9} {limit:>10} {throughput:>9} {compile_time:>10}"
        + (" *" if result.is_current else "")
    )


def ranking_to_dict(results: list[SweepResult]) -> dict[str, Any]:
    """Converts the results of a sweep to a JSON object."""
    rows = [
        {
            "settings": result.point._asdict(),
            "estimated_bytes": result.estimated_bytes,
            "is_current": result.is_current,
            "fits": result.fits,
            "plan": plan_to_dict(result.plan) if result.plan else None,
        }
        for result in results
    ]
    best = results[0].point.flags() if results[0].fits else None
    return {"best": best, "results": rows}


def _format_duration(run: RunSpec, results: list[SweepResult], fast_compile: bool) -> str:
    """Formats a rough upper bound on the time to compile all settings."""
    num_blocks = sum(result.point.scan_unroll or run.num_blocks for result in results)
    seconds = _PROGRAM_SECONDS * len(results) + _BLOCK_SECONDS * num_blocks
    minutes = math.ceil(seconds / (_FAST_COMPILE_SPEEDUP if fast_compile else 1) / 60)
    return f"; compiling them takes up to {minutes} minutes on two cores"


def _format_progress(point: SweepPoint, plan: Plan) -> str:
    step, bound = plan.train_step, plan.bound
    verdict = f"{bound.seconds * 1e3:.1f} ms" if bound else "too large"
    seconds = f", compiled in {step.compile_seconds:.0f} s" if step else ""
    return (
        f"{point.num_microbatches} microbatches, fsdp {point.fsdp}, remat {point.remat}, "
        f"unroll {point.scan_unroll or 'all'}: {verdict}{seconds}"
    )


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
