"""Tests of the mesh and of where arrays lie on it."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from mixer_jax.distributed.sharding import (
    batch_sharding,
    check_batch_size,
    make_mesh,
    state_sharding,
)
from mixer_jax.errors import UserError
from tests.helpers.messages import mentions, raises


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"), [(0, 1, (8, 1)), (0, 8, (1, 8)), (4, 2, (4, 2)), (0, 4, (2, 4))]
)
def test_mesh_shapes(data: int, fsdp: int, shape: tuple[int, int]) -> None:
    mesh = make_mesh(data, fsdp)
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == shape
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(("data", "fsdp"), [(0, 3), (0, 16), (3, 1), (4, 4), (8, 2)])
def test_meshes_that_do_not_fit(data: int, fsdp: int) -> None:
    with raises(UserError, "mesh.data", str(data), "mesh.fsdp", str(fsdp), "8"):
        make_mesh(data, fsdp)


def test_batches_lie_over_both_axes() -> None:
    x = jax.device_put(jnp.arange(16), batch_sharding(make_mesh(2, 4)))
    assert [len(shard.data) for shard in x.addressable_shards] == [2] * 8


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((12, 384, 768), PartitionSpec(None, None, "fsdp")),
        ((12, 3072, 768), PartitionSpec(None, "fsdp", None)),
        ((16, 10), PartitionSpec("fsdp", None)),
        ((3, 10), PartitionSpec(None, None)),
    ],
)
def test_kernels_are_split_along_their_largest_divisible_axis(
    shape: tuple[int, ...], spec: Any
) -> None:
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert state_sharding({"kernel": array}, make_mesh(1, 8))["kernel"].spec == spec
    whole = PartitionSpec(*[None] * len(shape))
    assert state_sharding({"bias": array}, make_mesh(1, 8))["bias"].spec == whole
    assert state_sharding({"kernel": array}, make_mesh(8, 1))["kernel"].spec == whole


def test_batch_sizes_name_the_nearest() -> None:
    mesh = make_mesh(0, 1)
    check_batch_size("config.batch_size", 64, mesh, pieces=4)
    with raises(UserError, "config.batch_size", "100", "8", "96", "104"):
        check_batch_size("config.batch_size", 100, mesh)
    # There is no lower one.
    with raises(UserError, "config.batch_size", "3", "8") as caught:
        check_batch_size("config.batch_size", 3, mesh)
    assert not mentions(str(caught.value), "0")
    assert not mentions(str(caught.value), "16")
