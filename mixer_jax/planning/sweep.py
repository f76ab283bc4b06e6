"""Many plans of one run: settings that change nothing but speed and memory, ranked."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mixer_jax.config.config import resolve_num_steps
from mixer_jax.config.schema import FIELDS
from mixer_jax.distributed.divisibility import check_divisible, check_mesh
from mixer_jax.errors import UserError
from mixer_jax.planning.cost_model import RunSpec, estimate_memory, run_spec
from mixer_jax.planning.dataset_specs import placeholder_datasets, resolve_for_platform
from mixer_jax.planning.planner import Plan, make_plan, say, with_eval_step
from mixer_jax.planning.report import plan_to_dict
from mixer_jax.planning.suggestions import REMAT
from mixer_jax.planning.topology import GIB, Topology, tpu_devices

DIMENSIONS = ("accumulation", "fsdp", "remat", "unroll")
# Estimates are good to about this factor; what needs more is not compiled.
_TOLERANCE = 1.5
_LARGEST_FSDP = 8
_MOST_PIECES = 8
_FEWEST_ROWS = 8
# Seconds that compiling takes on two cores: a block laid out adds to the rest.
_SECONDS, _SECONDS_A_BLOCK = 60, 12
_QUICKER = 5


class SweepPoint(NamedTuple):
    """What a sweep changes.

    Attributes:
        pieces: recipe.grad_accum_steps.
        fsdp: mesh.fsdp.
        remat: model.remat.
        unroll: model.scan_unroll.
    """

    pieces: int
    fsdp: int
    remat: str
    unroll: int

    def flags(self) -> str:
        """Returns it as flags of the command line."""
        return (
            f"--config.recipe.grad_accum_steps={self.pieces} --config.mesh.data=0 "
            f"--config.mesh.fsdp={self.fsdp} --config.model.remat={self.remat} "
            f"--config.model.scan_unroll={self.unroll}"
        )


class SweepResult(NamedTuple):
    """A setting, and what a run with it would be.

    Attributes:
        setting: that.
        estimate: bytes of the training step on a device.
        plan: of the run; None: the estimate rules it out.
        is_present: whether the run is configured so.
    """

    setting: SweepPoint
    estimate: float
    plan: Plan | None
    is_present: bool = False

    @property
    def fits(self) -> bool:
        """Whether it fits, as far as is known: the evaluation step may not be compiled."""
        return self.plan is not None and self.plan.fits

    @property
    def rank(self) -> tuple[bool, float, float, float]:
        """Sorts what fits first, then by the bound, then by what is sent and moved beside it.

        Where both are equal: by what compiling takes.
        """
        bound = self.plan.bound if self.plan else None
        training = self.plan.training if self.plan else None
        return (
            not (self.plan and self.plan.train_step_fits),
            round(bound.seconds, 6) if bound else math.inf,
            bound.serial_seconds if bound else math.inf,
            training.seconds if training else self.estimate,
        )


def sweep(
    config: ConfigDict, topology: Topology, dimensions: str, *, quick: bool = False
) -> list[SweepResult]:
    """Returns plans for settings of a run, the best first; tells on standard error how it goes.

    What cannot fit by estimate is not compiled, nor what computes a batch in more pieces than is
    needed: that only adds traffic. Of TPUs, only the best's evaluation step is compiled. Ctrl-C
    ends it with what was tried.

    Args:
        config: valid by `config.validate`.
        topology: from `parse_topology`.
        dimensions: "all", or some of `DIMENSIONS`, separated by commas.
        quick: as for `make_plan`.

    Raises:
        UserError: a dimension is unknown, or the mesh or a batch does not divide.
    """
    config = resolve_for_platform(config, topology.chip.platform)
    chosen = DIMENSIONS if dimensions == "all" else tuple(dimensions.split(","))
    for name in chosen:
        if name not in DIMENSIONS:
            known = ", ".join(DIMENSIONS)
            raise UserError(f"--sweep={dimensions}: {name!r} is unknown; choose of {known}")
    source = placeholder_datasets(config).train
    num_steps = resolve_num_steps(config, len(source))
    work = run_spec(config, source.num_classes, num_steps, topology.num_devices)
    check_mesh(config.mesh.data, work.fsdp, work.devices, topology.slices)
    pieces = 1 if "accumulation" in chosen else work.pieces
    check_divisible("config.batch_size", work.batch_size, work.devices, pieces)
    check_divisible("config.eval_batch_size", config.eval_batch_size, work.devices)
    now = current_point(work)
    settings = list(candidates(work, chosen, topology))
    estimates = {setting: estimate_memory(_with(work, setting)).total for setting in settings}
    possible = [s for s in settings if estimates[s] <= topology.allowed * _TOLERANCE]
    minutes = _minutes(work, possible, quick) if topology.chip.is_tpu else ""
    say(f"{len(possible)} of {len(settings)} settings may fit{minutes}")
    devices = tpu_devices(topology) if topology.chip.is_tpu else None
    results = [SweepResult(s, estimates[s], None, s == now) for s in settings if s not in possible]
    done: list[SweepResult] = []
    for number, setting in enumerate(possible, start=1):
        if any(_fits_with_less(result, setting) for result in done):
            continue
        try:
            plan = make_plan(
                _changed(config, setting), topology, devices=devices, evaluation=False, quick=quick
            )
        except KeyboardInterrupt:
            if not done:
                raise
            say("interrupted; what was tried is ranked, its evaluation step not tried")
            return sorted(results + done, key=lambda result: result.rank)
        done.append(SweepResult(setting, estimates[setting], plan, setting == now))
        say(f"[{number}/{len(possible)}] {_line(done[-1])}")
    best, *others = sorted(results + done, key=lambda result: result.rank)
    if best.fits and best.plan:
        best = best._replace(plan=with_eval_step(best.plan))
    return [best, *others]


def current_point(work: RunSpec) -> SweepPoint:
    """Returns the setting that a run has."""
    return SweepPoint(work.pieces, work.fsdp, work.remat, work.unroll)


def _fits_with_less(result: SweepResult, setting: SweepPoint) -> bool:
    """Returns whether a result fits that differs from a setting only by fewer pieces."""
    fewer = result.setting.pieces < setting.pieces
    return (
        fewer and result.fits and result.setting == setting._replace(pieces=result.setting.pieces)
    )


def candidates(work: RunSpec, chosen: Sequence[str], topology: Topology) -> Iterator[SweepPoint]:
    """Yields settings to try: the present one, then those first that compile fast.

    Args:
        work: the run as it is configured.
        chosen: dimensions to change.
        topology: to run on.
    """
    now = current_point(work)
    rows = work.batch_size // work.devices
    blocks = work.widths.num_blocks
    pieces = [
        n
        for n in (2**power for power in range(_MOST_PIECES.bit_length()))
        if n == 1 or (rows % n == 0 and rows // n >= _FEWEST_ROWS)
    ]
    in_slice = topology.num_devices // topology.slices
    splits = [n for n in range(1, _LARGEST_FSDP + 1) if in_slice % n == 0 and n & (n - 1) == 0]
    policies = [name for name in REMAT if name in FIELDS["model.remat"].choices]
    # Formulas do not tell what unrolling does.
    groups = sorted({1, 4 if blocks % 4 == 0 else min(2, blocks)})
    groups = groups if topology.chip.is_tpu else [work.unroll]
    by_name: dict[str, list[Any]] = {
        "accumulation": pieces,
        "fsdp": sorted({1, max(splits)}),
        "remat": policies,
        "unroll": groups,
    }
    choices = [
        by_name[name] if name in chosen else [value]
        for name, value in zip(DIMENSIONS, now, strict=True)
    ]
    made = {SweepPoint(*values) for values in itertools.product(*choices)} - {now}
    if rows % now.pieces == 0:
        yield now
    yield from sorted(
        made, key=lambda s: (s.unroll or blocks, s.fsdp, REMAT.index(s.remat), s.pieces)
    )


def format_ranking(results: list[SweepResult]) -> str:
    """Returns the results of a sweep as text, with the flags of the best; * marks the present."""
    lines = [
        f"{'pieces':>6} {'fsdp':>5} {'remat':>11} {'unroll':>7} {'GiB':>8} {'':>10} {'ms':>9} "
        f"{'limit':>11} {'images/s':>10} {'compile s':>10}"
    ]
    for result in results:
        plan, setting = result.plan, result.setting
        size, verdict = f"~{result.estimate / GIB:.1f}", "ruled out"
        numbers = f"{'':>9} {'':>11} {'':>10} {'':>10}"
        if plan is not None:
            verdict = "fits" if plan.train_step_fits else "too large"
            step = plan.training
            needed = step.needed if step else plan.estimate.total
            size = "?" if needed is None else f"{needed / GIB:.1f}"
            seconds = f"{step.seconds:.0f}" if step else ""
            if plan.bound and plan.cost:
                numbers = (
                    f"{plan.bound.seconds * 1e3:>9.1f} {plan.bound.limit:>11} "
                    f"{plan.cost.images_per_second:>10,.0f} {seconds:>10}"
                )
            else:
                numbers = f"{'':>9} {'':>11} {'':>10} {seconds:>10}"
        lines.append(
            f"{setting.pieces:>6} {setting.fsdp:>5} {setting.remat:>11} "
            f"{setting.unroll or 'all':>7} {size:>8} {verdict:>10} {numbers}"
            + (" *" if result.is_present else "")
        )
    notes = ["", *(["* as configured"] if any(result.is_present for result in results) else [])]
    lines += [*notes, "fits: the training step; of the best, its evaluation step is tried, too"]
    lines += _verdict(results[0])
    return "\n".join(line.rstrip() for line in lines)


def _verdict(best: SweepResult) -> list[str]:
    if best.plan is None or not best.plan.train_step_fits:
        return ["none fits: take more chips"]
    lines = [f"best: {best.setting.flags()}"]
    if not best.fits:
        size = best.plan.config.eval_batch_size
        lines.append(f"its evaluation step does not fit; lower config.eval_batch_size={size}")
    return lines


def ranking_to_dict(results: list[SweepResult]) -> dict[str, Any]:
    """Returns the results of a sweep as what JSON can hold."""
    rows = [
        {
            "settings": result.setting._asdict(),
            "estimated_bytes": result.estimate,
            "present": result.is_present,
            "fits": result.fits,
            "plan": plan_to_dict(result.plan) if result.plan else None,
        }
        for result in results
    ]
    best = results[0].setting.flags() if results[0].fits else None
    return {"best": best, "results": rows}


def _with(work: RunSpec, setting: SweepPoint) -> RunSpec:
    return work._replace(**setting._asdict())


def _changed(config: ConfigDict, setting: SweepPoint) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.recipe.grad_accum_steps = setting.pieces
    changed.mesh.data, changed.mesh.fsdp = 0, setting.fsdp
    changed.model.remat, changed.model.scan_unroll = setting.remat, setting.unroll
    return changed


def _minutes(work: RunSpec, settings: list[SweepPoint], quick: bool) -> str:
    """Returns what compiling these settings takes, roughly."""
    blocks = sum(setting.unroll or work.widths.num_blocks for setting in settings)
    seconds = _SECONDS * len(settings) + _SECONDS_A_BLOCK * blocks
    minutes = math.ceil(seconds / (_QUICKER if quick else 1) / 60)
    return f"; compiling them takes up to {minutes} minutes on two cores"


def _line(result: SweepResult) -> str:
    plan, setting = result.plan, result.setting
    assert plan is not None
    seconds = f", compiled in {plan.training.seconds:.0f} s" if plan.training else ""
    verdict = f"{plan.bound.seconds * 1e3:.1f} ms" if plan.bound else "too large"
    return (
        f"pieces {setting.pieces}, fsdp {setting.fsdp}, remat {setting.remat}, unroll "
        f"{setting.unroll or 'all'}: {verdict}{seconds}"
    )
