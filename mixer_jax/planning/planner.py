"""From a configuration and a topology to a plan: what fits, what moves, how long it takes."""

import sys
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mixer_jax.config.config import check_warmup, resolve_num_steps
from mixer_jax.distributed.divisibility import check_divisible, check_mesh
from mixer_jax.planning.cost_model import (
    Memory,
    RunSpec,
    estimate_collectives,
    estimate_eval_memory,
    estimate_memory,
    min_hbm_bytes,
    run_spec,
)
from mixer_jax.planning.dataset_specs import placeholder_datasets, resolve_for_platform
from mixer_jax.planning.hlo.collectives import Collective, find_collectives
from mixer_jax.planning.hlo.program import Program
from mixer_jax.planning.hlo.tensor_roles import tensor_roles
from mixer_jax.planning.hlo.traffic import traffic
from mixer_jax.planning.roofline import RooflineBound, RunCost, roofline_bound, run_cost
from mixer_jax.planning.topology import DeviceLocation, Topology, device_locations, tpu_devices


class CompiledStep(NamedTuple):
    """One step on one device, as compiled.

    Attributes:
        fits: into the memory that the compiler allows.
        seconds: that compiling took.
        arguments: bytes of state and batch; 0 where it does not fit.
        temporaries: bytes of activations, gradients and the like, and of results.
        code: bytes.
        needed: bytes in all; where it does not fit, at the least; None: the compiler does not say.
        allowed: bytes.
        said: by the compiler where it does not say what is needed.
    """

    fits: bool
    seconds: float
    arguments: float
    temporaries: float
    code: float
    needed: float | None
    allowed: float
    said: str = ""


class Plan(NamedTuple):
    """What a run would be on a topology.

    Attributes:
        config: as it would run there.
        topology: that.
        work: the run in numbers.
        estimate: of the training step's memory, by formula.
        scoring: bytes of the evaluation step, likewise.
        training: the training step as compiled; None: not compiled.
        evaluation: likewise, of the step that scores.
        memory_bytes: moved by a device in a training step.
        transfers: between devices in a training step.
        bound: on the time of a training step; None: there is none, it does not fit.
        cost: of the run at that bound.
        quick: whether it was compiled for less long than a run's programs are.
        uncounted: loops of the training step with products or collectives in them that count as
            if they ran once, because it is not known how often they run.
    """

    config: ConfigDict
    topology: Topology
    work: RunSpec
    estimate: Memory
    scoring: float
    training: CompiledStep | None
    evaluation: CompiledStep | None
    memory_bytes: float
    transfers: list[Collective]
    bound: RooflineBound | None
    cost: RunCost | None
    quick: bool = False
    uncounted: int = 0

    @property
    def allowed(self) -> float:
        """Bytes of memory that programs may use on a device."""
        return self.training.allowed if self.training else self.topology.allowed

    @property
    def fits(self) -> bool:
        """Whether all steps fit, as compiled or, where they are not, as estimated."""
        steps = [step for step in (self.training, self.evaluation) if step]
        if steps:
            return all(step.fits for step in steps)
        return max(self.estimate.total, self.scoring) <= self.allowed

    @property
    def train_step_fits(self) -> bool:
        """Whether the training step does, whatever the evaluation step."""
        return self.training.fits if self.training else self.estimate.total <= self.allowed


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
    config = resolve_for_platform(config, topology.chip.platform)
    if not topology.chip.is_tpu:
        return _by_formula(config, topology)
    # From here on the heavy libraries are needed.
    from mixer_jax.planning.aot_compile import OutOfMemory, build_for_topology, compile_train_step

    devices = devices or tpu_devices(topology)
    experiment = build_for_topology(config, devices)
    work = run_spec(config, experiment.about.num_classes, experiment.num_steps, len(devices))
    if evaluation:
        check_divisible("config.eval_batch_size", config.eval_batch_size, len(devices))
    compiled = compile_train_step(experiment, quick)
    plan = _uncompiled(config, topology, work)
    lies = plan.estimate
    state = lies.parameters + lies.moments + lies.batch
    plan = plan._replace(training=to_compiled_step(compiled, topology, state), quick=quick)
    if evaluation:
        plan = with_eval_step(plan, experiment)
    if isinstance(compiled, OutOfMemory):
        return plan
    sent = collectives_of(compiled.program, work, topology, dict(experiment.mesh.shape))
    plan = plan._replace(
        memory_bytes=traffic(compiled.program).total(),
        transfers=sent,
        uncounted=len(compiled.program.uncounted()),
    )
    return _with_bound(plan, device_locations(topology, list(experiment.mesh.devices.flat)))


