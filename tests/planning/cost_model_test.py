"""Tests of what a step costs by formula, by hand and against the model itself."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.data.registry import open_dataset
from mixer_jax.distributed.sharding import make_mesh, state_sharding
from mixer_jax.models.mixer_config import VARIANTS, MixerConfig, forward_flops
from mixer_jax.models.registry import create_model
from mixer_jax.planning.cost_model import (
    RunSpec,
    estimate_collectives,
    estimate_eval_memory,
    estimate_memory,
    run_spec,
    saved_activation_bytes,
)
from mixer_jax.planning.dataset_specs import placeholder_datasets, resolve_for_platform
from mixer_jax.planning.roofline import network_seconds, roofline_bound, run_cost
from mixer_jax.planning.tables import mesh_locations, scaling_row
from mixer_jax.planning.topology import Topology, device_locations, parse_topology

S16 = 27_398_547  # Mixer-S/16 with the classes of JFT-300M.


def make_work(**changes: Any) -> RunSpec:
    work = RunSpec(
        widths=VARIANTS["S/16"],
        image_size=224,
        num_classes=18_291,
        itemsize=2,
        batch_size=1024,
        pieces=1,
        fsdp=1,
        devices=16,
        remat="dots",
        unroll=1,
        moments=2,
        mixup=False,
        num_steps=86_400,
    )
    return work._replace(**changes)


def test_memory_by_hand() -> None:
    work = make_work()
    assert work.num_parameters == S16
    lies = estimate_memory(work)
    assert lies.parameters == 4 * S16
    assert lies.moments == 8 * S16
    assert lies.batch == 64 * (224 * 224 * 3 + 4)
    assert lies.gradients == 6 * S16
    # Tokens 196 × 512 three times, hidden layers 512 × 256 and 196 × 2048.
    assert saved_activation_bytes(work) == 2 * (3 * 196 * 512 + 512 * 256 + 196 * 2048)
    assert saved_activation_bytes(make_work(remat="full")) == 2 * 196 * 512
    assert estimate_memory(make_work(pieces=2)).activations == lies.activations / 2


def test_policies_keep_less_and_less() -> None:
    sizes = [
        estimate_memory(make_work(remat=remat)).total
        for remat in ("none", "dots", "mlp_hidden", "full")
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_model_flops_are_three_forward_passes() -> None:
    flops = forward_flops(VARIANTS["S/16"], 224, 18_291)
    assert make_work().model_flops == 3 * 1024 * flops


def test_recomputed_flops_are_those_of_the_model() -> None:
    sizes = {
        "num_blocks": 3,
        "patch_size": 4,
        "hidden_dim": 8,
        "tokens_mlp_dim": 16,
        "channels_mlp_dim": 24,
    }
    images = jnp.zeros((2, 16, 16, 3))
    executed, expected = {}, {}
    for remat in ("none", "dots", "mlp_hidden", "full"):
        model = create_model("custom", 5, scan_unroll=1, remat=remat, **sizes)
        parameters = jax.eval_shape(model.init, jax.random.key(0), images)
        gradient = jax.grad(lambda p, model=model: model.apply(p, images, train=True).sum())
        executed[remat] = flops_of_products(jax.make_jaxpr(gradient)(parameters).jaxpr)
        work = make_work(widths=MixerConfig(**sizes), image_size=16, batch_size=2, remat=remat)
        expected[remat] = work.recomputed_flops
    assert {name: flops - executed["none"] for name, flops in executed.items()} == expected
    assert 0 == expected["dots"] < expected["mlp_hidden"] < expected["full"]


def flops_of_products(jaxpr: Jaxpr) -> int:
    """Returns the FLOPs of all dot products of a function, its scans and remats among them."""
    count = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            result: Any = equation.outvars[0].aval
            first: Any = equation.invars[0].aval
            count += (
                2 * math.prod(result.shape) * math.prod(first.shape[axis] for axis in contracted)
            )
        times = parameters["length"] if name == "scan" else 1
        count += times * sum(map(flops_of_products, functions_in(list(parameters.values()))))
    return count


def functions_in(values: list[Any]) -> Iterator[Jaxpr]:
    """Yields the functions among an equation's parameters."""
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from functions_in(list(value))


def test_scoring_needs_parameters_and_one_block() -> None:
    work = make_work(devices=8, fsdp=8)
    rows = 1024 // 8
    least = estimate_memory(work).parameters + 2 * S16 + rows * 3 * 224 * 224
    assert (
        least
        < estimate_eval_memory(work, 1024)
        < least + rows * 8 * saved_activation_bytes(make_work(remat="none"))
    )
    assert estimate_eval_memory(work, 2048) > estimate_eval_memory(work, 1024)


def test_one_all_reduce_of_all_gradients() -> None:
    sent = [t for t in estimate_collectives(make_work()) if t.carries == "gradients"]
    assert [(t.kind, t.axis, t.num_bytes) for t in sent] == [("all-reduce", "data", 4 * S16)]
    assert not estimate_collectives(make_work(devices=1))


