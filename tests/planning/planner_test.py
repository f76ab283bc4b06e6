"""Plans of steps compiled for TPUs, without a TPU."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from mixer_jax.config.config import parse
from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.planning.planner import Plan, make_plan
from mixer_jax.planning.report import format_plan, plan_to_dict
from mixer_jax.planning.topology import GIB, parse_topology
from tests.helpers.messages import mentions
from tests.helpers.tpu_compiler import tpu_compiler

pytestmark = pytest.mark.slow

FLAGS = [
    "--config.batch_size=64",
    "--config.eval_batch_size=64",
    "--config.model.scan_unroll=1",
    "--config.model.remat=dots",
    "--config.recipe.mixup=0.2",
    "--config.recipe.grad_accum_steps=1",
    "--config.mesh.fsdp=1",
]


@pytest.fixture(scope="module", autouse=True)
def compiler() -> Iterator[None]:
    """The TPU compiler."""
    with tpu_compiler():
        yield


@pytest.fixture(scope="module")
def plan(compiler: None) -> Plan:
    """Plan of Mixer-S/16 on JFT-300M, compiled for four chips."""
    config = parse(load_config_with_overrides("configs/mixer_s16_jft.py", FLAGS))
    return make_plan(config, parse_topology("v5e:2x2"), fast_compile=True)


def test_compiled_memory_matches_estimates(plan: Plan) -> None:
    assert plan.fits
    assert plan.train_step is not None
    assert plan.eval_step is not None
    estimate = plan.memory_estimate
    # Padding to whole tiles takes a little more.
    assert estimate.arguments <= plan.train_step.argument_bytes < 1.1 * estimate.arguments
    assert estimate.parameters <= plan.eval_step.argument_bytes < 1.2 * estimate.parameters
    assert 0.3 < (plan.train_step.needed_bytes or 0.0) / estimate.total < 3
    assert 0.3 < (plan.eval_step.needed_bytes or 0.0) / plan.eval_memory_estimate < 3
    assert not plan.num_unknown_loops


@pytest.mark.parametrize(
    "model",
    [
        {"family": "vit", "variant": "Ti/16"},
        {"family": "bit", "variant": "custom", "units": "1,1", "root_width": 64},
    ],
    ids=["ViT", "BiT"],
)
def test_compiled_memory_of_other_families_matches_estimates(model: dict[str, Any]) -> None:
    flags = [*FLAGS, "--config.batch_size=512", "--config.image_size=128"]
    if model["family"] == "bit":
        flags.append("--config.model.scan_unroll=-1")
    flags += [f"--config.model.{name}={value}" for name, value in model.items()]
    config = parse(load_config_with_overrides("configs/mixer_s16_jft.py", flags))
    topology = parse_topology("v5e:2x2")
    plan = make_plan(config, topology, with_eval=False, fast_compile=True)
    estimate = plan.memory_estimate
    assert plan.train_step is not None
    assert estimate.arguments <= plan.train_step.argument_bytes < 1.2 * estimate.arguments
    print(f"{(plan.train_step.needed_bytes or 0.0) / estimate.total:.2f} of the estimate")
    assert 0.5 < (plan.train_step.needed_bytes or 0.0) / estimate.total < 2
    assert not plan.num_unknown_loops
    assert not any(c.is_unexpected for c in plan.collectives)


def test_compiled_step_sends_gradients_once(plan: Plan) -> None:
    sent = {(c.op, c.dtype, c.tensor_role): c.num_bytes for c in plan.collectives}
    gradients = {key: num_bytes for key, num_bytes in sent.items() if key[2] == "gradients"}
    assert gradients == {("all-reduce", "f32", "gradients"): 4 * plan.run.num_params}
    assert not any(c.is_unexpected for c in plan.collectives)
    examples = sum(
        num_bytes for (_, _, role), num_bytes in sent.items() if role == "mixup examples"
    )
    assert examples >= 224 * 224 * 3
    assert {c.mesh_axis for c in plan.collectives} == {"data"}


def test_compiled_traffic_and_bound(plan: Plan) -> None:
    estimate = plan.memory_estimate
    # Parameters and moments are read and written.
    assert plan.hbm_bytes > 2 * (estimate.parameters + estimate.moments)
    assert plan.hbm_bytes < 100 * estimate.total
    assert plan.bound is not None
    assert plan.cost is not None
    assert 0 < plan.cost.model_flops_utilization <= 1
    assert plan.cost.images_per_second == pytest.approx(64 / plan.bound.seconds)


def test_format_plan_and_plan_to_dict(plan: Plan) -> None:
    text = format_plan(plan)
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) <= 45
    assert mentions(text.splitlines()[0], "Mixer-S/16", "224", "18291", "27398547")
    assert re.search(r"\bfits?\s+fits?\b", text)
    assert "WARNING" not in text
    result = json.loads(json.dumps(plan_to_dict(plan)))
    assert result["fits"]
    assert result["settings"]["remat"] == "dots"
    assert plan.train_step is not None
    assert result["train_step"]["needed_bytes"] == plan.train_step.needed_bytes


def test_train_step_that_exceeds_memory() -> None:
    flags = [*FLAGS, "--config.batch_size=3072", "--config.model.remat=none"]
    config = parse(load_config_with_overrides("configs/mixer_s16_jft.py", flags))
    plan = make_plan(config, parse_topology("v5e:2x2"), with_eval=False, fast_compile=True)
    assert not plan.fits
    assert plan.train_step is not None
    assert plan.train_step.needed_bytes is not None
    assert plan.train_step.needed_bytes > plan.train_step.available_bytes == 15.75 * GIB
    text = format_plan(plan)
    excess = f"{(plan.train_step.needed_bytes - plan.train_step.available_bytes) / GIB:.1f}"
    assert any(mentions(line, "training", excess, "GiB") for line in text.splitlines())
    assert "--config.model.remat=dots" in text
