"""Collectives: all forms in hand-written programs, tensor roles, notations of replica groups."""

import pytest

from mixer_jax.planning.hlo import ArrayType, parse_program
from mixer_jax.planning.hlo_collectives import (
    ReplicaGroups,
    TensorRoles,
    find_collectives,
    mesh_axis_of,
    parse_replica_groups,
    parse_source_target_pairs,
)
from tests.helpers.hlo_programs import COLLECTIVES, MULTI_SLICE

PARAM_SHAPES = {"blocks/mlp/kernel": (4, 256, 512), "head/kernel": (512, 10)}
EXAMPLE_SHAPES = [(224, 224, 3), (10,)]
MESH = {"data": 2, "fsdp": 4}
ROWS = ((0, 1, 2, 3), (4, 5, 6, 7))
COLUMNS = ((0, 4), (1, 5), (2, 6), (3, 7))
ALL = (tuple(range(8)),)


def test_find_collectives_finds_each_form_once() -> None:
    roles = TensorRoles(PARAM_SHAPES, 4, EXAMPLE_SHAPES)
    collectives = find_collectives(parse_program(COLLECTIVES), MESH, roles)
    kernel, head = 4 * 256 * 512, 512 * 10
    found = {
        (c.op, c.dtype, c.mesh_axis, c.tensor_role): (c.num_executions, c.num_bytes)
        for c in collectives
    }
    assert found == {
        # Reduced in float32, although the operand is bfloat16.
        ("reduce-scatter", "f32", "fsdp", "gradients"): (1, 4 * kernel),
        ("all-gather", "bf16", "fsdp", "parameters"): (1, 2 * kernel),
        ("all-to-all", "bf16", "data", "activations"): (1, 2 * 32 * 196 * 512),
        ("all-reduce", "f32", "data", "gradients"): (3, 3 * 4 * head),
        ("all-reduce", "f32", "all", "gradients"): (1, 4 * head),
        ("all-reduce", "f32", "all", "scalars"): (1, 4),
        ("collective-permute", "u8", "all", "mixup examples"): (1, 3 * 224 * 224),
    }
    assert [c.tensor_role for c in collectives if c.is_unexpected] == ["activations"]


def test_find_collectives_between_slices() -> None:
    roles = TensorRoles(PARAM_SHAPES, 1, EXAMPLE_SHAPES, multi_slice=True)
    mesh = {"data": 8, "fsdp": 1}
    collectives = find_collectives(parse_program(MULTI_SLICE), mesh, roles, num_slices=2)
    found = {
        (c.op, c.mesh_axis, c.tensor_role): (c.num_bytes, c.replica_groups) for c in collectives
    }
    assert found == {
        ("all-gather", "data", "gradients"): (4 * 524_288, ((0, 1, 2, 3),)),
        ("all-reduce", "slices", "gradients"): (4 * 4 * 256 * 512 // 4, ((0, 4),)),
    }


@pytest.mark.parametrize(
    ("op", "dims", "role"),
    [
        # All blocks, one block, a transposed one, and groups of blocks of an unrolled scan.
        ("all-reduce", (4, 256, 512), "gradients"),
        ("all-reduce", (256, 512), "gradients"),
        ("all-reduce", (1, 512, 256), "gradients"),
        ("all-reduce", (2, 2, 256, 512), "gradients"),
        ("all-reduce", (2, 256, 512), "gradients"),
        ("all-reduce", (256 * 512,), "gradients"),
        ("all-gather", (256, 512), "parameters"),
        ("all-reduce", (32, 196, 512), "activations"),
    ],
)
def test_tensor_roles(op: str, dims: tuple[int, ...], role: str) -> None:
    roles = TensorRoles(PARAM_SHAPES, 1, EXAMPLE_SHAPES)
    assert roles.infer(op, ArrayType("f32", dims)) == role


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ROWS),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add", COLUMNS),
        ("replica_groups={}, to_apply=%add", ALL),
        ("channel_id=1, to_apply=%add", ALL),
        ("replica_groups=[2,4]<=[8], dimensions={0}", ROWS),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", COLUMNS),
        ("replica_groups=[1,8]<=[8]", ALL),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}, use_global", ALL),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ROWS),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", COLUMNS),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", ALL),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", COLUMNS),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ROWS),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ROWS),
    ],
)
def test_parse_replica_groups(attributes: str, groups: ReplicaGroups) -> None:
    assert parse_replica_groups(attributes, 8) == groups


@pytest.mark.parametrize(
    ("groups", "axis"),
    [
        (ROWS, "fsdp"),
        (COLUMNS, "data"),
        (ALL, "all"),
        (((0, 1), (2, 3), (4, 5), (6, 7)), "other"),
        (((0,), (1,)), "none"),
    ],
)
def test_mesh_axis_of_groups(groups: ReplicaGroups, axis: str) -> None:
    assert mesh_axis_of(groups, MESH) == axis


def test_mesh_axis_of_ignores_axes_of_one_device() -> None:
    assert mesh_axis_of(ALL, {"data": 8, "fsdp": 1}) == "data"


def test_mesh_axis_of_ring() -> None:
    attribute = "source_target_pairs={" + ",".join(f"{{{n},{(n + 1) % 8}}}" for n in range(8)) + "}"
    pairs = parse_source_target_pairs(attribute)
    assert pairs[-1] == (7, 0)
    assert mesh_axis_of(pairs, MESH, pairs=True) == "all"
    assert mesh_axis_of(pairs, {"data": 8, "fsdp": 1}, pairs=True) == "data"
    assert mesh_axis_of(((0, 1), (1, 2)), MESH, pairs=True) == "fsdp"
