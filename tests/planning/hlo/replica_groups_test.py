"""Tests of how groups of devices are read: the same groups in every notation."""

import pytest

from mixer_jax.planning.hlo.replica_groups import mesh_axis_of, read_groups, read_pairs

ROWS = ((0, 1, 2, 3), (4, 5, 6, 7))
COLUMNS = ((0, 4), (1, 5), (2, 6), (3, 7))
MESH = {"data": 2, "fsdp": 4}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ROWS),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add", COLUMNS),
        ("replica_groups={}, to_apply=%add", (tuple(range(8)),)),
        ("channel_id=1, to_apply=%add", (tuple(range(8)),)),
        ("replica_groups=[2,4]<=[8], dimensions={0}", ROWS),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", COLUMNS),
        ("replica_groups=[1,8]<=[8]", (tuple(range(8)),)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}, use_global", (tuple(range(8)),)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ROWS),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", COLUMNS),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", (tuple(range(8)),)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", COLUMNS),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ROWS),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ROWS),
    ],
)
def test_notations(text: str, groups: tuple[tuple[int, ...], ...]) -> None:
    assert read_groups(text, 8) == groups


@pytest.mark.parametrize(
    ("groups", "axis"),
    [
        (ROWS, "fsdp"),
        (COLUMNS, "data"),
        ((tuple(range(8)),), "all"),
        (((0, 1), (2, 3), (4, 5), (6, 7)), "other"),
        (((0,), (1,)), "none"),
    ],
)
def test_axes(groups: tuple[tuple[int, ...], ...], axis: str) -> None:
    assert mesh_axis_of(groups, MESH) == axis


def test_an_axis_of_one_device_is_no_axis() -> None:
    assert mesh_axis_of((tuple(range(8)),), {"data": 8, "fsdp": 1}) == "data"


def test_pairs_of_a_ring_go_along_all_axes_that_they_cross() -> None:
    ring = "source_target_pairs={" + ",".join(f"{{{n},{(n + 1) % 8}}}" for n in range(8)) + "}"
    assert read_pairs(ring)[-1] == (7, 0)
    assert mesh_axis_of(read_pairs(ring), MESH, pairs=True) == "all"
    assert mesh_axis_of(read_pairs(ring), {"data": 8, "fsdp": 1}, pairs=True) == "data"
    assert mesh_axis_of(((0, 1), (1, 2)), MESH, pairs=True) == "fsdp"
