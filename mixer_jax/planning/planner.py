"""From a configuration and a topology to a plan: what fits, what moves, how long it takes."""

import sys
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mixer_jax.config import check_warmup, resolve_num_steps
from mixer_jax.errors import UserError
from mixer_jax.planning.carried import carried
from mixer_jax.planning.collectives import Transfer, transfers
from mixer_jax.planning.formulas import (
    Memory,
    Work,
    memory,
    traffic_bound,
    transfers_by_formula,
    work_of,
)
from mixer_jax.planning.nominal import nominal_sources, plannable
from mixer_jax.planning.program import Program
from mixer_jax.planning.roofline import Bound, Cost, bound, cost
from mixer_jax.planning.topology import Place, Topology, places_of, tpu_devices
from mixer_jax.planning.traffic import traffic

GIB = 2**30


class Step(NamedTuple):
    """One step on one device, as compiled.

    Attributes:
        fits: into the memory that the compiler allows.
        seconds: that compiling took.
        arguments: bytes of state and batch; 0 where it does not fit.
        temporaries: bytes of activations, gradients and the like, and of results.
        code: bytes.
        needed: bytes in all; where it does not fit, at the least.
        allowed: bytes.
    """

    fits: bool
    seconds: float
    arguments: float
    temporaries: float
    code: float
    needed: float
    allowed: float


class Plan(NamedTuple):
    """What a run would be on a topology.

    Attributes:
        config: as it would run there.
        topology: that.
        work: the run in numbers.
        estimate: of memory, by formula.
        training: the training step as compiled; None: not compiled.
        evaluation: likewise, of the step that scores.
        memory_bytes: moved by a device in a training step.
        transfers: between devices in a training step.
        bound: on the time of a training step; None: there is none, it does not fit.
        cost: of the run at that bound.
        quick: whether it was compiled for less long than a run's programs are.
    """

    config: ConfigDict
    topology: Topology
    work: Work
    estimate: Memory
    training: Step | None
    evaluation: Step | None
    memory_bytes: float
    transfers: list[Transfer]
    bound: Bound | None
    cost: Cost | None
    quick: bool = False

    @property
    def allowed(self) -> float:
        """Bytes of memory that programs may use on a device."""
        return self.training.allowed if self.training else self.topology.chip.memory_gib * GIB

    @property
    def fits(self) -> bool:
        """Whether all steps fit, as compiled or, where they are not, as estimated."""
        steps = [step for step in (self.training, self.evaluation) if step]
        return all(step.fits for step in steps) if steps else self.estimate.total <= self.allowed


def make_plan(
    config: ConfigDict,
    topology: Topology,
    *,
    devices: list[Any] | None = None,
    evaluation: bool = True,
    quick: bool = False,
) -> Plan:
    """Returns the plan of a run: compiled for TPUs, by formulas alone for GPUs.

    Args:
        config: valid by `config.validate`.
        topology: from `parse_topology`.
        devices: of it, where they are made already.
        evaluation: whether to compile the step that scores, too.
        quick: whether to compile for less long and so to somewhat slower programs.

    Raises:
        UserError: the config does not fit the topology, in number of devices or in what it says
            of its data.
    """
    config = plannable(config)
    if not topology.chip.is_tpu:
        return _by_formula(config, topology)
    # From here on the heavy libraries are needed.
    from mixer_jax.planning.compiling import (
        TooLarge,
        compile_evaluation,
        compile_training,
        prepare,
    )

    devices = devices or tpu_devices(topology)
    experiment = prepare(config, devices)
    work = work_of(config, experiment.about.num_classes, experiment.num_steps, len(devices))
    if evaluation:
        check_divides("config.eval_batch_size", config.eval_batch_size, len(devices))
    compiled = compile_training(experiment, quick)
    training = step_of(compiled, work, topology)
    scoring = None
    if evaluation:
        scoring = step_of(compile_evaluation(experiment, quick), work, topology)
    estimate = memory(work)
    plan = Plan(config, topology, work, estimate, training, scoring, 0.0, [], None, None, quick)
    if isinstance(compiled, TooLarge):
        return plan
    sent = sent_by(compiled.program, work, topology, dict(experiment.mesh.shape))
    plan = plan._replace(memory_bytes=traffic(compiled.program).total(), transfers=sent)
    return _with_bound(plan, places_of(topology, list(experiment.mesh.devices.flat)))


