"""Tests of the mesh and of the sharding of batches and parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from mixer_jax.distributed.sharding import (
    batch_sharding,
    check_divisible,
    check_mesh,
    make_mesh,
    replicate,
    state_sharding,
)
from mixer_jax.errors import UserError
from tests.helpers.messages import mentions, raises


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
    assert state_sharding({"kernel": array}, make_mesh(1, 8), "mixer")["kernel"].spec == spec
    unsharded = PartitionSpec(*[None] * len(shape))
    assert state_sharding({"bias": array}, make_mesh(1, 8), "mixer")["bias"].spec == unsharded
    assert state_sharding({"kernel": array}, make_mesh(8, 1), "mixer")["kernel"].spec == unsharded
