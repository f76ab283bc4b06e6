"""Compilation of the training step: how long until the first step, and what it buys."""

import argparse
import importlib.metadata
import os
import statistics
from collections.abc import Sequence
from typing import Any

from mixer_jax.benchmarks.asked import add_work, read_ours, read_setting
from mixer_jax.benchmarks.comparison import Row, ask_facts, compare
from mixer_jax.benchmarks.contestants import REFERENCE, Contestant, Setting, check_device
from mixer_jax.benchmarks.outputs import add_outputs, check_outputs, write_outputs
from mixer_jax.benchmarks.table import print_compilations
from mixer_jax.cli import common
from mixer_jax.errors import UserError
from mixer_jax.planning.topology import ENVIRONMENT, Topology, parse_topology, tpu_devices

DESCRIPTION = (
    "Measure how long the training step of a Mixer takes to compile, beside the plain one."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what this mode takes to the command line."""
    add_work(parser)
    # A loop, and all blocks in a row: the default is one or the other.
    parser.set_defaults(unroll="1,0")
    parser.add_argument(
        "--batch_size",
        default="auto",
        help="images a step; default: auto, 8 on a CPU and 64 elsewhere",
    )
    parser.add_argument("--peers", default=REFERENCE, choices=[REFERENCE, "none"])
    parser.add_argument(
        "--topology", metavar="CHIP:SIZE", help="TPUs to compile for, which need not be here"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of compiling and timing; default: 3")
    add_outputs(parser, picture=False)


def run(known: argparse.Namespace) -> None:
    """Measures as the command line says and prints the result.

    Raises:
        UserError: an argument is out of range, or there is no compiler for the topology.
        RunFailedError: ours cannot be measured.
    """
    setting = read_setting(known, "train")
    contestants = read_ours(known, "train")
    if known.peers == REFERENCE:
        contestants.append(Contestant(REFERENCE, REFERENCE))
    check_outputs(known)
    if known.topology:
        report = _compile_for(_read_topology(known.topology), setting, contestants, known.rounds)
    else:
        report = _compile_here(setting, contestants, known.rounds)
    write_outputs(known, report)
    if not known.json:
        print_compilations(report)


def _read_topology(text: str) -> Topology:
    topology = parse_topology(text)
    if not topology.chip.is_tpu:
        raise UserError(
            f"--topology={text}: programs can be compiled here for TPUs only; for GPUs leave it "
            "out and measure on one"
        )
    return topology


def _compile_here(
    setting: Setting, contestants: Sequence[Contestant], num_rounds: int
) -> dict[str, Any]:
    facts = ask_facts(setting, contestants)
    default = 8 if facts["platform"] == "cpu" else 64
    setting = setting._replace(dtype=facts["dtype"], batch_size=setting.batch_size or default)
    result = compare(
        setting, contestants, num_rounds, facts["platform"], num_compilations=num_rounds
    )
    rows = [row._asdict() for row in result.rows]
    return {**facts, "rounds": num_rounds, **setting._asdict(), "contestants": rows}


def _compile_for(
    topology: Topology, setting: Setting, contestants: Sequence[Contestant], num_rounds: int
) -> dict[str, Any]:
    """Compiles for a TPU that is not here; nothing can be run."""
    dtype = "bfloat16" if setting.dtype == "auto" else setting.dtype
    setting = setting._replace(dtype=dtype, batch_size=setting.batch_size or 64)
    os.environ.update(ENVIRONMENT)
    common.configure_jax(compilation_cache="")
    device = tpu_devices(topology)[0]
    check_device(contestants, device.platform)
    from mixer_jax.benchmarks.compiled_steps import compile_step
    from mixer_jax.planning.aot_compile import OutOfMemory

    rows = {contestant.name: Row(contestant.name) for contestant in contestants}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(num_rounds):
        for contestant in contestants:
            name = contestant.name
            if rows[name].failed:
                continue
            step = compile_step(contestant, setting, device)
            if isinstance(step, OutOfMemory):
                rows[name] = Row(name, "the step does not fit into the device's memory")
                continue
            seconds[name].append(step.compile_seconds)
            memory = step.argument_bytes + step.output_bytes + step.temporary_bytes
            rows[name] = Row(
                name, memory_bytes=memory, compile_seconds=statistics.median(seconds[name])
            )
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "libtpu")}
    return {
        **versions,
        "topology": topology.name,
        "rounds": num_rounds,
        **setting._asdict(),
        "contestants": [row._asdict() for row in rows.values()],
    }
