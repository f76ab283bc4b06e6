"""Tests of what divides over devices, in plain numbers."""

import pytest

from mixer_jax.distributed.divisibility import check_divisible, check_mesh
from mixer_jax.errors import UserError
from tests.helpers.messages import raises


@pytest.mark.parametrize(
    ("data", "fsdp", "devices", "slices"),
    [(0, 1, 6, 1), (3, 2, 6, 1), (0, 4, 16, 4), (8, 2, 16, 8)],
)
def test_meshes(data: int, fsdp: int, devices: int, slices: int) -> None:
    check_mesh(data, fsdp, devices, slices)


def test_parameters_are_split_within_a_slice() -> None:
    with raises(UserError, "mesh.fsdp", "8", "4"):
        check_mesh(0, 8, 16, 4)


@pytest.mark.parametrize(("data", "fsdp"), [(0, 3), (0, 16), (3, 1), (4, 4), (16, 1)])
def test_meshes_of_another_number(data: int, fsdp: int) -> None:
    with raises(UserError, "mesh.data", str(data), "mesh.fsdp", str(fsdp), "8"):
        check_mesh(data, fsdp, 8)


def test_pieces_divide_too() -> None:
    check_divisible("config.batch_size", 48, 8, pieces=3)
    with raises(UserError, "config.batch_size", "40", "8", "3", "24", "48"):
        check_divisible("config.batch_size", 40, 8, pieces=3)
