"""Tests of what devices send each other, by hand-written programs in every form XLA has."""

from mixer_jax.planning.hlo.collectives import find_collectives
from mixer_jax.planning.hlo.program import read_program
from mixer_jax.planning.hlo.tensor_roles import tensor_roles
from tests.helpers.hlo_programs import COLLECTIVES, SLICES

SHAPES = {"blocks/mlp/kernel": (4, 256, 512), "head/kernel": (512, 10)}
ROWS = [(224, 224, 3), (10,)]


def test_every_form_is_found_once() -> None:
    known = tensor_roles(SHAPES, 4, ROWS)
    sent = find_collectives(read_program(COLLECTIVES), {"data": 2, "fsdp": 4}, known)
    found = {(t.kind, t.dtype, t.axis, t.carries): (t.times, t.num_bytes) for t in sent}
    kernel, head = 4 * 256 * 512, 512 * 10
    assert found == {
        # Summed in float32, though the terms are bfloat16.
        ("reduce-scatter", "f32", "fsdp", "gradients"): (1, 4 * kernel),
        ("all-gather", "bf16", "fsdp", "parameters"): (1, 2 * kernel),
        ("all-to-all", "bf16", "data", "activations"): (1, 2 * 32 * 196 * 512),
        ("all-reduce", "f32", "data", "gradients"): (3, 3 * 4 * head),
        ("all-reduce", "f32", "all", "gradients"): (1, 4 * head),
        ("all-reduce", "f32", "all", "scalars"): (1, 4),
        ("collective-permute", "u8", "all", "mixup rows"): (1, 3 * 224 * 224),
    }
    assert [t.carries for t in sent if t.is_unexpected] == ["activations"]


def test_between_slices_the_host_sends() -> None:
    known = tensor_roles(SHAPES, 1, ROWS, in_slices=True)
    sent = find_collectives(read_program(SLICES), {"data": 8, "fsdp": 1}, known, slices=2)
    found = {(t.kind, t.axis, t.carries): (t.num_bytes, t.groups) for t in sent}
    kernel = 4 * 4 * 256 * 512 // 4
    assert found == {
        ("all-gather", "data", "gradients"): (4 * 524_288, ((0, 1, 2, 3),)),
        ("all-reduce", "slices", "gradients"): (kernel, ((0, 4),)),
    }


def test_blocks_alone_in_groups_and_flat_are_known() -> None:
    known = tensor_roles(SHAPES, 1, ROWS)
    array = read_program(COLLECTIVES).computations["main"].instructions["gradients"].arrays[0]
    for dims in [(4, 256, 512), (256, 512), (1, 512, 256), (2, 2, 256, 512), (2, 256, 512)]:
        assert known.name("all-reduce", array._replace(dims=dims)) == "gradients"
    assert known.name("all-reduce", array._replace(dims=(256 * 512,))) == "gradients"
    assert known.name("all-reduce", array._replace(dims=(32, 196, 512))) == "activations"
    assert known.name("all-gather", array._replace(dims=(256, 512))) == "parameters"
