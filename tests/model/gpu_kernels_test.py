"""Tests of the GPU kernels: each is the plain computation, in values and in gradients."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.model.gpu_kernels import Tilings, add_layer_norm, dense_gelu, shift_layer_norm
from mixer_jax.model.gpu_tiles import Tiling
from mixer_jax.model.variants import VARIANTS

# Tiles that divide neither 7 tokens of 3 images nor 150 channels, and one program of more tiles
# than the others.
RAGGED = Tilings(
    norm=Tiling(rows=4, columns=128, warps=4, programs=4),
    norm_grad=Tiling(rows=2, columns=128, warps=4, programs=3),
    gelu_grad=Tiling(rows=4, columns=16, warps=4, programs=6),
)
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def draw(seed: int, *shape: int, dtype: str = "float32") -> jax.Array:
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, dtype)


def plain_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    centered = wide - wide.mean(-1, keepdims=True)
    deviation = jnp.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
    return (centered / deviation * scale[None, None] + bias[None, None]).astype(x.dtype)


def plain_add_norm(x: Any, branch: Any, branch_bias: Any, keep: Any, scale: Any, bias: Any) -> Any:
    added = branch.astype(jnp.float32)
    added = added if branch_bias is None else added + branch_bias[None, None, :]
    added = added if keep is None else added * keep[None, :, None]
    x = (x.astype(jnp.float32) + added).astype(x.dtype)
    return x, plain_norm(x, scale, bias)


def plain_dense_gelu(y: Any, kernel: Any, bias: Any, axis: str, gelu: str) -> Any:
    spec = "snc,sd->ncd" if axis == "first" else "snc,cd->snd"
    hidden = jnp.einsum(spec, y, kernel.astype(y.dtype)) + bias.astype(y.dtype)[None, None]
    return jax.nn.gelu(hidden, approximate=gelu == "tanh")


def assert_same(ours: Any, plain: Any, dtype: str) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= TOLERANCE[dtype] * np.linalg.norm(b)


def assert_same_with_gradients(ours: Any, plain: Any, args: tuple[Any, ...], dtype: str) -> None:
    """Compares values, and gradients by all arguments for random gradients by the values."""

    @jax.jit
    def both(*args: Any) -> Any:
        results = []
        for f in (ours, plain):
            values, pull = jax.vjp(f, *args)
            leaves, tree = jax.tree.flatten(values)
            given = [draw(50 + i, *v.shape).astype(v.dtype) for i, v in enumerate(leaves)]
            results.append((values, pull(jax.tree.unflatten(tree, given))))
        return results

    actual, expected = both(*args)
    assert_same(actual, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("shape", "tilings", "biased", "dropped"),
    [
        ((7, 3, 150), RAGGED, False, False),
        ((7, 3, 150), RAGGED, False, True),
        ((7, 3, 150), RAGGED, True, False),
        ((7, 3, 150), RAGGED, True, True),
        ((4, 4, 320), Tilings(), False, True),
        ((4, 4, 320), Tilings(), True, False),
        ((2, 3, 5), Tilings(), True, False),
    ],
)
def test_add_layer_norm(
    shape: tuple[int, int, int], tilings: Tilings, biased: bool, dropped: bool, dtype: str
) -> None:
    _, n, c = shape
    keep = jnp.arange(n, dtype=jnp.float32) % 2 if dropped else None

    def ours(x: Any, branch: Any, branch_bias: Any, scale: Any, bias: Any) -> Any:
        return add_layer_norm(x, branch, branch_bias, keep, scale, bias, True, tilings)

    def plain(x: Any, branch: Any, branch_bias: Any, scale: Any, bias: Any) -> Any:
        return plain_add_norm(x, branch, branch_bias, keep, scale, bias)

    x, branch = draw(0, *shape, dtype=dtype), draw(1, *shape, dtype=dtype)
    args = (x, branch, draw(2, c) if biased else None, draw(3, c), draw(4, c))
    assert_same_with_gradients(ours, plain, args, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("shape", "tilings"),
    [
        ((7, 3, 150), RAGGED),
        ((7, 3, 256), RAGGED),
        ((4, 4, 320), Tilings()),
        ((2, 3, 5), Tilings()),
    ],
)
def test_shift_layer_norm(shape: tuple[int, int, int], tilings: Tilings, dtype: str) -> None:
    def ours(*args: Any) -> Any:
        return shift_layer_norm(*args, True, tilings)

    def plain(x: Any, shift: Any, scale: Any, bias: Any) -> Any:
        y = plain_norm(x.astype(jnp.float32) + shift[None, None, :], scale, bias)
        return x, y.astype(x.dtype)

    c = shape[-1]
    args = (draw(0, *shape, dtype=dtype), draw(1, c), draw(2, c), draw(3, c))
    assert_same_with_gradients(ours, plain, args, dtype)


@pytest.mark.parametrize("used", [0, 1])
def test_only_one_result_is_used(used: int) -> None:
    x, branch = draw(0, 7, 3, 150), draw(1, 7, 3, 150)
    vectors = [draw(i, 150) for i in (2, 3, 4)]

    def ours_shifted(*args: Any) -> Any:
        return shift_layer_norm(*args, True, RAGGED)[used]

    def plain_shifted(x: Any, shift: Any, scale: Any, bias: Any) -> Any:
        return (x, plain_norm(x + shift[None, None, :], scale, bias))[used]

    def ours_added(x: Any, branch: Any, branch_bias: Any, scale: Any, bias: Any) -> Any:
        return add_layer_norm(x, branch, branch_bias, None, scale, bias, True, RAGGED)[used]

    def plain_added(x: Any, branch: Any, branch_bias: Any, scale: Any, bias: Any) -> Any:
        return plain_add_norm(x, branch, branch_bias, None, scale, bias)[used]

    assert_same_with_gradients(ours_shifted, plain_shifted, (x, *vectors), "float32")
    assert_same_with_gradients(ours_added, plain_added, (x, branch, *vectors), "float32")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gelu", ["tanh", "exact"])
@pytest.mark.parametrize("axis", ["first", "last"])
@pytest.mark.parametrize(("hidden", "tilings"), [(40, RAGGED), (384, Tilings())])
def test_dense_gelu(hidden: int, tilings: Tilings, axis: Any, gelu: Any, dtype: str) -> None:
    def ours(*args: Any) -> Any:
        return dense_gelu(*args, axis, gelu, True, tilings)

    def plain(y: Any, kernel: Any, bias: Any) -> Any:
        return plain_dense_gelu(y, kernel, bias, axis, gelu)

    y = draw(0, 7, 3, 10, dtype=dtype)
    args = (y, draw(1, 7 if axis == "first" else 10, hidden), draw(2, hidden))
    assert_same_with_gradients(ours, plain, args, dtype)


# Said of all kernels of this kind from jax 0.11 on.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("variant", ["B/16", "H/14"])
def test_lowers_for_gpus_without_one(variant: str, dtype: str) -> None:
    widths = VARIANTS[variant]
    s, n, c = 196, 6, widths.hidden_dim
    x = jax.ShapeDtypeStruct((s, n, c), dtype)
    narrow, wide = widths.tokens_mlp_dim, widths.channels_mlp_dim

    def step(x: Any, keep: Any, tokens: Any, channels: Any, scale: Any) -> Any:
        x, y = shift_layer_norm(x, scale, scale, scale)
        hidden = dense_gelu(y, *tokens, "first", "exact")
        branch = jnp.einsum("ncd,sd->snc", hidden, tokens[0].astype(x.dtype))
        x, y = add_layer_norm(x, branch, None, keep, scale, scale)
        hidden = dense_gelu(y, *channels, "last", "tanh")
        branch = jnp.einsum("snd,cd->snc", hidden, channels[0].astype(x.dtype))
        return jnp.sum(add_layer_norm(x, branch, scale, None, scale, scale)[1])

    def vector(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    layers = (vector(s, narrow), vector(narrow)), (vector(c, wide), vector(wide))
    args = (x, vector(n), *layers, vector(c))
    with on_a_gpu():
        traced = jax.jit(jax.grad(step, argnums=(0, 2, 3, 4))).trace(*args)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Forward and backward of three norms and two GELUs, whose forward is XLA's.
    assert lowered.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 8


def on_a_gpu() -> Any:
    """Where newer versions of jax look for the kind of GPU to lower for."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    axes = (jax.sharding.AxisType.Auto,)
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("data",), axes, abstract_device=device)
    )