def with_eval_step(plan: Plan, experiment: Any = None) -> Plan:
    """Returns a plan for TPUs with the evaluation step compiled, too; one for GPUs as it is.

    Args:
        plan: from `make_plan`.
        experiment: what it is made of; None: it is made once more.
    """
    if not plan.topology.chip.is_tpu:
        return plan
    from mixer_jax.planning.aot_compile import build_for_topology, compile_eval_step

    experiment = experiment or build_for_topology(plan.config, tpu_devices(plan.topology))
    compiled = compile_eval_step(experiment, plan.quick)
    step = to_compiled_step(compiled, plan.topology, plan.estimate.parameters)
    return plan._replace(evaluation=step)


def collectives_of(
    program: Program, work: RunSpec, topology: Topology, mesh: dict[str, int]
) -> list[Collective]:
    """Returns what the devices of a compiled training step send each other.

    Args:
        program: that.
        work: the run in numbers.
        topology: it is compiled for.
        mesh: sizes of its axes by name.
    """
    rows = [(work.image_size, work.image_size, 3), (work.num_classes,)]
    several = topology.slices > 1
    known = tensor_roles(work.shapes, work.fsdp, rows, in_slices=several)
    return find_collectives(program, mesh, known, topology.slices)


def _by_formula(config: ConfigDict, topology: Topology) -> Plan:
    source = placeholder_datasets(config).train
    num_steps = resolve_num_steps(config, len(source))
    check_warmup(config, num_steps)
    work = run_spec(config, source.num_classes, num_steps, topology.num_devices)
    check_mesh(config.mesh.data, config.mesh.fsdp, topology.num_devices)
    check_divisible(
        "config.batch_size", work.batch_size, work.devices, config.recipe.grad_accum_steps
    )
    check_divisible("config.eval_batch_size", config.eval_batch_size, work.devices)
    plan = _uncompiled(config, topology, work)._replace(
        memory_bytes=min_hbm_bytes(work), transfers=estimate_collectives(work)
    )
    return _with_bound(plan, device_locations(topology, None))


def _uncompiled(config: ConfigDict, topology: Topology, work: RunSpec) -> Plan:
    """Returns a plan with estimates of memory alone."""
    scoring = estimate_eval_memory(work, config.eval_batch_size)
    return Plan(
        config, topology, work, estimate_memory(work), scoring, None, None, 0.0, [], None, None
    )


def _with_bound(plan: Plan, places: list[DeviceLocation]) -> Plan:
    work, topology = plan.work, plan.topology
    executed = (work.model_flops + work.recomputed_flops) / work.devices
    least = roofline_bound(topology, places, executed, plan.memory_bytes, plan.transfers)
    return plan._replace(
        bound=least,
        cost=run_cost(topology, work.batch_size, work.num_steps, work.model_flops, least.seconds),
    )


def to_compiled_step(compiled: Any, topology: Topology, state: float) -> CompiledStep:
    """Returns a step from what compiling it gave.

    Args:
        compiled: a `Compiled` or a `OutOfMemory`.
        topology: it is for.
        state: bytes of a device that its arguments take by formula.
    """
    if hasattr(compiled, "program"):
        return CompiledStep(
            True,
            compiled.seconds,
            compiled.arguments,
            compiled.temporaries + compiled.outputs,
            compiled.code,
            compiled.total,
            topology.allowed,
        )
    needed = compiled.needed
    if needed is not None and compiled.only_temporaries:
        needed += state
    allowed = compiled.allowed or topology.allowed
    return CompiledStep(False, compiled.seconds, 0, 0, 0, needed, allowed, compiled.said)


def say(text: str) -> None:
    """Tells on standard error how far the work is."""
    print(text, file=sys.stderr, flush=True)