def sent_by(
    program: Program, work: Work, topology: Topology, mesh: dict[str, int]
) -> list[Transfer]:
    """Returns what the devices of a compiled training step send each other.

    Args:
        program: that.
        work: the run in numbers.
        topology: it is compiled for.
        mesh: sizes of its axes by name.
    """
    rows = [(work.image_size, work.image_size, 3), (work.num_classes,)]
    several = topology.slices > 1
    known = carried(work.shapes, work.fsdp, rows, in_slices=several)
    return transfers(program, mesh, known, topology.slices)


def _by_formula(config: ConfigDict, topology: Topology) -> Plan:
    source = nominal_sources(config).train
    num_steps = resolve_num_steps(config, len(source))
    check_warmup(config, num_steps)
    work = work_of(config, source.num_classes, num_steps, topology.num_devices)
    check_mesh(config, topology.num_devices)
    check_divides(
        "config.batch_size", work.batch_size, work.devices, config.recipe.accumulation_steps
    )
    check_divides("config.eval_batch_size", config.eval_batch_size, work.devices)
    sent = transfers_by_formula(work)
    plan = Plan(
        config,
        topology,
        work,
        memory(work),
        None,
        None,
        traffic_bound(work),
        sent,
        None,
        None,
    )
    return _with_bound(plan, places_of(topology, None))


def _with_bound(plan: Plan, places: list[Place]) -> Plan:
    work, topology = plan.work, plan.topology
    executed = (work.model_flops + work.recomputed_flops) / work.devices
    least = bound(topology, places, executed, plan.memory_bytes, plan.transfers)
    return plan._replace(
        bound=least,
        cost=cost(topology, work.batch_size, work.num_steps, work.model_flops, least.seconds),
    )


def step_of(compiled: Any, work: Work, topology: Topology) -> Step:
    """Returns a step from what compiling it gave."""
    allowed = topology.chip.memory_gib * GIB
    if hasattr(compiled, "program"):
        temporaries = compiled.temporaries + compiled.outputs
        return Step(
            True,
            compiled.seconds,
            compiled.arguments,
            temporaries,
            compiled.code,
            compiled.total,
            allowed,
        )
    lies = memory(work)
    state = lies.parameters + lies.moments + lies.batch if compiled.only_temporaries else 0.0
    return Step(
        False, compiled.seconds, 0, 0, 0, compiled.needed + state, compiled.allowed or allowed
    )


def check_mesh(config: ConfigDict, devices: int) -> None:
    """Raises UserError unless the mesh of a config is made up of so many devices."""
    data, fsdp = config.mesh.data, config.mesh.fsdp
    if devices % fsdp or (data and data * fsdp != devices):
        raise UserError(
            f"mesh.data={data} and mesh.fsdp={fsdp} do not make up the {devices} devices; "
            f"set mesh.fsdp to a divisor of {devices} and mesh.data to 0"
        )


def check_divides(key: str, size: int, devices: int, pieces: int = 1) -> None:
    """Raises UserError unless a batch divides over devices and pieces, naming the nearest."""
    unit = devices * pieces
    if size % unit:
        below = size // unit * unit
        nearest = " and ".join(str(near) for near in (below, below + unit) if near)
        what = f"{devices} devices" + (f" × {pieces} accumulation steps" if pieces > 1 else "")
        raise UserError(f"{key}={size} is not divisible by {what}; the nearest are {nearest}")


def say(text: str) -> None:
    """Tells on standard error how far the work is."""
    print(text, file=sys.stderr, flush=True)
