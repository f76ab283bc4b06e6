"""`--mode=compile`: compilation time of the training step. Does not import JAX."""

import argparse
import importlib.metadata
import os
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixer_jax.benchmarks.candidates import (
    Candidate,
    Workload,
    add_baselines_arg,
    add_workload_args,
    check_backends,
    parse_baselines,
    parse_candidates,
    parse_workload,
)
from mixer_jax.benchmarks.compare import Result, compare, query_environment
from mixer_jax.benchmarks.report import (
    Column,
    add_output_args,
    check_outputs,
    format_environment,
    format_workload,
    print_table,
)
from mixer_jax.cli import common
from mixer_jax.errors import UserError
from mixer_jax.planning.topology import ENVIRONMENT, Topology, parse_topology, tpu_devices

if TYPE_CHECKING:
    from mixer_jax.planning.aot_compile import Compiled, OutOfMemory

DESCRIPTION = "Measure how long the training step takes to compile, with a baseline."
_COLUMNS = [
    Column("compile s", "compile_seconds"),
    Column("first step s", "first_step_seconds"),
    Column("cached first step s", "cached_first_step_seconds"),
    Column("memory GiB", "memory_bytes", ".2f", 2**-30),
    Column("images/s", "images_per_second"),
    Column("relative time", "relative_time"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this mode."""
    add_workload_args(parser)
    parser.set_defaults(scan_unroll=None)
    parser.add_argument(
        "--batch_size",
        default="auto",
        help="images per step; default: auto, 8 on CPUs and 64 on other devices",
    )
    add_baselines_arg(parser)
    parser.add_argument(
        "--topology", metavar="CHIP:SIZE", help="compile for TPUs that need not be attached"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds of compilation and timing; default: 3"
    )
    add_output_args(parser)


def candidates_to_compile(args: argparse.Namespace, workload: Workload) -> list[Candidate]:
    """Parses the settings of mixer_jax; by default, blocks are compiled with and without a scan."""
    if args.scan_unroll is None:
        args.scan_unroll = "1,0" if workload.family.num_blocks(workload.config) else "-1"
    return parse_candidates(args, workload)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all candidates.

    Raises:
        UserError: An argument is out of range, or the compiler for the topology is missing.
        RunError: mixer_jax cannot be measured.
    """
    workload = parse_workload(args, "train")
    common.check_positive(args, "rounds")
    candidates = [*candidates_to_compile(args, workload), *parse_baselines(args, workload)]
    check_outputs(args)
    if args.topology:
        topology = parse_tpu_topology(args.topology)
        return _compile_ahead_of_time(topology, workload, candidates, args.rounds)
    environment = query_environment(workload, candidates)
    platform = environment["platform"]
    batch_size = workload.batch_size or (8 if platform == "cpu" else 64)
    workload = workload._replace(dtype=environment["dtype"], batch_size=batch_size)
    comparison = compare(workload, candidates, args.rounds, platform, num_compilations=args.rounds)
    rows = [result._asdict() for result in comparison.results]
    return {**environment, "rounds": args.rounds, **workload._asdict(), "candidates": rows}


def print_report(report: dict[str, Any]) -> None:
    """Prints a table."""
    print(format_environment(report))
    print(f"\ncompile the training step: {format_workload(report)}")
    print_table(report["candidates"], _COLUMNS)


def _compile_ahead_of_time(
    topology: Topology, workload: Workload, candidates: Sequence[Candidate], num_rounds: int
) -> dict[str, Any]:
    """Compiles for a TPU that is not attached, without running anything."""
    workload = workload._replace(batch_size=workload.batch_size or 64)
    device, workload = open_tpu_device(topology, workload, candidates)
    from mixer_jax.planning.aot_compile import OutOfMemory

    results = {candidate.name: Result(candidate.name) for candidate in candidates}
    seconds: dict[str, list[float]] = {name: [] for name in results}
    for _ in range(num_rounds):
        for candidate in candidates:
            name = candidate.name
            if results[name].failed:
                continue
            step = compile_step(candidate, workload, device)
            if isinstance(step, OutOfMemory):
                results[name] = Result(name, "the step does not fit into the device's memory")
                continue
            seconds[name].append(step.compile_seconds)
            memory = step.argument_bytes + step.output_bytes + step.temporary_bytes
            results[name] = Result(
                name, memory_bytes=memory, compile_seconds=statistics.median(seconds[name])
            )
    return {
        **{name: importlib.metadata.version(name) for name in ("jax", "flax", "libtpu")},
        "topology": topology.name,
        "rounds": num_rounds,
        **workload._asdict(),
        "candidates": [result._asdict() for result in results.values()],
    }


def parse_tpu_topology(text: str) -> Topology:
    """Parses --topology, which must name TPUs.

    Raises:
        UserError: The text is not a topology of TPUs.
    """
    topology = parse_topology(text)
    if not topology.chip.is_tpu:
        raise UserError(
            f"--topology must be of TPUs, got {text}. Programs for GPUs are compiled on GPUs only; "
            "estimates are printed by python -m mixer_jax.plan."
        )
    return topology


def open_tpu_device(
    topology: Topology, workload: Workload, candidates: Sequence[Candidate]
) -> tuple[Any, Workload]:
    """Returns the first device of a topology to compile for, and the workload with its dtype.

    Imports JAX.

    Raises:
        UserError: The compiler is missing, or a backend does not run on TPUs.
    """
    os.environ.update(ENVIRONMENT)
    common.configure_jax(compilation_cache="")
    device = tpu_devices(topology)[0]
    check_backends(workload, candidates, device.platform)
    dtype = "bfloat16" if workload.dtype == "auto" else workload.dtype
    return device, workload._replace(dtype=dtype)


def compile_step(
    candidate: Candidate, workload: Workload, device: Any, *, fast_compile: bool = False
) -> "Compiled | OutOfMemory":
    """Compiles a candidate's step for one of `tpu_devices`; see `compile_function`."""
    import jax
    import jax.numpy as jnp

    from mixer_jax.benchmarks.jax_runner import make_step
    from mixer_jax.distributed.sharding import make_mesh, replicated
    from mixer_jax.planning.aot_compile import compile_function

    step = make_step(candidate, workload, device)
    sharding = replicated(make_mesh(1, 1, [device]))
    size = workload.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((workload.batch_size, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((workload.batch_size,), jnp.int32),
    }
    state, batch = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        (jax.eval_shape(step.init_state), batch),
    )
    return compile_function(step.function, state, batch, *step.args, fast_compile=fast_compile)
