"""Tests of whole models by hand-written kernels: the same function as by the compiler alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.config.config import get_default
from mixer_jax.errors import UserError
from mixer_jax.model.defaults import settled
from mixer_jax.model.making import build_model, check_kernels, create_model, for_devices
from mixer_jax.model.mixer import MlpMixer
from tests.helpers.messages import raises

WIDTHS: dict[str, Any] = {
    "num_blocks": 2,
    "patch_size": 2,
    "hidden_dim": 16,
    "tokens_mlp_dim": 12,
    "channels_mlp_dim": 20,
}


def model(**overrides: Any) -> MlpMixer:
    return create_model("custom", 3, **WIDTHS, interpret=True, **overrides)


def loss_and_grads(made: MlpMixer, size: int, train: bool) -> list[Any]:
    """The loss on two random images, and its gradient by parameters none of which is zero."""
    images = jax.random.uniform(jax.random.key(1), (2, size, size, 3), minval=-1, maxval=1)
    shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), images))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), shapes)
    rngs = {"stochastic_depth": jax.random.key(2), "dropout": jax.random.key(3)}

    def loss(params: Any) -> jax.Array:
        return jnp.sum(jnp.sin(made.apply({"params": params}, images, train=train, rngs=rngs)))

    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params))


# 28 pixels are 196 tokens. The stem's kernel has 12 rows, which are padded for GPUs.
@pytest.mark.parametrize(
    ("kernels", "size", "settings"),
    [
        ("triton", 28, {"stochastic_depth": 0.5}),
        ("triton", 28, {}),
        ("triton", 8, {"unroll": 1, "remat": "mlp_hidden", "gelu": "exact"}),
        ("triton", 8, {"unroll": 1, "remat": "dots", "stochastic_depth": 0.5}),
        ("mosaic", 8, {"stochastic_depth": 0.5}),
        ("mosaic", 8, {"unroll": 1, "remat": "dots", "gelu": "exact"}),
    ],
)
def test_kernels_compute_what_the_compiler_does(
    kernels: str, size: int, settings: dict[str, Any]
) -> None:
    expected = loss_and_grads(model(**settings), size, train=True)
    actual = loss_and_grads(model(kernels=kernels, **settings), size, train=True)
    for a, b in zip(expected, actual, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_kernels_for_gpus_round_no_more_than_the_compiler_in_bfloat16() -> None:
    exact = loss_and_grads(model(), 28, train=True)
    errors = []
    for name in ("xla", "triton"):
        found = loss_and_grads(model(kernels=name, dtype=jnp.bfloat16), 28, train=True)
        total = sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(exact, found, strict=True))
        errors.append(total**0.5)
    by_compiler, by_kernels = errors
    assert 0 < by_kernels < 1.2 * by_compiler


@pytest.mark.parametrize("kernels", ["triton", "mosaic"])
def test_training_with_dropout_leaves_the_kernels_out(kernels: str) -> None:
    expected = loss_and_grads(model(dropout=0.3), 8, train=True)
    actual = loss_and_grads(model(dropout=0.3, kernels=kernels), 8, train=True)
    for a, b in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(a, b)


def test_blocks_lie_in_a_row_where_kernels_compute_them() -> None:
    section = {"variant": "B/32", "dtype": "auto", "unroll": -1, "remat": "auto", "dropout": 0.0}
    made = {
        name: build_model(section | {"kernels": name}, 3) for name in ("xla", "mosaic", "triton")
    }
    assert {name: m.unroll for name, m in made.items()} == {"xla": 1, "mosaic": 0, "triton": 0}
    dropping = build_model(section | {"kernels": "mosaic", "dropout": 0.1}, 3)
    assert (dropping.unroll, dropping.remat) == (1, "dots")
    assert dropping.computed_by(train=True) == "xla"
    assert dropping.computed_by(train=False) == "mosaic"


@pytest.mark.parametrize(
    ("platform", "said", "unroll", "remat"),
    [
        ("cpu", {}, 1, "dots"),
        ("tpu", {}, 1, "dots"),
        ("gpu", {}, 0, "none"),
        ("gpu", {"kernels": "xla", "unroll": 1}, 1, "dots"),
        ("gpu", {"dropout": 0.1}, 0, "none"),
        ("tpu", {"kernels": "mosaic"}, 0, "none"),
        ("tpu", {"kernels": "mosaic", "unroll": 1}, 1, "none"),
        ("cpu", {"unroll": 0}, 0, "none"),
        ("cpu", {"unroll": 12}, 12, "none"),
        ("cpu", {"unroll": 8}, 8, "dots"),
        ("cpu", {"unroll": 8, "num_blocks": 8}, 8, "none"),
        ("cpu", {"remat": "full"}, 1, "full"),
    ],
)
def test_what_is_left_open_is_settled_by_the_platform(
    platform: str, said: dict[str, Any], unroll: int, remat: str
) -> None:
    model = get_default().model.to_dict()
    chosen = settled(model | said, platform)
    assert (chosen["unroll"], chosen["remat"]) == (unroll, remat)
    assert chosen["dtype"] == ("float32" if platform == "cpu" else "bfloat16")
    assert chosen["kernels"] == said.get("kernels", "triton" if platform == "gpu" else "xla")


def test_kernels_are_for_their_devices() -> None:
    check_kernels("xla", "cpu")
    check_kernels("mosaic", "tpu")
    with raises(UserError, "model.kernels", "triton", "GPU", "auto", "xla"):
        check_kernels("triton", "cpu")


def test_kernels_are_for_images_that_lie_together() -> None:
    made = model(kernels="triton")
    assert for_devices(made, 1) is made
    assert for_devices(made, 8).kernels == "xla"
