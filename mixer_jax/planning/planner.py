"""Plan of a run on a topology: memory fit, communication, bound on the step time, cost."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mixer_jax.config.schema import RunConfig
from mixer_jax.distributed.sharding import check_divisible, check_mesh
from mixer_jax.planning.aot_compile import (
    Compiled,
    OutOfMemory,
    build_for_topology,
    compile_eval_step,
    compile_train_step,
)
from mixer_jax.planning.cost_model import (
    Memory,
    estimate_collectives,
    estimate_eval_memory,
    estimate_memory,
    min_hbm_bytes,
)
from mixer_jax.planning.hlo_collectives import Collective, TensorRoles, find_collectives
from mixer_jax.planning.hlo_costs import hbm_bytes_by_opcode
from mixer_jax.planning.roofline import RooflineBound, RunCost, roofline_bound, run_cost
from mixer_jax.planning.run_spec import RunSpec, resolve_for_platform, run_spec
from mixer_jax.planning.topology import Topology, device_locations, tpu_devices
from mixer_jax.training.setup import Experiment


class CompiledStep(NamedTuple):
    """Memory of a compiled step on one device.

    Attributes:
        fits: Whether the compiler accepts the step.
        argument_bytes: Bytes of state and batch; 0 if the step does not fit.
        temporary_bytes: Bytes of activations, gradients, other temporaries and results.
        needed_bytes: Bytes in total; a lower bound if the step does not fit; None if unknown.
        message: Message of the compiler if `needed_bytes` is None.
    """

    fits: bool
    compile_seconds: float
    argument_bytes: float
    temporary_bytes: float
    code_bytes: float
    needed_bytes: float | None
    available_bytes: float
    message: str = ""


class Plan(NamedTuple):
    """Plan of a run on a topology.

    Attributes:
        config: Config with every `auto` setting resolved.
        memory_estimate: Estimated memory of the training step.
        eval_memory_estimate: Estimated bytes of the evaluation step, per device.
        train_step: Compiled training step; None if it was not compiled.
        eval_step: Compiled evaluation step; None if it was not compiled.
        hbm_bytes: Memory traffic per training step and device.
        bound: Bound on the time of a training step; None if the step does not fit.
        cost: Cost of the run if its steps take as long as the bound.
        fast_compile: Whether the steps were compiled to less optimized programs.
        num_unknown_loops: Loops of the training step with matmuls or collectives whose trip count
            is unknown, and which are counted as if they ran once.
    """

    config: RunConfig
    topology: Topology
    run: RunSpec
    memory_estimate: Memory
    eval_memory_estimate: float
    train_step: CompiledStep | None = None
    eval_step: CompiledStep | None = None
    hbm_bytes: float = 0.0
    collectives: Sequence[Collective] = ()
    bound: RooflineBound | None = None
    cost: RunCost | None = None
    fast_compile: bool = False
    num_unknown_loops: int = 0

    @property
    def available_bytes(self) -> float:
        """Bytes of memory available to programs, per device."""
        return self.train_step.available_bytes if self.train_step else self.topology.hbm_bytes

    @property
    def fits(self) -> bool:
        """True if all steps fit into memory, as compiled or, if they are not, as estimated."""
        return self.train_step_fits and self.eval_step_fits

    @property
    def train_step_fits(self) -> bool:
        """True if the training step fits into memory."""
        if self.train_step:
            return self.train_step.fits
        return self.memory_estimate.total <= self.available_bytes

    @property
    def eval_step_fits(self) -> bool:
        """True if the evaluation step fits into memory, or only the training step was compiled."""
        if self.eval_step:
            return self.eval_step.fits
        return self.train_step is not None or self.eval_memory_estimate <= self.available_bytes


def make_plan(
    config: RunConfig,
    topology: Topology,
    *,
    devices: list[Any] | None = None,
    with_eval: bool = True,
    fast_compile: bool = False,
) -> Plan:
    """Plans a run: by compiling its steps for TPUs, by formulas alone for GPUs.

    Args:
        config: Run to plan.
        topology: Topology to run on.
        devices: Devices of the topology; None creates them.
        with_eval: Whether to compile the evaluation step, too.
        fast_compile: Whether to compile in less time to less optimized programs.

    Raises:
        UserError: The config does not fit the devices or leaves the dataset's size open.
    """
    config = resolve_for_platform(config, topology.chip.platform)
    if not topology.chip.is_tpu:
        plan = _estimate_plan(config, topology)
        run = plan.run
        check_mesh(config.mesh.data, run.fsdp, run.num_devices)
        check_divisible("config.batch_size", run.batch_size, run.num_devices, run.num_microbatches)
        check_divisible("config.eval_batch_size", config.eval_batch_size, run.num_devices)
        plan = plan._replace(hbm_bytes=min_hbm_bytes(run), collectives=estimate_collectives(run))
        return _add_bound(plan, None)
    experiment = build_for_topology(config, devices or tpu_devices(topology))
    plan = _estimate_plan(config, topology)
    run = plan.run
    if with_eval:
        check_divisible("config.eval_batch_size", config.eval_batch_size, run.num_devices)
    compiled = compile_train_step(experiment, fast_compile)
    train_step = to_compiled_step(compiled, topology, plan.memory_estimate.arguments)
    plan = plan._replace(train_step=train_step, fast_compile=fast_compile)
    if with_eval:
        plan = add_eval_step(plan, experiment)
    if isinstance(compiled, OutOfMemory):
        return plan
    example_shapes = [(run.image_size, run.image_size, 3), (run.num_classes,)]
    roles = TensorRoles(
        run.param_shapes, run.fsdp, example_shapes, multi_slice=topology.num_slices > 1
    )
    program, mesh = compiled.program, experiment.mesh
    plan = plan._replace(
        hbm_bytes=hbm_bytes_by_opcode(program).total(),
        collectives=find_collectives(program, dict(mesh.shape), roles, topology.num_slices),
        num_unknown_loops=len(program.unknown_trip_count_loops()),
    )
    return _add_bound(plan, list(mesh.devices.flat))


def add_eval_step(plan: Plan, experiment: Experiment | None = None) -> Plan:
    """Compiles the evaluation step of a plan for TPUs; returns a plan for GPUs unchanged."""
    if not plan.topology.chip.is_tpu:
        return plan
    experiment = experiment or build_for_topology(plan.config, tpu_devices(plan.topology))
    compiled = compile_eval_step(experiment, plan.fast_compile)
    eval_step = to_compiled_step(compiled, plan.topology, plan.memory_estimate.parameters)
    return plan._replace(eval_step=eval_step)


def _estimate_plan(config: RunConfig, topology: Topology) -> Plan:
    """Returns a plan with estimates of memory alone."""
    run = run_spec(config, topology.num_devices)
    eval_memory = estimate_eval_memory(run, config.eval_batch_size)
    return Plan(config, topology, run, estimate_memory(run), eval_memory)


def _add_bound(plan: Plan, devices: list[Any] | None) -> Plan:
    run, topology = plan.run, plan.topology
    locations = device_locations(topology, devices)
    bound = roofline_bound(
        topology, locations, run.executed_flops, plan.hbm_bytes, plan.collectives
    )
    cost = run_cost(topology, run.batch_size, run.num_steps, run.model_flops, bound.seconds)
    return plan._replace(bound=bound, cost=cost)


def to_compiled_step(
    compiled: Compiled | OutOfMemory, topology: Topology, argument_bytes: float
) -> CompiledStep:
    """Converts the result of a compilation; `argument_bytes` are estimated, per device."""
    if isinstance(compiled, Compiled):
        return CompiledStep(
            fits=True,
            compile_seconds=compiled.compile_seconds,
            argument_bytes=compiled.argument_bytes,
            temporary_bytes=compiled.temporary_bytes + compiled.output_bytes,
            code_bytes=compiled.code_bytes,
            needed_bytes=compiled.total_bytes,
            available_bytes=topology.hbm_bytes,
        )
    needed = compiled.needed_bytes
    if needed is not None and compiled.excludes_arguments:
        needed += argument_bytes
    return CompiledStep(
        fits=False,
        compile_seconds=compiled.compile_seconds,
        argument_bytes=0,
        temporary_bytes=0,
        code_bytes=0,
        needed_bytes=needed,
        available_bytes=compiled.available_bytes or topology.hbm_bytes,
        message=compiled.message,
    )
