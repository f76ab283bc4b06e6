"""Tests of the kernels for TPUs: their mathematics without one, and that they compile for one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from mixer_jax.model.tpu_kernel_sizes import Cut, Sizes, choose_sizes
from mixer_jax.model.tpu_kernels import BranchParams, channel_mixing, token_mixing
from mixer_jax.model.variants import VARIANTS, num_tokens
from tests.helpers.tpu_compiler import tpu_device

BRANCHES = {"token_mixing": token_mixing, "channel_mixing": channel_mixing}
# Tokens that are not whole tiles, several turns of hidden units, programs and cores.
SEVERAL = Sizes(Cut(2, 128), Cut(3, 128), cores=2, vmem=2**20)
ONE = Sizes(Cut(1, 40), Cut(1, 40), cores=1, vmem=2**20)


def plain(name: str, x: Any, keep: Any, params: BranchParams, gelu: str) -> jax.Array:
    """The branch as one writes it, in the type of `x`."""
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    y = (x - mean) / jnp.sqrt(variance + 1e-6)
    y = y * params.scale[None, None] + params.bias[None, None]
    y = y.swapaxes(1, 2) if name == "token_mixing" else y
    hidden = jax.nn.gelu(y @ params.kernel1 + params.bias1[None, None], gelu == "tanh")
    y = hidden @ params.kernel2 + params.bias2[None, None]
    y = y.swapaxes(1, 2) if name == "token_mixing" else y
    return x + keep[:, None, None] * y


def made(
    name: str, shape: tuple[int, int, int], hidden: int
) -> tuple[jax.Array, jax.Array, jax.Array, BranchParams]:
    """Random tokens, a cotangent, a mask and parameters, none of which is at its default."""
    images, tokens, channels = shape
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.normal(0, scale, shape), jnp.float32)

    width = tokens if name == "token_mixing" else channels
    params = BranchParams(
        1 + normal(channels, scale=0.1),
        normal(channels, scale=0.1),
        normal(width, hidden, scale=width**-0.5),
        normal(hidden, scale=0.1),
        normal(hidden, width, scale=hidden**-0.5),
        normal(width, scale=0.1),
    )
    keep = jnp.asarray(rng.permutation(np.arange(images) % 3 > 0), jnp.float32)
    return normal(*shape) + 0.5, normal(*shape), keep, params


def value_and_grads(function: Callable[..., Any], cotangent: Any, *args: Any) -> Any:
    def both(cotangent: Any, *args: Any) -> Any:
        value, backward = jax.vjp(function, *args)
        return value, *backward(cotangent)

    return jax.jit(both)(cotangent, *args)


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize(
    ("gelu", "shape", "hidden", "sizes"),
    [
        ("tanh", (6, 13, 24), 256, SEVERAL),
        ("exact", (6, 13, 24), 256, SEVERAL),
        ("tanh", (5, 16, 8), 40, ONE),
    ],
)
def test_kernels_compute_the_branch_and_its_gradients(
    name: str, gelu: Any, shape: tuple[int, int, int], hidden: int, sizes: Sizes
) -> None:
    x, cotangent, keep, params = made(name, shape, hidden)

    def by_kernels(x: Any, params: Any) -> jax.Array:
        return BRANCHES[name](x, keep, params, sizes, gelu, interpret=True)

    def by_hand(x: Any, params: Any) -> jax.Array:
        return plain(name, x, keep, params, gelu)

    actual = value_and_grads(by_kernels, cotangent, x, params)
    expected = value_and_grads(by_hand, cotangent, x, params)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))
    # An image that skips the branch is left as it is, bit for bit.
    np.testing.assert_array_equal(actual[0][keep == 0], x[keep == 0])
    np.testing.assert_array_equal(actual[1][keep == 0], cotangent[keep == 0])


@pytest.mark.parametrize("name", BRANCHES)
def test_bfloat16_is_rounding_away_and_gradients_have_their_parameters_types(name: str) -> None:
    x, cotangent, keep, params = made(name, (6, 13, 24), 256)
    short = jnp.bfloat16
    x, cotangent = x.astype(short), cotangent.astype(short)
    kernels = {"kernel1": params.kernel1.astype(short), "kernel2": params.kernel2.astype(short)}
    params = params._replace(**kernels)

    def by_kernels(x: Any, params: Any) -> jax.Array:
        return BRANCHES[name](x, keep, params, SEVERAL, "tanh", interpret=True)

    def exact(x: Any, params: Any) -> jax.Array:
        return plain(name, x, keep, params, "tanh")

    actual = jax.tree.leaves(value_and_grads(by_kernels, cotangent, x, params))
    long = jax.tree.map(lambda a: a.astype(jnp.float32), (cotangent, x, params))
    expected = jax.tree.leaves(value_and_grads(exact, *long))
    assert [a.dtype for a in actual] == [x.dtype, x.dtype, *(p.dtype for p in params)]
    for a, b in zip(actual, expected, strict=True):
        error = np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
        assert error < 2 * jnp.finfo(short).eps


@pytest.mark.parametrize(("topology", "images"), [("v5e:2x2", 2), ("v6e:2x2", 8)])
def test_kernels_compile_and_keep_hidden_units_on_the_chip(topology: str, images: int) -> None:
    with tpu_device(topology) as device:
        check_compiled(device, "token_mixing", images, hidden=384)
        check_compiled(device, "channel_mixing", images, hidden=3072)


def check_compiled(device: Any, name: str, images: int, hidden: int) -> None:
    """Compiles a branch of B/16 and its gradients: two kernels, and nothing as wide as `hidden`."""
    tokens, channels = 196, 768
    sizes = choose_sizes(tokens, channels, 384, 3072, device.device_kind)
    assert sizes is not None
    cut = getattr(sizes, name)

    def given(array: jax.Array, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, dtype, sharding=SingleDeviceSharding(device))

    def step(cotangent: Any, x: Any, keep: Any, params: Any) -> Any:
        def branch(x: Any, params: Any) -> jax.Array:
            return BRANCHES[name](x, keep, params, cut)

        return value_and_grads(branch, cotangent, x, params)

    shapes = jax.eval_shape(lambda: made(name, (images, tokens, channels), hidden))
    x, keep, params = given(shapes[0], jnp.bfloat16), given(shapes[2]), shapes[3]
    traced = jax.jit(step).trace(x, x, keep, jax.tree.map(given, params))
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    of_hidden = 2 * images * tokens * channels * hidden // params.kernel1.shape[0]
    assert compiled.memory_analysis().temp_size_in_bytes < of_hidden / 4


def test_every_model_fits_on_a_v6e_and_the_largest_on_no_smaller_chip() -> None:
    def fits(variant: str, kind: str, image_size: int = 224) -> Any:
        widths = VARIANTS[variant]
        tokens = num_tokens(widths, image_size)
        wide = widths.tokens_mlp_dim * tokens // num_tokens(widths, 224)
        return choose_sizes(tokens, widths.hidden_dim, wide, widths.channels_mlp_dim, kind)

    for variant in VARIANTS:
        for kind in ("TPU v5 lite", "TPU v6 lite"):
            assert fits(variant, kind) is not None
        for kind in ("TPU v5", "TPU7x"):
            assert (fits(variant, kind) is None) == (variant == "H/14")
        for kind in ("TPU v3", "TPU v4", "cpu"):
            assert fits(variant, kind) is None
    # The tokens of a larger image leave room for fewer images, and then for none.
    assert [fits("B/16", "TPU v6e", size).channel_mixing.backward for size in (224, 448)] == [
        Cut(4, 256),
        Cut(1, 256),
    ]
    assert fits("L/16", "TPU v6e", 448) is not None
    assert fits("H/14", "TPU v6e", 448) is None
