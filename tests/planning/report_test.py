"""Reports of plans that do not fit, and suggestions that make them fit."""

import dataclasses

import pytest

from mixer_jax.config.config import parse
from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.config.schema import RunConfig
from mixer_jax.planning.aot_compile import OutOfMemory
from mixer_jax.planning.cost_model import estimate_memory
from mixer_jax.planning.planner import Plan, make_plan, to_compiled_step
from mixer_jax.planning.report import format_plan, suggest_flags
from mixer_jax.planning.topology import GIB, parse_topology
from tests.helpers.messages import mentions

FLAGS = [
    "--config.recipe.grad_accum_steps=1",
    "--config.mesh.fsdp=1",
    "--config.model.remat=none",
    "--config.model.scan_unroll=0",
]


def load_config(*flags: str) -> RunConfig:
    return parse(load_config_with_overrides("configs/mixer_h14_jft.py", [*FLAGS, *flags]))


def plan_with_oom(oom: OutOfMemory) -> Plan:
    """Returns a plan whose training step the compiler rejects."""
    plan = make_plan(load_config(), parse_topology("h100:64"))
    step = to_compiled_step(oom, plan.topology, argument_bytes=GIB)
    return plan._replace(train_step=step, bound=None, cost=None)


def mentions_excess(text: str, step: str, num_bytes: float) -> bool:
    """Returns whether a line of a report mentions the excess of a step."""
    excess = f"{num_bytes / GIB:.1f}"
    return any(mentions(line, step, excess, "GiB") for line in text.splitlines())


@pytest.mark.parametrize("excludes_arguments", [False, True])
def test_format_plan_reports_excess_of_train_step(excludes_arguments: bool) -> None:
    plan = plan_with_oom(OutOfMemory(3.0, 34 * GIB, 16 * GIB, "", excludes_arguments))
    step = plan.train_step
    assert step is not None
    assert not step.fits
    assert step.needed_bytes == (34 + excludes_arguments) * GIB
    assert mentions_excess(format_plan(plan), "training", step.needed_bytes - 16 * GIB)


def test_format_plan_quotes_compiler_if_excess_is_unknown() -> None:
    message = "Used 17.08M of 16.00M vmem. " * 5
    text = format_plan(plan_with_oom(OutOfMemory(3.0, None, 0.0, message.strip(), False)))
    last_section = text.split("\n\n")[-1]
    assert message.strip() in " ".join(last_section.split())
    # Neither suggestions nor an amount.
    assert "--" not in text
    assert "GiB" not in last_section
    assert max(map(len, text.splitlines())) <= 100


def test_format_plan_reports_excess_of_eval_step() -> None:
    plan = make_plan(load_config("--config.eval_batch_size=1048576"), parse_topology("h200:64"))
    assert plan.train_step_fits
    assert not plan.fits
    text = format_plan(plan)
    assert mentions_excess(text, "evaluation", plan.eval_memory_estimate - plan.available_bytes)
    assert mentions(text, "eval_batch_size", "1048576")
    # No other setting would help.
    assert "--" not in text


def test_format_plan_warns_about_unknown_trip_counts() -> None:
    plan = make_plan(load_config("--config.model.remat=full"), parse_topology("h200:64"))
    assert "WARNING" not in format_plan(plan)
    text = format_plan(plan._replace(num_unknown_loops=2))
    assert any(mentions(line, "WARNING", "2") for line in text.splitlines())
    assert max(map(len, text.splitlines())) <= 100


def test_suggest_flags_suggests_flags_that_fit() -> None:
    topology = parse_topology("a100-40:32")
    plan = make_plan(load_config("--config.eval_batch_size=4096"), topology)
    assert not plan.fits
    suggestions = suggest_flags(plan)
    assert any(line.startswith("--config.recipe.grad_accum_steps=") for line in suggestions)
    remat = next(line for line in suggestions if line.startswith("--config.model.remat="))
    assert remat in format_plan(plan)
    assert make_plan(load_config(remat.split()[0]), topology).fits


@pytest.mark.parametrize("num_devices", [8, 32])
def test_suggest_flags_respects_mesh_and_batches(num_devices: int) -> None:
    topology = f"a100-40:{num_devices}"
    flags = ["--config.mesh.fsdp=2", f"--config.mesh.data={num_devices // 2}"]
    flags += [f"--config.batch_size={96 * num_devices}", "--config.eval_batch_size=192"]
    plan = make_plan(load_config(*flags), parse_topology(topology))
    assert not plan.fits
    suggestions = suggest_flags(plan)
    assert len(suggestions) == 4
    for line in suggestions:
        suggested = [word for word in line.split() if word.startswith("--")]
        overrides = [flag for flag in suggested if flag.startswith("--config.")]
        topologies = [flag.split("=")[1] for flag in suggested if flag.startswith("--topology=")]
        new_topology = parse_topology(topologies[0] if topologies else topology)
        assert make_plan(load_config(*flags, *overrides), new_topology).fits, line


@pytest.mark.parametrize(("memory_gib", "expected"), [(28, ["2"]), (26.5, ["4"]), (25.8, [])])
def test_suggest_flags_shards_within_slice(memory_gib: float, expected: list[str]) -> None:
    plan = make_plan(load_config(), parse_topology("h100:64"))
    topology = parse_topology("v5e:2x2", 16)
    chip = dataclasses.replace(topology.chip, memory_gib=memory_gib)
    # fsdp=8 would fit, but a slice has four devices.
    assert estimate_memory(plan.run._replace(fsdp=8)).total < 25.8 * GIB
    plan = plan._replace(topology=topology._replace(chip=chip))
    flags = [line.split()[0] for line in suggest_flags(plan) if "mesh.fsdp" in line]
    assert flags == [f"--config.mesh.fsdp={fsdp}" for fsdp in expected]