def test_split_parameters_are_gathered_and_scattered() -> None:
    sent = estimate_collectives(make_work(fsdp=4))
    by_kind: dict[tuple[str, str], float] = {}
    for t in sent:
        by_kind[t.kind, t.carries] = by_kind.get((t.kind, t.carries), 0) + t.num_bytes
    scattered = by_kind["reduce-scatter", "gradients"]
    # Biases and LayerNorms stay whole: of eight blocks, of stem, last LayerNorm and head.
    whole = 4 * (8 * (4 * 512 + 256 + 196 + 2048 + 512) + 3 * 512 + 18_291)
    assert scattered == 4 * S16 - whole
    assert by_kind["all-reduce", "gradients"] == scattered / 4 + whole
    # The head's kernel travels in float32, all others in bfloat16.
    head = 4 * 512 * 18_291
    assert by_kind["all-gather", "parameters"] == head + (scattered - head) / 2


def test_a_ring_by_hand() -> None:
    topology = parse_topology("v5e:4x4")
    (gradients, _) = estimate_collectives(make_work())
    seconds = network_seconds(topology, mesh_locations(topology), gradients)
    assert seconds == pytest.approx(2 * 15 / 16 * 4 * S16 / 200e9)


def test_cores_of_a_chip_share_its_links() -> None:
    topology = parse_topology("v3:2x2")
    work = make_work(devices=8)
    (gradients, _) = estimate_collectives(work)
    seconds = network_seconds(topology, mesh_locations(topology), gradients)
    # Four chips, of which each has one link along each of two axes.
    assert seconds == pytest.approx(2 * 3 / 4 * 4 * S16 / 164e9)


def test_machines_of_gpus_share_a_network() -> None:
    topology = parse_topology("h100:16")
    (gradients, _) = estimate_collectives(make_work())
    seconds = network_seconds(topology, device_locations(topology, None), gradients)
    inside, between = 2 * 7 / 8 / 450e9, 2 * 1 / 2 / 8 / 50e9
    assert seconds == pytest.approx(4 * S16 * max(inside, between))


def test_bound_and_cost_by_hand() -> None:
    topology = parse_topology("v3:2x2")
    least = roofline_bound(topology, mesh_locations(topology), 61.5e12, 225e9, [])
    assert least == (1.0, 0.5, 0.0)
    assert (least.seconds, least.serial_seconds, least.limit) == (1.0, 1.5, "arithmetic")
    run = run_cost(topology, batch_size=80, num_steps=86_400, model_flops=246e12, seconds=1.0)
    assert run == (80, 20, 1.0, 8.0, 0.5)


def test_weak_scaling_sends_the_same_from_every_chip() -> None:
    small, large = scaling_row("v5e:2x4", 1), scaling_row("v5e:16x16", 4)
    assert (small["chips"], large["chips"]) == (8, 1024)
    assert small["bytes"] == large["bytes"]
    assert small["arithmetic"] == pytest.approx(large["arithmetic"])
    assert large["network"] > 0


def test_numbers_of_a_config(root: Any) -> None:
    read = load_config_with_overrides(
        f"{root}/configs/mixer_l16_i21k.py", ["--config.recipe.grad_accum_steps=1"]
    )
    config = resolve_for_platform(read, "tpu")
    assert config.model.dtype == "bfloat16"
    source = placeholder_datasets(config).train
    assert (len(source), source.num_classes) == (14_055_151, 21_843)
    work = run_spec(config, source.num_classes, 10, devices=64)
    assert work.num_parameters == 229_560_243
    assert work.mixup
    assert (work.rows, work.itemsize, work.moments) == (64, 2, 2)


def test_a_plan_has_the_default_loop_of_the_run_it_plans() -> None:
    def loop(platform: str, *more: str) -> tuple[int, str]:
        model = resolve_for_platform(
            load_config_with_overrides("configs/mixer_l16_i21k.py", more), platform
        ).model
        return model.scan_unroll, model.remat

    kernels = "--config.model.backend=mosaic"
    assert loop("tpu") == (1, "dots")
    assert loop("tpu", kernels) == (0, "none")
    assert loop("tpu", kernels, "--config.model.dropout=0.1") == (1, "dots")
    assert loop("gpu") == (0, "none")


@pytest.mark.parametrize(("classes", "number"), [("all", 10), ("low", 5), ("high", 5)])
def test_digits_are_as_many_as_they_are(classes: str, number: int, digits_dir: str) -> None:
    config = resolve_for_platform(
        load_config_with_overrides(f"configs/digits.py:{classes}", []), "tpu"
    )
    source = placeholder_datasets(config).train
    assert (len(source), source.num_classes) == (
        len(open_dataset(f"digits/{classes}", "train", digits_dir)),
        number,
    )


def test_estimate_of_parameters_is_what_a_mesh_holds() -> None:
    mesh = make_mesh(2, 4)
    tree: dict[str, Any] = {}
    for path, shape in make_work().shapes.items():
        *sections, name = path.split("/")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = jax.ShapeDtypeStruct(shape, np.float32)
    held = jax.tree.map(
        lambda x, lies: 4 * math.prod(lies.shard_shape(x.shape)), tree, state_sharding(tree, mesh)
    )
    assert estimate_memory(make_work(fsdp=4, devices=8)).parameters == sum(jax.tree.leaves(held))


def test_topologies() -> None:
    slices = parse_topology("v5e:16x16", 2)
    assert isinstance(slices, Topology)
    assert (slices.num_chips, slices.num_devices) == (512, 512)
    assert parse_topology("v3:4x4").num_devices == 32
    assert parse_topology("v4:2x2x1").egress == 2 * 50e9
