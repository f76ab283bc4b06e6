"""Tests of drop-path masks, and of custom backends: they compute the same function as XLA."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.models.mixer import MlpMixer
from mixer_jax.models.stack import active_backend, use_partitionable_backend
from tests.helpers.models import random_images, random_params, tiny_mixer

CONFIG: dict[str, Any] = {
    "num_blocks": 2,
    "patch_size": 2,
    "hidden_dim": 16,
    "tokens_mlp_dim": 12,
    "channels_mlp_dim": 20,
}


def model(**overrides: Any) -> MlpMixer:
    return tiny_mixer(3, **CONFIG, interpret=True, **overrides)


def loss_and_grads(model: MlpMixer, size: int) -> list[Any]:
    """Returns the training loss on two random images, and its gradients."""
    images, params = random_images(2, size), random_params(model, size)
    rngs = {"stochastic_depth": jax.random.key(2), "dropout": jax.random.key(3)}

    def loss(params: Any) -> jax.Array:
        return jnp.sum(jnp.sin(model.apply({"params": params}, images, train=True, rngs=rngs)))

    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params))


# 28 pixels are 196 tokens. The stem's kernel has 12 rows, which are padded for GPUs.
@pytest.mark.parametrize(
    ("backend", "size", "settings"),
    [
        ("triton", 28, {"stochastic_depth": 0.5}),
        ("triton", 28, {}),
        ("triton", 8, {"scan_unroll": 1, "remat": "mlp_hidden", "gelu": "exact"}),
        ("triton", 8, {"scan_unroll": 1, "remat": "dots", "stochastic_depth": 0.5}),
        ("mosaic", 8, {"stochastic_depth": 0.5}),
        ("mosaic", 8, {"scan_unroll": 1, "remat": "dots", "gelu": "exact"}),
    ],
)
def test_custom_backends_match_xla(backend: str, size: int, settings: dict[str, Any]) -> None:
    expected = loss_and_grads(model(**settings), size)
    actual = loss_and_grads(model(backend=backend, **settings), size)
    for a, b in zip(expected, actual, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_triton_rounds_no_more_than_xla_in_bfloat16() -> None:
    exact = loss_and_grads(model(), 28)
    errors = {}
    for backend in ("xla", "triton"):
        actual = loss_and_grads(model(backend=backend, dtype="bfloat16"), 28)
        total = sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(exact, actual, strict=True))
        errors[backend] = total**0.5
    assert 0 < errors["triton"] < 1.2 * errors["xla"]


@pytest.mark.parametrize("backend", ["triton", "mosaic"])
def test_training_with_dropout_falls_back_to_xla(backend: str) -> None:
    dropping = model(dropout=0.3, backend=backend)
    assert active_backend(dropping, train=True) == "xla"
    assert active_backend(dropping, train=False) == backend
    assert active_backend(model(backend=backend), train=True) == backend
    expected = loss_and_grads(model(dropout=0.3), 8)
    for a, b in zip(expected, loss_and_grads(dropping, 8), strict=True):
        np.testing.assert_array_equal(a, b)


def test_multi_device_falls_back_to_xla() -> None:
    custom = model(backend="triton")
    assert use_partitionable_backend(custom, 1) is custom
    assert use_partitionable_backend(custom, 8) == model(backend="xla")


def block_outputs(drop_rate: float, num_images: int) -> tuple[np.ndarray, ...]:
    """Returns the last block's features with each branch off and on, and with random branches.

    All images are equal. A model of two blocks drops branches of its second block with
    probability `drop_rate`, and the first block does nothing.
    """
    stack = tiny_mixer(0, num_blocks=2, stochastic_depth=drop_rate)
    params = random_params(stack)
    params["pre_head_layer_norm"] = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    images = jnp.tile(random_images(1), (num_images, 1, 1, 1))
    apply = jax.jit(stack.apply, static_argnums=2)

    def without(*branches: tuple[int, str]) -> Any:
        """Returns the parameters with the outputs of some branches at zero."""
        blocks = dict(params["blocks"])
        for block, name in branches:
            silent = jax.tree.map(lambda x, b=block: x.at[b].set(0.0), blocks[name]["Dense_1"])
            blocks[name] = {**blocks[name], "Dense_1": silent}
        return {"params": {**params, "blocks": blocks}}

    first = [(0, "token_mixing"), (0, "channel_mixing")]
    tokens, channels = (1, "token_mixing"), (1, "channel_mixing")
    neither, only_tokens, only_channels, both = (
        np.asarray(apply(without(*first, *silent), images[:1], False)[0])
        for silent in ([tokens, channels], [channels], [tokens], [])
    )
    rngs = {"stochastic_depth": jax.random.key(3)}
    random = np.asarray(apply(without(*first), images, True, None, rngs=rngs))
    return neither, only_tokens, only_channels, both, random


def test_stochastic_depth_drops_branches_per_image_without_rescaling() -> None:
    *outcomes, random = block_outputs(0.3, num_images=4000)
    matches = np.stack([np.abs(random - o).max(-1) < 1e-4 for o in outcomes])
    assert (matches.sum(0) == 1).all()
    # Two independent masks of keep probability 0.7; 4,000 draws have a deviation of under 0.008.
    np.testing.assert_allclose(matches.mean(1), [0.09, 0.21, 0.21, 0.49], atol=0.03)


def test_first_block_is_never_dropped() -> None:
    stack = tiny_mixer(0, num_blocks=1, stochastic_depth=0.9)
    params, images = {"params": random_params(stack)}, random_images(50)
    rngs = {"stochastic_depth": jax.random.key(3)}
    expected = stack.apply(params, images)
    actual = stack.apply(params, images, train=True, rngs=rngs)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
