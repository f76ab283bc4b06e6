"""Tests of what devices send each other: exact sums, and the collectives of compiled programs."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixer_jax.checkpoints.manager import abstract_state
from mixer_jax.distributed.gradients import sharded_value_and_grad
from mixer_jax.distributed.sharding import batch_sharding, replicated, state_sharding
from mixer_jax.evaluation.classification import make_eval_step
from mixer_jax.models.mixer import MlpMixer
from mixer_jax.models.mixer_config import get_config, num_params
from mixer_jax.models.registry import create_model
from mixer_jax.training.step import create_state, train_step
from tests.helpers.batches import mesh_of

WIDTHS = {
    "num_blocks": 3,
    "patch_size": 4,
    "hidden_dim": 32,
    "tokens_mlp_dim": 16,
    "channels_mlp_dim": 64,
}
NUM_CLASSES, SIZE, BATCH = 24, 16, 16
COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def test_small_gradients_are_summed_in_float32() -> None:
    """Seven gradients that vanish beside the eighth in bfloat16."""

    def value_and_grad(params: Any, rows: jax.Array, common: jax.Array) -> Any:
        grad = jnp.where(rows[0] == 0, jnp.bfloat16(1), jnp.bfloat16(2**-10))
        return rows[0] * common, {"kernel": jnp.full_like(params["kernel"], grad)}

    for layout in ((8, 1), (1, 8), (2, 4)):
        mesh = mesh_of(*layout)
        mean = sharded_value_and_grad(
            value_and_grad, mesh, lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
        )
        params = {"kernel": jnp.zeros((8, 2))}
        value, grads = jax.jit(mean)(params, jnp.arange(8.0), jnp.float32(2))
        assert float(value) == 7.0
        assert grads["kernel"].dtype == jnp.float32
        np.testing.assert_allclose(grads["kernel"], (1 + 7 * 2**-10) / 8, rtol=1e-6)


def sent_by(compiled: Any) -> dict[str, list[tuple[str, int]]]:
    """Returns, by kind, type and number of values of each array that a compiled program sends."""
    found: dict[str, list[tuple[str, int]]] = {}
    for arrays, kind in COLLECTIVE.findall(compiled.as_text()):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", arrays):
            size = int(np.prod([int(n) for n in dims.split(",") if n], dtype=int))
            found.setdefault(kind, []).append((dtype, size))
    return found


def make_model() -> MlpMixer:
    dtype = jnp.dtype("bfloat16")
    return create_model("custom", NUM_CLASSES, **WIDTHS, stochastic_depth=0.1, dtype=dtype)


def batch_shape() -> dict[str, jax.ShapeDtypeStruct]:
    image = jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 3), jnp.uint8)
    return {"image": image, "label": jax.ShapeDtypeStruct((BATCH,), jnp.int32)}


def sent_by_step(data: int, fsdp: int, pieces: int = 1) -> dict[str, list[tuple[str, int]]]:
    mesh, model = mesh_of(data, fsdp), make_model()
    schedule = optax.constant_schedule(0.1)
    tx = optax.adam(schedule)
    make_state = functools.partial(create_state, jax.random.key(0), model, tx, SIZE, ema=False)
    shape = jax.eval_shape(make_state)
    sharding = state_sharding(shape, mesh)
    step = functools.partial(
        train_step,
        model=model,
        tx=tx,
        schedule=schedule,
        mesh=mesh,
        num_classes=NUM_CLASSES,
        seed=0,
        loss="sigmoid",
        label_smoothing=0.0,
        mixup=0.5,
        grad_accum_steps=pieces,
        ema_decay=0.0,
    )
    compiled = jax.jit(
        step,
        in_shardings=(sharding, batch_sharding(mesh)),
        out_shardings=(sharding, replicated(mesh)),
    )
    return sent_by(compiled.lower(shape, batch_shape()).compile())


def counted(pieces: list[tuple[str, int]], dtype: str) -> int:
    return sum(size for kind, size in pieces if kind == dtype and size > 1)


def param_shapes() -> Any:
    images = jnp.zeros((1, SIZE, SIZE, 3))
    return jax.eval_shape(lambda: make_model().init(jax.random.key(0), images))["params"]


def num_kernel_parameters() -> int:
    leaves = jax.tree_util.tree_leaves_with_path(param_shapes())
    return sum(x.size for path, x in leaves if path[-1].key == "kernel")


TOTAL = num_params(get_config("custom", **WIDTHS), SIZE, NUM_CLASSES)


@pytest.mark.parametrize("pieces", [1, 2])
def test_without_fsdp_gradients_are_reduced_once_and_nothing_else_is_sent(pieces: int) -> None:
    found = sent_by_step(8, 1, pieces)
    assert set(found) == {"all-reduce", "collective-permute"}
    assert counted(found["all-reduce"], "f32") == TOTAL
    assert {dtype for dtype, _ in found["all-reduce"]} == {"f32"}
    # Mixup: each device's first image and label have their partners on the device before.
    sent = {("u8", SIZE * SIZE * 3), ("f32", NUM_CLASSES)}
    assert set(found["collective-permute"]) == sent


def test_with_fsdp_parameters_are_gathered_and_gradients_scattered() -> None:
    found = sent_by_step(1, 8)
    kernels = num_kernel_parameters()
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce", "collective-permute"}
    assert counted(found["all-gather"], "bf16") + counted(found["all-gather"], "f32") == kernels
    assert counted(found["reduce-scatter"], "f32") == kernels // 8
    assert counted(found["all-reduce"], "f32") == TOTAL - kernels


def test_with_both_the_parts_of_gradients_are_reduced_over_data() -> None:
    found = sent_by_step(2, 4)
    kernels = num_kernel_parameters()
    assert counted(found["reduce-scatter"], "f32") == kernels // 4
    assert counted(found["all-reduce"], "f32") == kernels // 4 + TOTAL - kernels


def test_an_evaluation_gathers_parameters_and_answers_and_nothing_else() -> None:
    mesh = mesh_of(2, 4)
    params = param_shapes()
    split = abstract_state(params, state_sharding(params, mesh))
    batch = batch_shape() | {"mask": jax.ShapeDtypeStruct((BATCH,), jnp.bool_)}
    spread = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh))
        for name, x in batch.items()
    }
    eval_step: Any = make_eval_step(make_model(), mesh)
    found = sent_by(eval_step.lower(split, spread).compile())
    assert set(found) == {"all-gather"}
    answers = [("f32", BATCH), ("f32", BATCH), ("pred", BATCH), ("s32", BATCH)]
    rest = sorted(found["all-gather"])
    for answer in answers:
        rest.remove(answer)
    assert sum(size for _, size in rest) == num_kernel_parameters()
