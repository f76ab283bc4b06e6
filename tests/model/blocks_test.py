"""Tests of a block: how its MLPs are mapped, and what training drops of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.model.blocks import MixerBlock, MlpBlock, map_mlp


def test_mlp_is_shared_over_the_axes_it_is_mapped_over() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 5, 7))
    places = jnp.arange(14).reshape(2, 7)
    mapped, plain = map_mlp(axis=1)(4), MlpBlock(4)
    variables = mapped.init(jax.random.key(1), x, places, False)
    assert variables["params"]["Dense_0"]["kernel"].shape == (5, 4)
    columns = [
        [plain.apply(variables, x[i, :, c], places[i, c], False) for c in range(7)] for i in (0, 1)
    ]
    np.testing.assert_allclose(
        mapped.apply(variables, x, places, False), np.stack(columns).swapaxes(1, 2), atol=1e-6
    )


def test_vectors_as_rows_of_one_matrix_change_no_value() -> None:
    settings: dict[str, Any] = {"dropout": 0.3, "stochastic_depth": True}
    x = jax.random.normal(jax.random.key(0), (6, 4, 8))
    rate, places = jnp.float32(0.4), jnp.arange(6) + 10
    params = MixerBlock(6, 10).init(jax.random.key(1), x, rate, places, False)
    rngs = {"dropout": jax.random.key(2), "stochastic_depth": jax.random.key(3)}

    def value_and_grads(for_cpu: bool) -> Any:
        block = MixerBlock(6, 10, for_cpu=for_cpu, **settings)

        def loss(params: Any, x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(block.apply(params, x, rate, places, True, rngs=rngs)[0]))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)

    rows, mapped = value_and_grads(True), value_and_grads(False)
    for a, b in zip(jax.tree.leaves(rows), jax.tree.leaves(mapped), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def one_block(drop_rate: float, num_images: int) -> tuple[np.ndarray, ...]:
    """Returns a block's tokens with each branch off and on, and with random branches."""
    block = MixerBlock(6, 10, stochastic_depth=True)
    compiled = jax.jit(block.apply, static_argnums=4)
    places = jnp.arange(num_images)
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.tile(rng.normal(size=(1, 4, 8)), (num_images, 1, 1)), jnp.float32)
    rate = jnp.float32(drop_rate)
    shape = jax.eval_shape(lambda: block.init(jax.random.key(0), x, rate, places, False))
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.5, s.shape), s.dtype), shape)

    def without(name: str) -> Any:
        """The same parameters with one branch's output at zero."""
        silent = jax.tree.map(jnp.zeros_like, params["params"][name]["Dense_1"])
        branch = {**params["params"][name], "Dense_1": silent}
        return {"params": {**params["params"], name: branch}}

    both, only_channels, only_tokens = (
        np.asarray(compiled(p, x, rate, places, False)[0][0])
        for p in (params, without("token_mixing"), without("channel_mixing"))
    )
    rngs = {"stochastic_depth": jax.random.key(3)}
    drawn, _ = compiled(params, x, rate, places, True, rngs=rngs)
    return np.asarray(x[0]), only_tokens, only_channels, both, np.asarray(drawn)


def test_stochastic_depth_drops_branches_per_image_without_rescaling() -> None:
    neither, only_tokens, only_channels, both, drawn = one_block(0.3, num_images=4000)
    outcomes = [neither, only_tokens, only_channels, both]
    kind = [[np.allclose(image, o, atol=1e-5) for o in outcomes].index(True) for image in drawn]
    shares = np.bincount(kind, minlength=4) / len(kind)
    # Two independent masks of keep probability 0.7; 4,000 draws have a deviation of under 0.008.
    np.testing.assert_allclose(shares, [0.09, 0.21, 0.21, 0.49], atol=0.03)


def test_first_block_is_never_dropped() -> None:
    neither, _, _, both, drawn = one_block(0.0, num_images=50)
    np.testing.assert_allclose(drawn, np.broadcast_to(both, drawn.shape), atol=1e-6)
    assert not np.allclose(neither, both)


def test_dropout_keeps_expectations() -> None:
    x = jnp.ones((20_000, 3))
    block = map_mlp(None)(4, dropout=0.25)
    places = jnp.arange(len(x))
    variables = block.init(jax.random.key(0), x, places, False)
    drawn = block.apply(variables, x, places, True, rngs={"dropout": jax.random.key(1)})
    expected = block.apply(variables, x, places, False)[0]
    np.testing.assert_allclose(np.mean(drawn, axis=0), expected, atol=0.02)
    assert np.mean(drawn == 0) == pytest.approx(0.25, abs=0.01)
