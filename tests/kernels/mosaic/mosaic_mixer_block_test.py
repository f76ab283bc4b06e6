"""Tests of the TPU kernels: mathematics in the interpreter, and compilation ahead of time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from mixer_jax.kernels.mosaic.block_sizes import BlockSize, BranchSizes, choose_block_sizes
from mixer_jax.kernels.mosaic.kernels import BranchParams
from mixer_jax.kernels.mosaic.mixer_block import Branch, apply_branch
from mixer_jax.models.mixer_config import VARIANTS, num_tokens
from tests.helpers.tpu_compiler import tpu_device

BRANCHES: tuple[Branch, ...] = ("token_mixing", "channel_mixing")
# Partial tiles of tokens; several blocks of hidden units, programs and cores.
SEVERAL = BranchSizes(BlockSize(2, 128), BlockSize(3, 128), cores=2, vmem=2**20)
ONE = BranchSizes(BlockSize(1, 40), BlockSize(1, 40), cores=1, vmem=2**20)


def plain(name: Branch, x: Any, mask: Any, params: BranchParams, gelu: str) -> jax.Array:
    """A branch without kernels, in the dtype of `x`."""
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    y = (x - mean) / jnp.sqrt(variance + 1e-6)
    y = y * params.scale[None, None] + params.bias[None, None]
    y = y.swapaxes(1, 2) if name == "token_mixing" else y
    hidden = jax.nn.gelu(y @ params.kernel1 + params.bias1[None, None], gelu == "tanh")
    y = hidden @ params.kernel2 + params.bias2[None, None]
    y = y.swapaxes(1, 2) if name == "token_mixing" else y
    return x + mask[:, None, None] * y


def random_inputs(
    name: Branch, shape: tuple[int, int, int], hidden: int
) -> tuple[jax.Array, jax.Array, jax.Array, BranchParams]:
    """Returns tokens, a cotangent, a mask and parameters, none of them at its default."""
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
    mask = jnp.asarray(rng.permutation(np.arange(images) % 3 > 0), jnp.float32)
    return normal(*shape) + 0.5, normal(*shape), mask, params


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
def test_branch_and_its_gradients(
    name: Branch, gelu: Any, shape: tuple[int, int, int], hidden: int, sizes: BranchSizes
) -> None:
    x, cotangent, mask, params = random_inputs(name, shape, hidden)

    def fused(x: Any, params: Any) -> jax.Array:
        return apply_branch(name, x, mask, params, sizes, gelu, interpret=True)

    def plain_branch(x: Any, params: Any) -> jax.Array:
        return plain(name, x, mask, params, gelu)

    actual = value_and_grads(fused, cotangent, x, params)
    expected = value_and_grads(plain_branch, cotangent, x, params)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))
    # An image that drops the branch is unchanged, bit for bit.
    np.testing.assert_array_equal(actual[0][mask == 0], x[mask == 0])
    np.testing.assert_array_equal(actual[1][mask == 0], cotangent[mask == 0])


@pytest.mark.parametrize("name", BRANCHES)
def test_bfloat16_error_and_gradient_dtypes(name: Branch) -> None:
    x, cotangent, mask, params = random_inputs(name, (6, 13, 24), 256)
    short = jnp.bfloat16
    x, cotangent = x.astype(short), cotangent.astype(short)
    kernels = {"kernel1": params.kernel1.astype(short), "kernel2": params.kernel2.astype(short)}
    params = params._replace(**kernels)

    def fused(x: Any, params: Any) -> jax.Array:
        return apply_branch(name, x, mask, params, SEVERAL, "tanh", interpret=True)

    def exact(x: Any, params: Any) -> jax.Array:
        return plain(name, x, mask, params, "tanh")

    actual = jax.tree.leaves(value_and_grads(fused, cotangent, x, params))
    long = jax.tree.map(lambda a: a.astype(jnp.float32), (cotangent, x, params))
    expected = jax.tree.leaves(value_and_grads(exact, *long))
    assert [a.dtype for a in actual] == [x.dtype, x.dtype, *(p.dtype for p in params)]
    for a, b in zip(actual, expected, strict=True):
        error = np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
        assert error < 2 * jnp.finfo(short).eps


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "images"), [("v5e:2x2", 2), ("v6e:2x2", 8)])
def test_compiled_kernels_hold_hidden_units_in_vmem(topology: str, images: int) -> None:
    with tpu_device(topology) as device:
        check_compiled(device, "token_mixing", images, hidden=384)
        check_compiled(device, "channel_mixing", images, hidden=3072)


def check_compiled(device: Any, name: Branch, images: int, hidden: int) -> None:
    """Compiles a branch of B/16 and its gradients: two kernels, no array as wide as `hidden`."""
    tokens, channels = 196, 768
    sizes = choose_block_sizes(tokens, channels, 384, 3072, device.device_kind)
    assert sizes is not None
    branch_sizes = getattr(sizes, name)

    def shape_of(array: jax.Array, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, dtype, sharding=SingleDeviceSharding(device))

    def step(cotangent: Any, x: Any, mask: Any, params: Any) -> Any:
        def branch(x: Any, params: Any) -> jax.Array:
            return apply_branch(name, x, mask, params, branch_sizes)

        return value_and_grads(branch, cotangent, x, params)

    shapes = jax.eval_shape(lambda: random_inputs(name, (images, tokens, channels), hidden))
    x, mask, params = shape_of(shapes[0], jnp.bfloat16), shape_of(shapes[2]), shapes[3]
    traced = jax.jit(step).trace(x, x, mask, jax.tree.map(shape_of, params))
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    hidden_bytes = 2 * images * tokens * channels * hidden // params.kernel1.shape[0]
    assert compiled.memory_analysis().temp_size_in_bytes < hidden_bytes / 4


def test_choose_block_sizes_by_model_and_device() -> None:
    def fits(variant: str, kind: str, image_size: int = 224) -> Any:
        config = VARIANTS[variant]
        tokens = num_tokens(config, image_size)
        mlp_dim = config.tokens_mlp_dim * tokens // num_tokens(config, 224)
        return choose_block_sizes(tokens, config.hidden_dim, mlp_dim, config.channels_mlp_dim, kind)

    for variant in VARIANTS:
        for kind in ("TPU v5 lite", "TPU v6 lite"):
            assert fits(variant, kind) is not None
        for kind in ("TPU v5", "TPU7x"):
            assert (fits(variant, kind) is None) == (variant == "H/14")
        for kind in ("TPU v3", "TPU v4", "cpu"):
            assert fits(variant, kind) is None
    # With more tokens per image fewer images fit, and then none.
    assert [fits("B/16", "TPU v6e", size).channel_mixing.backward for size in (224, 448)] == [
        BlockSize(4, 256),
        BlockSize(1, 256),
    ]
    assert fits("L/16", "TPU v6e", 448) is not None
    assert fits("H/14", "TPU v6e", 448) is None
