"""Cost model: worked examples, and comparisons with the model itself."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.distributed.sharding import make_mesh, state_sharding
from mixer_jax.models.bit_config import BitConfig
from mixer_jax.models.execution import Execution
from mixer_jax.models.mixer_config import VARIANTS, MixerConfig
from mixer_jax.models.registry import get_family
from mixer_jax.models.vit_config import VitConfig
from mixer_jax.planning.cost_model import (
    estimate_collectives,
    estimate_eval_memory,
    estimate_memory,
    min_hbm_bytes,
)
from mixer_jax.planning.run_spec import (
    REMAT_POLICIES,
    RunSpec,
)
from tests.helpers.matmul_flops import count_matmul_flops

# Parameters of Mixer-S/16 with the classes of JFT-300M.
S16 = 27_398_547
NUM_BLOCKS = 8


def make_run(**changes: Any) -> RunSpec:
    """Returns a run of Mixer-S/16 on JFT-300M on 16 devices."""
    run = RunSpec(
        family=get_family("mixer"),
        architecture=VARIANTS["S/16"],
        image_size=224,
        num_classes=18_291,
        itemsize=2,
        batch_size=1024,
        num_microbatches=1,
        fsdp=1,
        num_devices=16,
        remat="dots",
        scan_unroll=1,
        moments=2 * list(get_family("mixer").param_shapes(VARIANTS["S/16"], 224, 18_291).items()),
        mixup=False,
        num_steps=86_400,
    )
    return run._replace(**changes)


def test_estimate_memory() -> None:
    run = make_run()
    assert run.num_params == S16
    memory = estimate_memory(run)
    assert memory.parameters == 4 * S16
    assert memory.moments == 8 * S16
    assert memory.batch == 64 * (224 * 224 * 3 + 4)
    assert memory.gradients == 6 * S16
    # Three arrays of tokens, 196 × 512, and hidden units, 512 × 256 and 196 × 2048.
    tokens, hidden = 196 * 512, 512 * 256 + 196 * 2048
    assert run.saved_activation_bytes == NUM_BLOCKS * 2 * (3 * tokens + hidden)
    assert make_run(remat="full").saved_activation_bytes == NUM_BLOCKS * 2 * tokens
    assert estimate_memory(make_run(num_microbatches=2)).activations == memory.activations / 2


def test_sam_doubles_flops_and_gradients() -> None:
    plain, sam = (make_run(fsdp=4, num_gradients=count) for count in (1, 2))
    assert sam.executed_flops == 2 * plain.executed_flops
    assert estimate_memory(sam) == estimate_memory(plain)
    sums = [sum(c.num_bytes for c in estimate_collectives(run)) for run in (plain, sam)]
    assert sums[1] == 2 * sums[0]
    assert min_hbm_bytes(plain) < min_hbm_bytes(sam) < 2 * min_hbm_bytes(plain)


def test_estimate_memory_decreases_with_recomputation() -> None:
    sizes = [estimate_memory(make_run(remat=remat)).total for remat in REMAT_POLICIES]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


def test_estimate_memory_parameters_match_mesh() -> None:
    mesh = make_mesh(2, 4)
    tree: dict[str, Any] = {}
    for path, shape in make_run().param_shapes.items():
        *sections, name = path.split("/")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = jax.ShapeDtypeStruct(shape, np.float32)
    shard_bytes = jax.tree.map(
        lambda x, sharding: 4 * math.prod(sharding.shard_shape(x.shape)),
        tree,
        state_sharding(tree, mesh, get_family("mixer")),
    )
    estimate = estimate_memory(make_run(fsdp=4, num_devices=8)).parameters
    assert estimate == sum(jax.tree.leaves(shard_bytes))


def test_estimate_eval_memory() -> None:
    run = make_run(num_devices=8, fsdp=8)
    images = 1024 // 8
    fixed = estimate_memory(run).parameters + 2 * S16 + images * 3 * 224 * 224
    activations = images * make_run(remat="none").saved_activation_bytes
    assert fixed < estimate_eval_memory(run, 1024) < fixed + activations
    assert estimate_eval_memory(run, 2048) > estimate_eval_memory(run, 1024)


def test_model_flops_are_three_forward_passes() -> None:
    flops = get_family("mixer").forward_flops(VARIANTS["S/16"], 224, 18_291)
    assert make_run().model_flops == 3 * 1024 * flops


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("mixer", MixerConfig(3, 4, 8, 16, 24)),
        ("vit", VitConfig(3, 4, 8, 24, 2)),
        ("bit", BitConfig("2,1", 8)),
    ],
)
def test_recomputed_flops_match_model(family: str, architecture: Any) -> None:
    images = jnp.zeros((2, 16, 16, 3))
    executed, expected = {}, {}
    for remat in REMAT_POLICIES:
        settings: dict[str, Any] = {"scan_unroll": 1, "remat": remat}
        execution = Execution(**settings)
        model = get_family(family).build(architecture, 5, execution=execution)
        params = jax.eval_shape(model.init, jax.random.key(0), images)
        gradient = jax.grad(lambda p, model=model: model.apply(p, images, train=True).sum())
        executed[remat] = count_matmul_flops(jax.make_jaxpr(gradient)(params).jaxpr)
        run = make_run(
            family=get_family(family),
            architecture=architecture,
            image_size=16,
            batch_size=2,
            remat=remat,
        )
        expected[remat] = run.recomputed_flops
    more = {name: flops - executed["none"] for name, flops in executed.items()}
    assert more == {name: flops - expected["none"] for name, flops in expected.items()}
    assert expected["none"] <= expected["dots"] < expected["mlp_hidden"] <= expected["full"]


def test_estimate_collectives_of_data_parallel_run() -> None:
    gradients = [c for c in estimate_collectives(make_run()) if c.tensor_role == "gradients"]
    assert [(c.op, c.mesh_axis, c.num_bytes) for c in gradients] == [
        ("all-reduce", "data", 4 * S16)
    ]
    assert not estimate_collectives(make_run(num_devices=1))


def test_estimate_collectives_of_fsdp_run() -> None:
    totals: dict[tuple[str, str], float] = {}
    for c in estimate_collectives(make_run(fsdp=4)):
        totals[c.op, c.tensor_role] = totals.get((c.op, c.tensor_role), 0) + c.num_bytes
    scattered = totals["reduce-scatter", "gradients"]
    # Biases and LayerNorms are replicated: of eight blocks, of stem, last LayerNorm and head.
    replicated = 4 * (8 * (4 * 512 + 256 + 196 + 2048 + 512) + 3 * 512 + 18_291)
    assert scattered == 4 * S16 - replicated
    assert totals["all-reduce", "gradients"] == scattered / 4 + replicated
    # The head's kernel is gathered in float32, all others in bfloat16.
    head = 4 * 512 * 18_291
    assert totals["all-gather", "parameters"] == head + (scattered - head) / 2
