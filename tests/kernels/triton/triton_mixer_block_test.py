"""Tests of the GPU kernels: values and gradients match a plain computation."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.kernels.triton.mixer_block import TileConfigs, add_layer_norm, dense_gelu
from mixer_jax.kernels.triton.tiling import TileConfig
from mixer_jax.models.mixer_config import VARIANTS

# Tiles that divide neither 7 tokens of 3 images nor 150 channels; one program has more tiles than
# the others.
RAGGED = TileConfigs(
    layer_norm_fwd=TileConfig(4, 128, num_warps=4, num_programs=4),
    layer_norm_bwd=TileConfig(2, 128, num_warps=4, num_programs=3),
    gelu_bwd=TileConfig(4, 16, num_warps=4, num_programs=6),
)
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def draw(seed: int, *shape: int, dtype: str = "float32") -> jax.Array:
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, dtype)


def plain_layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    centered = wide - wide.mean(-1, keepdims=True)
    deviation = jnp.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
    return (centered / deviation * scale[None, None] + bias[None, None]).astype(x.dtype)


def plain_add_layer_norm(
    x: Any, branch: Any, branch_bias: Any, mask: Any, scale: Any, bias: Any
) -> Any:
    added = branch.astype(jnp.float32)
    added = added if branch_bias is None else added + branch_bias[None, None, :]
    added = added if mask is None else added * mask[None, :, None]
    x = (x.astype(jnp.float32) + added).astype(x.dtype)
    return x, plain_layer_norm(x, scale, bias)


def plain_dense_gelu(y: Any, kernel: Any, bias: Any, axis: str, gelu: str) -> Any:
    spec = "snc,sd->ncd" if axis == "tokens" else "snc,cd->snd"
    hidden = jnp.einsum(spec, y, kernel.astype(y.dtype)) + bias.astype(y.dtype)[None, None]
    return jax.nn.gelu(hidden, approximate=gelu == "tanh")


def assert_close(custom: Any, plain: Any, dtype: str) -> None:
    for a, b in zip(jax.tree.leaves(custom), jax.tree.leaves(plain), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= TOLERANCE[dtype] * np.linalg.norm(b)


def assert_vjp_close(custom: Any, plain: Any, args: tuple[Any, ...], dtype: str) -> None:
    """Compares values, and the VJPs of random cotangents."""

    @jax.jit
    def both(*args: Any) -> Any:
        results = []
        for f in (custom, plain):
            values, vjp = jax.vjp(f, *args)
            leaves, tree = jax.tree.flatten(values)
            cotangents = [draw(50 + i, *v.shape).astype(v.dtype) for i, v in enumerate(leaves)]
            results.append((values, vjp(jax.tree.unflatten(tree, cotangents))))
        return results

    actual, expected = both(*args)
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("shape", "tile_configs", "has_bias", "has_mask"),
    [
        ((7, 3, 150), RAGGED, False, False),
        ((7, 3, 150), RAGGED, False, True),
        ((7, 3, 150), RAGGED, True, False),
        ((7, 3, 150), RAGGED, True, True),
        ((4, 4, 320), TileConfigs(), False, True),
        ((4, 4, 320), TileConfigs(), True, False),
        ((2, 3, 5), TileConfigs(), True, False),
    ],
)
def test_add_layer_norm(
    shape: tuple[int, int, int],
    tile_configs: TileConfigs,
    has_bias: bool,
    has_mask: bool,
    dtype: str,
) -> None:
    _, n, c = shape
    mask = jnp.arange(n, dtype=jnp.float32) % 2 if has_mask else None

    def custom(x: Any, branch: Any, branch_bias: Any, scale: Any, bias: Any) -> Any:
        return add_layer_norm(x, branch, branch_bias, mask, scale, bias, True, tile_configs)

    def plain(x: Any, branch: Any, branch_bias: Any, scale: Any, bias: Any) -> Any:
        return plain_add_layer_norm(x, branch, branch_bias, mask, scale, bias)

    x, branch = draw(0, *shape, dtype=dtype), draw(1, *shape, dtype=dtype)
    args = (x, branch, draw(2, c) if has_bias else None, draw(3, c), draw(4, c))
    assert_vjp_close(custom, plain, args, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("shape", "tile_configs"),
    [
        ((7, 3, 150), RAGGED),
        ((7, 3, 256), RAGGED),
        ((4, 4, 320), TileConfigs()),
        ((2, 3, 5), TileConfigs()),
    ],
)
def test_add_layer_norm_without_a_branch(
    shape: tuple[int, int, int], tile_configs: TileConfigs, dtype: str
) -> None:
    def custom(x: Any, bias_sum: Any, scale: Any, bias: Any) -> Any:
        return add_layer_norm(x, None, bias_sum, None, scale, bias, True, tile_configs)

    def plain(x: Any, bias_sum: Any, scale: Any, bias: Any) -> Any:
        y = plain_layer_norm(x.astype(jnp.float32) + bias_sum[None, None, :], scale, bias)
        return x, y.astype(x.dtype)

    c = shape[-1]
    args = (draw(0, *shape, dtype=dtype), draw(1, c), draw(2, c), draw(3, c))
    assert_vjp_close(custom, plain, args, dtype)


@pytest.mark.parametrize("used", [0, 1])
def test_gradients_if_only_one_result_is_used(used: int) -> None:
    x, branch = draw(0, 7, 3, 150), draw(1, 7, 3, 150)
    vectors = [draw(i, 150) for i in (2, 3, 4)]

    def custom_bias(x: Any, bias_sum: Any, scale: Any, bias: Any) -> Any:
        return add_layer_norm(x, None, bias_sum, None, scale, bias, True, RAGGED)[used]

    def plain_bias(x: Any, bias_sum: Any, scale: Any, bias: Any) -> Any:
        return (x, plain_layer_norm(x + bias_sum[None, None, :], scale, bias))[used]

    def custom_add(x: Any, branch: Any, branch_bias: Any, scale: Any, bias: Any) -> Any:
        return add_layer_norm(x, branch, branch_bias, None, scale, bias, True, RAGGED)[used]

    def plain_add(x: Any, branch: Any, branch_bias: Any, scale: Any, bias: Any) -> Any:
        return plain_add_layer_norm(x, branch, branch_bias, None, scale, bias)[used]

    assert_vjp_close(custom_bias, plain_bias, (x, *vectors), "float32")
    assert_vjp_close(custom_add, plain_add, (x, branch, *vectors), "float32")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gelu", ["tanh", "exact"])
@pytest.mark.parametrize("axis", ["tokens", "channels"])
@pytest.mark.parametrize(("hidden", "tile_configs"), [(40, RAGGED), (384, TileConfigs())])
def test_dense_gelu(
    hidden: int, tile_configs: TileConfigs, axis: Any, gelu: Any, dtype: str
) -> None:
    def custom(*args: Any) -> Any:
        return dense_gelu(*args, axis, gelu, True, tile_configs)

    def plain(y: Any, kernel: Any, bias: Any) -> Any:
        return plain_dense_gelu(y, kernel, bias, axis, gelu)

    y = draw(0, 7, 3, 10, dtype=dtype)
    args = (y, draw(1, 7 if axis == "tokens" else 10, hidden), draw(2, hidden))
    assert_vjp_close(custom, plain, args, dtype)


# jax 0.11 and later warn about every Triton kernel.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("variant", ["B/16", "H/14"])
def test_lowers_for_gpus_without_a_gpu(variant: str, dtype: str) -> None:
    config = VARIANTS[variant]
    s, n, c = 196, 6, config.hidden_dim
    x = jax.ShapeDtypeStruct((s, n, c), dtype)
    token_dim, channel_dim = config.tokens_mlp_dim, config.channels_mlp_dim

    def step(x: Any, mask: Any, tokens: Any, channels: Any, scale: Any) -> Any:
        x, y = add_layer_norm(x, None, scale, None, scale, scale)
        hidden = dense_gelu(y, *tokens, "tokens", "exact")
        branch = jnp.einsum("ncd,sd->snc", hidden, tokens[0].astype(x.dtype))
        x, y = add_layer_norm(x, branch, None, mask, scale, scale)
        hidden = dense_gelu(y, *channels, "channels", "tanh")
        branch = jnp.einsum("snd,cd->snc", hidden, channels[0].astype(x.dtype))
        return jnp.sum(add_layer_norm(x, branch, scale, None, scale, scale)[1])

    def vector(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    layers = (
        (vector(s, token_dim), vector(token_dim)),
        (vector(c, channel_dim), vector(channel_dim)),
    )
    args = (x, vector(n), *layers, vector(c))
    with abstract_gpu():
        traced = jax.jit(jax.grad(step, argnums=(0, 2, 3, 4))).trace(*args)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Forward and backward of three LayerNorms, and backward of two GELUs, whose forward is XLA's.
    assert lowered.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 8


def abstract_gpu() -> Any:
    """Returns a context in which newer versions of jax find the GPU to lower for."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    axes = (jax.sharding.AxisType.Auto,)
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("data",), axes, abstract_device=device)
    )
