"""Tests of the mesh, of shardings, and of gradients: exact sums, and compiled collectives."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from mixer_jax.data.source import Source
from mixer_jax.distributed.sharding import (
    batch_sharding,
    check_divisible,
    check_mesh,
    make_mesh,
    replicate,
    sharded_value_and_grad,
    state_sharding,
)
from mixer_jax.errors import UserError
from mixer_jax.evaluation.classification import make_eval_step
from mixer_jax.models.registry import get_family
from mixer_jax.training.datasets import RunDatasets
from mixer_jax.training.setup import Experiment, build_experiment
from tests.helpers.batches import mesh_of
from tests.helpers.messages import mentions, raises
from tests.helpers.tiny_run import small_config

MIXER = get_family("mixer")
NUM_CLASSES, IMAGE_SIZE, BATCH_SIZE = 24, 16, 16
COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
# Type and number of elements of each array, by collective.
Collectives = dict[str, list[tuple[str, int]]]


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"), [(0, 1, (8, 1)), (0, 8, (1, 8)), (4, 2, (4, 2)), (0, 4, (2, 4))]
)
def test_make_mesh_fills_the_data_axis(data: int, fsdp: int, shape: tuple[int, int]) -> None:
    mesh = make_mesh(data, fsdp)
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == shape
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert {*mesh.devices.flat} == {*jax.devices()}


@pytest.mark.parametrize(("data", "fsdp"), [(0, 3), (0, 16), (3, 1), (4, 4), (8, 2), (16, 1)])
def test_make_mesh_needs_all_devices(data: int, fsdp: int) -> None:
    with raises(UserError, "mesh.data", str(data), "mesh.fsdp", str(fsdp), "8"):
        make_mesh(data, fsdp)


@pytest.mark.parametrize(
    ("data", "fsdp", "num_devices", "num_slices"),
    [(0, 1, 6, 1), (3, 2, 6, 1), (0, 4, 16, 4), (8, 2, 16, 8)],
)
def test_check_mesh_accepts(data: int, fsdp: int, num_devices: int, num_slices: int) -> None:
    check_mesh(data, fsdp, num_devices, num_slices)


@pytest.mark.parametrize(("data", "fsdp", "flag"), [(0, 2, "fsdp"), (4, 1, "data")])
def test_check_mesh_of_one_device_names_the_flag_to_remove(data: int, fsdp: int, flag: str) -> None:
    with raises(UserError, f"--config.mesh.{flag}") as caught:
        check_mesh(data, fsdp, 1)
    other = {"fsdp": "data", "data": "fsdp"}[flag]
    assert not mentions(str(caught.value), f"--config.mesh.{other}")


def test_check_mesh_keeps_fsdp_within_a_slice() -> None:
    with raises(UserError, "mesh.fsdp", "8", "4"):
        check_mesh(0, 8, 16, 4)


@pytest.mark.parametrize(
    ("batch_size", "num_devices", "num_microbatches", "nearest"),
    [(100, 8, 1, ("96", "104")), (40, 8, 3, ("24", "48")), (3, 8, 1, ("8",))],
)
def test_check_divisible_suggests_the_nearest_sizes(
    batch_size: int, num_devices: int, num_microbatches: int, nearest: tuple[str, ...]
) -> None:
    key = "config.batch_size"
    with raises(UserError, key, str(batch_size), str(num_devices), *nearest) as caught:
        check_divisible(key, batch_size, num_devices, num_microbatches)
    assert not mentions(str(caught.value), "0")
    assert mentions(str(caught.value), str(num_microbatches)) == (num_microbatches > 1)
    for size in nearest:
        check_divisible(key, int(size), num_devices, num_microbatches)


def test_batch_sharding_splits_examples_over_both_axes() -> None:
    x = jax.device_put(jnp.arange(16), batch_sharding(make_mesh(2, 4)))
    assert [len(shard.data) for shard in x.addressable_shards] == [2] * 8


def test_replicate_copies_to_every_device() -> None:
    mesh = make_mesh(2, 4)
    x = jax.device_put(jnp.arange(16), batch_sharding(mesh))
    for shard in jax.jit(lambda x: replicate(x, mesh))(x).addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(16))


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((12, 384, 768), PartitionSpec(None, None, "fsdp")),
        ((12, 3072, 768), PartitionSpec(None, "fsdp", None)),
        ((16, 10), PartitionSpec("fsdp", None)),
        # Eight devices divide only the smaller axis, or none.
        ((8, 20), PartitionSpec("fsdp", None)),
        ((3, 10), PartitionSpec(None, None)),
    ],
)
def test_state_sharding_splits_kernels_along_their_largest_divisible_axis(
    shape: tuple[int, ...], spec: Any
) -> None:
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert state_sharding({"kernel": array}, make_mesh(1, 8), MIXER)["kernel"].spec == spec
    unsharded = PartitionSpec(*[None] * len(shape))
    assert state_sharding({"bias": array}, make_mesh(1, 8), MIXER)["bias"].spec == unsharded
    assert state_sharding({"kernel": array}, make_mesh(8, 1), MIXER)["kernel"].spec == unsharded


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
            MIXER,
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
    args = experiment.state_shape, batch_shapes(experiment), experiment.hyperparams
    return train_step.lower(*args)


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
