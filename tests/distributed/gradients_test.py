"""Tests of sharded gradients: exact sums, and the collectives of compiled programs."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.data.source import Source
from mixer_jax.distributed.gradients import sharded_value_and_grad
from mixer_jax.distributed.sharding import batch_sharding
from mixer_jax.evaluation.classification import make_eval_step
from mixer_jax.training.datasets import RunDatasets
from mixer_jax.training.setup import Experiment, build_experiment
from tests.helpers.batches import mesh_of
from tests.helpers.tiny_run import small_config

NUM_CLASSES, IMAGE_SIZE, BATCH_SIZE = 24, 16, 16
COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
# Type and number of elements of each array, by collective.
Collectives = dict[str, list[tuple[str, int]]]


def test_small_gradients_are_summed_in_float32() -> None:
    """Seven gradients that would vanish next to the eighth in bfloat16."""

    def value_and_grad(params: Any, examples: jax.Array, shared: jax.Array) -> Any:
        grad = jnp.where(examples[0] == 0, jnp.bfloat16(1), jnp.bfloat16(2**-10))
        return examples[0] * shared, {"kernel": jnp.full_like(params["kernel"], grad)}

    for shape in ((8, 1), (1, 8), (2, 4)):
        mean = sharded_value_and_grad(
            value_and_grad,
            mesh_of(*shape),
            lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree),
            "mixer",
        )
        params = {"kernel": jnp.zeros((8, 2))}
        value, grads = jax.jit(mean)(params, jnp.arange(8.0), jnp.float32(2))
        assert float(value) == 7.0
        assert grads["kernel"].dtype == jnp.float32
        np.testing.assert_allclose(grads["kernel"], (1 + 7 * 2**-10) / 8, rtol=1e-6)


def find_collectives(lowered: Any) -> Collectives:
    """Compiles a program and lists the arrays that it communicates."""
    found: Collectives = {}
    for arrays, collective in COLLECTIVE.findall(lowered.compile().as_text()):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", arrays):
            size = int(np.prod([int(n) for n in dims.split(",") if n], dtype=int))
            found.setdefault(collective, []).append((dtype, size))
    return found


def build(fsdp: int, num_devices: int = 8, **overrides: Any) -> Experiment:
    """Builds a run of three blocks in bfloat16, with mixup and stochastic depth."""
    config = small_config(
        "",
        image_size=IMAGE_SIZE,
        batch_size=BATCH_SIZE,
        mesh__fsdp=fsdp,
        model__num_blocks=3,
        model__hidden_dim=32,
        model__tokens_mlp_dim=16,
        model__channels_mlp_dim=64,
        model__dtype="bfloat16",
        recipe__mixup=0.5,
        recipe__ema_decay=0.0,
        **overrides,
    )
    source = Source("toy", range(100), tuple(map(str, range(NUM_CLASSES))))
    return build_experiment(config, RunDatasets(source, {}, {}), jax.devices()[:num_devices])


def batch_shapes(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = batch_sharding(experiment.mesh)
    image = (BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3)
    return {
        "image": jax.ShapeDtypeStruct(image, jnp.uint8, sharding=sharding),
        "label": jax.ShapeDtypeStruct((BATCH_SIZE,), jnp.int32, sharding=sharding),
    }


def lower_train_step(experiment: Experiment) -> Any:
    train_step: Any = experiment.train_step
    return train_step.lower(experiment.state_shape, batch_shapes(experiment))


def train_collectives(fsdp: int, **overrides: Any) -> tuple[Collectives, int, int]:
    """Returns the collectives of a training step, and the sizes of all parameters and kernels."""
    experiment = build(fsdp, **overrides)
    params = experiment.state_shape.params
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    return find_collectives(lower_train_step(experiment)), total, num_kernel_parameters(params)


def num_kernel_parameters(params: Any) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")


def num_elements(arrays: list[tuple[str, int]], dtype: str) -> int:
    """Sums the sizes of arrays of a type, without scalars."""
    return sum(size for found, size in arrays if found == dtype and size > 1)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_without_fsdp_gradients_are_reduced_once(num_microbatches: int) -> None:
    found, total, _ = train_collectives(1, recipe__grad_accum_steps=num_microbatches)
    assert set(found) == {"all-reduce", "collective-permute"}
    assert num_elements(found["all-reduce"], "f32") == total
    assert {dtype for dtype, _ in found["all-reduce"]} == {"f32"}
    # Mixup: the partners of each device's first image and label are on the previous device.
    partners = {("u8", IMAGE_SIZE * IMAGE_SIZE * 3), ("f32", NUM_CLASSES)}
    assert set(found["collective-permute"]) == partners


def test_with_fsdp_parameters_are_gathered_and_gradients_scattered() -> None:
    found, total, kernels = train_collectives(8)
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce", "collective-permute"}
    gathered = found["all-gather"]
    assert num_elements(gathered, "bf16") + num_elements(gathered, "f32") == kernels
    assert num_elements(found["reduce-scatter"], "f32") == kernels // 8
    assert num_elements(found["all-reduce"], "f32") == total - kernels


def test_with_both_axes_gradient_shards_are_reduced_over_data() -> None:
    found, total, kernels = train_collectives(4)
    assert num_elements(found["reduce-scatter"], "f32") == kernels // 4
    assert num_elements(found["all-reduce"], "f32") == kernels // 4 + total - kernels


def test_one_device_communicates_nothing() -> None:
    assert find_collectives(lower_train_step(build(1, num_devices=1))) == {}


def test_evaluation_gathers_parameters_and_results_only() -> None:
    experiment = build(4)
    params = experiment.state_shape.params
    mask = jax.ShapeDtypeStruct((BATCH_SIZE,), jnp.bool_, sharding=batch_sharding(experiment.mesh))
    batch = batch_shapes(experiment) | {"mask": mask}
    eval_step: Any = make_eval_step(experiment.model, experiment.mesh)
    found = find_collectives(eval_step.lower(params, batch))
    assert set(found) == {"all-gather"}
    arrays = sorted(found["all-gather"])
    for result in ("f32", "f32", "pred", "s32"):
        arrays.remove((result, BATCH_SIZE))
    assert sum(size for _, size in arrays) == num_kernel_parameters(params)
