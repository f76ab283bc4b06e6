"""Tests of Vision Transformers: sizes, mathematics, and the effect of each setting."""

import dataclasses
import importlib
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.errors import UserError
from mixer_jax.models.layers import Context, dot_product_attention, xla_attention
from mixer_jax.models.registry import create_model, get_family
from mixer_jax.models.stack import forward_intermediates
from mixer_jax.models.vit import VisionTransformer
from mixer_jax.models.vit_config import VARIANTS, VitConfig
from mixer_jax.models.vit_resize import resize_pos_embedding
from mixer_jax.planning.run_spec import REMAT_POLICIES
from tests.helpers.matmul_flops import count_matmul_flops
from tests.helpers.messages import raises
from tests.helpers.models import param_shapes, random_images, random_params

FAMILY = get_family("vit")
# Model settings in all combinations that matter.
KINDS: dict[str, dict[str, Any]] = {
    "token": {"pre_logits": True},
    "gap": {"pooling": "gap"},
    "map": {"pooling": "map"},
    "token_sincos2d": {"pos_embedding": "sincos2d"},
    "gap_sincos2d": {"pooling": "gap", "pos_embedding": "sincos2d"},
}

# BASELINES: A.3; without head, 1,000 classes, 21,843 classes, the same with pre_logits, GFLOP with
# 1,000 classes, at 224 px.
SIZES = {
    "Ti/16": (5_524_416, 5_717_416, 9_740_115, 9_777_171, 2.51),
    "S/32": (22_493_952, 22_878_952, 30_903_507, 31_051_347, 2.29),
    "S/16": (21_665_664, 22_050_664, 30_075_219, 30_223_059, 9.20),
    "B/32": (87_455_232, 88_224_232, 104_252_499, 104_843_091, 8.82),
    "B/16": (85_798_656, 86_567_656, 102_595_923, 103_186_515, 35.13),
    "B/8": (85_807_872, 86_576_872, 102_605_139, 103_195_731, 156.30),
    "L/32": (305_510_400, 306_535_400, 327_899_475, 328_949_075, 30.76),
    "L/16": (303_301_632, 304_326_632, 325_690_707, 326_740_307, 123.11),
    "H/14": (630_764_800, 632_045_800, 658_745_683, 660_385_363, 334.59),
    "g/14": (1_011_202_432, 1_012_611_432, 1_041_979_219, 0, 534.06),
    "G/14": (1_842_775_680, 1_844_440_680, 1_879_144_275, 0, 967.50),
}
# The same with 1,000 classes at other image sizes.
OTHER_SIZES = {
    ("B/32", 384): (88_297_192, 26.1),
    ("B/16", 384): (86_859_496, 111.0),
    ("B/16", 448): (87_019_240, 157.0),
    ("L/32", 384): (306_632_680, 90.6),
    ("L/16", 384): (304_715_752, 382.1),
    ("L/16", 448): (304_928_744, 535.9),
    ("L/16", 512): (305_174_504, 724.0),
    ("H/14", 448): (633_028_840, 1463.4),
    ("H/14", 518): (633_470_440, 2033.4),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_num_params_and_flops(variant: str) -> None:
    config, (*counts, with_pre_logits, gflop) = VARIANTS[variant], SIZES[variant]
    assert [FAMILY.num_params(config, 224, n) for n in (0, 1000, 21_843)] == counts
    if with_pre_logits:
        hidden = dataclasses.replace(config, pre_logits=True)
        assert FAMILY.num_params(hidden, 224, 21_843) == with_pre_logits
    assert round(FAMILY.forward_flops(config, 224, 1000) / 1e9, 2) == gflop


@pytest.mark.parametrize(("variant", "image_size"), OTHER_SIZES)
def test_num_params_and_flops_at_other_image_sizes(variant: str, image_size: int) -> None:
    num_params, gflop = OTHER_SIZES[variant, image_size]
    config = VARIANTS[variant]
    assert FAMILY.num_params(config, image_size, 1000) == num_params
    assert round(FAMILY.forward_flops(config, image_size, 1000) / 1e9, 1) == gflop


@pytest.mark.parametrize(("variant", "expected"), [("B/16", 86_566_120), ("S/16", 22_049_896)])
def test_num_params_of_gap(variant: str, expected: int) -> None:
    config = dataclasses.replace(VARIANTS[variant], pooling="gap")
    assert FAMILY.num_params(config, 224, 1000) == expected


@pytest.mark.parametrize("variant", ["S/32", "H/14"])
def test_num_params_is_that_of_the_module(variant: str) -> None:
    shapes = param_shapes(create_model(f"ViT-{variant}", 1000), 224)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == SIZES[variant][1]


def tiny_vit(num_classes: int = 5, **overrides: Any) -> VisionTransformer:
    dims = {"num_blocks": 2, "patch_size": 4, "hidden_dim": 8, "mlp_dim": 12, "num_heads": 2}
    return create_model("ViT-custom", num_classes, **{**dims, **overrides})


def apply(model: VisionTransformer, params: Any, images: jax.Array) -> jax.Array:
    return jax.jit(model.apply)({"params": params}, images)


@pytest.mark.parametrize("kind", KINDS)
def test_param_shapes_and_flops_are_those_of_the_module(kind: str) -> None:
    model, images = tiny_vit(**KINDS[kind]), jnp.zeros((1, 8, 16, 3))
    params = param_shapes(model, 8, 16)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}
    assert found == FAMILY.param_shapes(model.config, (8, 16), 5)
    program = jax.make_jaxpr(lambda p: model.apply({"params": p}, images))(params)
    assert count_matmul_flops(program.jaxpr) == FAMILY.forward_flops(model.config, (8, 16), 5)


def layer_norm(x: np.ndarray, p: Any) -> np.ndarray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def dense(x: np.ndarray, p: Any) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


def mlp(x: np.ndarray, p: Any) -> np.ndarray:
    y = dense(x, p["Dense_0"])
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return dense(y, p["Dense_1"])


def attention(x: np.ndarray, context: np.ndarray, p: Any) -> np.ndarray:
    num_heads, head_dim, _ = p["out"]["kernel"].shape
    output: Any = p["out"]["bias"]
    for head in range(num_heads):
        q, k, v = (
            y @ p[name]["kernel"][:, head] + p[name]["bias"][head]
            for name, y in (("query", x), ("key", context), ("value", context))
        )
        weights = np.exp(q @ k.T / np.sqrt(head_dim))
        weights /= weights.sum(1, keepdims=True)
        output = output + weights @ v @ p["out"]["kernel"][head]
    return output


def numpy_forward(params: Any, image: np.ndarray, config: VitConfig) -> dict[str, np.ndarray]:
    """The paper's Section 3.1 for one image, written out in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    patch, width = config.patch_size, config.hidden_dim
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    found: dict[str, Any] = {}
    tokens, positions = [], []
    for row in range(rows):
        for column in range(columns):
            pixels = image[row * patch :, column * patch :][:patch, :patch]
            tokens.append(np.tensordot(pixels, p["stem"]["kernel"], axes=3) + p["stem"]["bias"])
            omega = 1 / 10_000 ** (np.arange(width // 4) / (width // 4 - 1))
            waves = [wave(i * omega) for i in (column, row) for wave in (np.sin, np.cos)]
            positions.append(np.concatenate(waves))
    z: Any = np.stack(tokens)
    found["stem"] = z
    if config.pos_embedding == "sincos2d":
        z = z + np.stack(positions)
    if config.pooling == "token":
        z = np.concatenate([p["cls"][0], z])
    if config.pos_embedding == "learned":
        z = z + p["pos_embedding"][0]
    for i in range(2):
        block = jax.tree.map(operator.itemgetter(i), p["blocks"])
        y = layer_norm(z, block["LayerNorm_0"])
        found[f"blocks.{i}.attention"] = attention(y, y, block["attention"])
        z = z + found[f"blocks.{i}.attention"]
        found[f"blocks.{i}.mlp"] = mlp(layer_norm(z, block["LayerNorm_1"]), block["mlp"])
        z = z + found[f"blocks.{i}.mlp"]
        found[f"blocks.{i}"] = z
    z = layer_norm(z, p["encoder_norm"])
    found["tokens"] = z
    if config.pooling == "map":
        head = p["map_head"]
        y = attention(head["probe"][0], z, head["attention"])
        features = (y + mlp(layer_norm(y, head["LayerNorm_0"]), head["mlp"]))[0]
    else:
        features = z[0] if config.pooling == "token" else z.mean(0)
    found["pooled"] = features
    if config.pre_logits:
        features = np.tanh(dense(features, p["pre_logits"]))
    return {**found, "pre_logits": features, "logits": dense(features, p["head"])}


@pytest.mark.parametrize("kind", KINDS)
def test_forward_matches_paper(kind: str) -> None:
    model, images = tiny_vit(**KINDS[kind]), random_images(2)[:, :8]
    params = random_params(model, 8, 16)
    logits, activations = forward_intermediates(model, params, images)
    for i, image in enumerate(np.asarray(images, np.float64)):
        expected = numpy_forward(params, image, model.config)
        np.testing.assert_allclose(logits[i], expected.pop("logits"), rtol=2e-5, atol=2e-5)
        assert activations.keys() == expected.keys()
        for name, value in expected.items():
            actual = activations[name][i]
            np.testing.assert_allclose(actual, value, rtol=2e-5, atol=2e-5, err_msg=name)


def test_image_does_not_depend_on_its_batch() -> None:
    model, images = tiny_vit(), random_images(5)
    params = random_params(model)
    whole = apply(model, params, images)
    for i in range(5):
        np.testing.assert_allclose(
            apply(model, params, images[i : i + 1])[0], whole[i], rtol=1e-6, atol=1e-6
        )


def test_initial_values_are_the_authors() -> None:
    """BASELINES: A.2, column vt."""
    dims = {"hidden_dim": 64, "mlp_dim": 256, "num_heads": 4}
    model = tiny_vit(head_bias=-10.0, pre_logits=True, **dims)
    token = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    pooled = jax.jit(tiny_vit(pooling="map", **dims).init)(
        jax.random.key(1), jnp.zeros((1, 16, 16, 3))
    )["params"]
    assert np.all(token["cls"] == 0)
    assert np.std(token["pos_embedding"]) == pytest.approx(0.02, rel=0.03)
    assert np.all(token["head"]["kernel"] == 0)
    assert np.all(token["head"]["bias"] == -10)
    # LeCun normal: variance 1 / fan-in.
    for name, fan_in in (("stem", 48), ("pre_logits", 64)):
        assert np.std(token[name]["kernel"]) == pytest.approx(fan_in**-0.5, rel=0.05)
        assert np.all(token[name]["bias"] == 0)
    # Xavier uniform: between ±√(6 / (fan-in + fan-out)), and not alike in two blocks.
    for layer in (token["blocks"], pooled["map_head"]):
        for name in ("query", "key", "value", "out"):
            check_uniform(layer["attention"][name]["kernel"], np.sqrt(6 / 128))
            assert np.all(layer["attention"][name]["bias"] == 0)
        for name in ("Dense_0", "Dense_1"):
            check_uniform(layer["mlp"][name]["kernel"], np.sqrt(6 / 320))
            assert np.std(layer["mlp"][name]["bias"]) == pytest.approx(1e-6, rel=0.25)
    check_uniform(pooled["map_head"]["probe"], np.sqrt(6 / 65))
    kernels = token["blocks"]["attention"]["query"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])
    for norm in (token["encoder_norm"], token["blocks"]["LayerNorm_0"]):
        assert np.all(norm["scale"] == 1)
        assert np.all(norm["bias"] == 0)


def check_uniform(x: Any, limit: float) -> None:
    assert np.abs(x).max() == pytest.approx(limit, rel=0.1)
    assert np.abs(x).max() <= limit
    assert np.std(x) == pytest.approx(limit / np.sqrt(3), rel=0.2 if x.size < 1000 else 0.03)


@pytest.mark.parametrize("settings", [{"scan_unroll": 1}, *({"remat": r} for r in REMAT_POLICIES)])
def test_execution_does_not_change_values(settings: dict[str, Any]) -> None:
    images = random_images()
    params = random_params(tiny_vit())

    def value_and_grad(model: VisionTransformer) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.sum(jnp.sin(model.apply({"params": params}, images, True)))

        return jax.jit(jax.value_and_grad(loss))(params)

    expected = value_and_grad(tiny_vit(flatten_batch=False))
    actual = value_and_grad(tiny_vit(flatten_batch=True, **settings))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("pooling", ["gap", "map"])
def test_recomputed_flops_are_those_of_the_program(pooling: str) -> None:
    images = jnp.zeros((1, 16, 16, 3))
    # The gradient of the image is not computed.
    stem = 2 * 3 * 4**2 * 8 * 16
    config = tiny_vit(num_blocks=3, pooling=pooling).config
    model_flops = 3 * FAMILY.forward_flops(config, 16, 5) - stem
    executed, expected = {}, {}
    for remat in REMAT_POLICIES:
        model = tiny_vit(scan_unroll=1, num_blocks=3, pooling=pooling, remat=remat)
        params = jax.eval_shape(model.init, jax.random.key(0), images)
        gradient = jax.grad(lambda p, model=model: model.apply(p, images, train=True).sum())
        executed[remat] = count_matmul_flops(jax.make_jaxpr(gradient)(params).jaxpr)
        expected[remat] = FAMILY.cost_model.recomputed_flops(model.config, 16, remat)
    assert {remat: flops - model_flops for remat, flops in executed.items()} == expected


def test_saved_bytes_decrease_with_recomputation() -> None:
    costs = FAMILY.cost_model
    for itemsize in (2, 4):
        saved = [
            costs.saved_activation_bytes(VARIANTS["B/16"], 224, remat, itemsize)
            for remat in REMAT_POLICIES
        ]
        assert sorted(set(saved), reverse=True) == saved


@pytest.mark.parametrize("train", [False, True])
def test_traffic_has_all_flops(train: bool) -> None:
    config = dataclasses.replace(VARIANTS["S/32"], pre_logits=True)
    options: dict[str, Any] = {"batch_size": 1, "itemsize": 2, "train": train}
    traffic = FAMILY.cost_model.estimate_traffic(config, 224, 10, **options)
    assert traffic.keys() == FAMILY.regions.keys()
    forward = FAMILY.forward_flops(config, 224, 10)
    stem = 2 * 3 * 32**2 * 384 * 49
    total = sum(region.flops for region in traffic.values())
    # The gradient of the image is not computed.
    assert total == (3 * forward - stem if train else forward)
    assert all(region.fused_bytes <= region.unfused_bytes for region in traffic.values())


def test_bfloat16_keeps_softmax_params_and_logits_float32() -> None:
    model, images = tiny_vit(dtype="bfloat16", pre_logits=True), random_images()
    params = random_params(tiny_vit(pre_logits=True))
    logits = apply(model, params, images)
    assert logits.dtype == jnp.float32
    exact = apply(tiny_vit(pre_logits=True), params, images)
    np.testing.assert_allclose(logits, exact, atol=0.1)
    # Scores of 256 and 257 are equal in bfloat16.
    query = jnp.full((1, 1, 1, 16), 4.0, jnp.bfloat16)
    key = jnp.full((1, 2, 1, 16), 16.0, jnp.bfloat16).at[0, 1, 0, 0].add(1)
    value = jnp.zeros((1, 2, 1, 16), jnp.bfloat16).at[0, 1].set(1)
    mean = dot_product_attention(query, key, value, Context(dtype=jnp.bfloat16))
    assert float(mean[0, 0, 0, 0]) == pytest.approx(1 / (1 + np.exp(-1)), rel=1e-2)


@pytest.mark.parametrize("num_queries", [9, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 1e-2)])
def test_attention_has_gradients_of_jax(num_queries: int, dtype: str, tolerance: float) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, length, 3, 20) for length in (num_queries, 9, 9, num_queries)]
    arrays = [jax.random.normal(*args, dtype) for args in zip(keys, shapes, strict=True)]

    def value_and_grads(function: Any, arrays: Any) -> list[jax.Array]:
        value, vjp = jax.vjp(function, *arrays[:3])
        return [value, *vjp(arrays[3])]

    actual = value_and_grads(xla_attention, arrays)
    exact = value_and_grads(
        jax.nn.dot_product_attention, [array.astype(jnp.float32) for array in arrays]
    )
    for x, y in zip(actual, exact, strict=True):
        assert x.dtype == dtype
        assert jnp.linalg.norm(x - y) < tolerance * jnp.linalg.norm(y)


def test_attention_saves_no_weights() -> None:
    x = jnp.ones((2, 9, 3, 4))
    _, vjp = jax.vjp(xla_attention, x, x, x)
    saved = [array.shape for array in jax.tree.leaves(vjp)]
    assert sorted(saved) == [*[(2, 3, 9, 1)], *[x.shape] * 4]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "train", "expected"),
    [
        ("bfloat16", 64, False, "cudnn"),
        ("bfloat16", 64, True, "xla"),
        ("float32", 64, False, "xla"),
        ("bfloat16", 20, False, "xla"),
    ],
)
def test_gpus_use_cudnn_where_results_are_deterministic(
    dtype: str, head_dim: int, train: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def record(query: jax.Array, *_: jax.Array, implementation: str) -> jax.Array:
        found.append(implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    x = jnp.zeros((1, 2, 1, head_dim), dtype)
    dot_product_attention(x, x, x, Context(train=train, flash_attention=True))
    dot_product_attention(x, x, x, Context(train=train))
    assert found == [expected, "xla"]


def outputs(model: VisionTransformer, images: Any, index: Any, seed: int = 0) -> np.ndarray:
    params = random_params(tiny_vit())
    rngs = {name: jax.random.key(seed) for name in ("dropout", "stochastic_depth")}
    compiled = jax.jit(model.apply, static_argnums=2)
    return np.asarray(compiled({"params": params}, images, True, index, rngs=rngs))


@pytest.mark.parametrize("setting", ["dropout", "stochastic_depth"])
def test_masks_depend_on_example_index_only(setting: str) -> None:
    rates: dict[str, Any] = {setting: 0.5}
    model, images = tiny_vit(**rates), random_images(6)
    whole = outputs(model, images, jnp.arange(6))
    np.testing.assert_allclose(
        outputs(model, images[4:], jnp.arange(4, 6)), whole[4:], rtol=1e-5, atol=1e-5
    )
    # Of equal images each has its own masks; other seeds have others.
    equal = jnp.tile(images[:1], (6, 1, 1, 1))
    assert len(np.unique(outputs(model, equal, jnp.arange(6)), axis=0)) > 1
    assert not np.allclose(outputs(model, images, jnp.arange(6), seed=1), whole)
    assert not np.allclose(whole, outputs(tiny_vit(), images, jnp.arange(6)))


def test_dropout_has_its_four_places() -> None:
    model = tiny_vit(dropout=0.5)
    rngs = {"dropout": jax.random.key(0)}
    params = random_params(tiny_vit())
    # Without hidden units' dropout, the output of an MLP would be zero only where it is dropped.
    args = ({"params": params}, random_images(64), True)
    _, state = jax.jit(
        lambda *args: model.apply(*args, rngs=rngs, mutable=["intermediates"]), static_argnums=2
    )(*args)
    for name in ("attention", "mlp"):
        branches = [state["intermediates"][f"blocks.{i}.{name}"][0] for i in range(2)]
        assert np.mean(np.stack(branches) == 0) == pytest.approx(0.5, abs=0.02)
    # Tokens after the position embedding: of blocks that add nothing, half the channels are zero.
    params = jax.tree.map(jnp.zeros_like, params)
    params["pos_embedding"] += 1.0
    params["encoder_norm"]["scale"] += 1.0
    features = tiny_vit(0, dropout=0.5).apply(
        {"params": {k: v for k, v in params.items() if k != "head"}},
        random_images(256),
        True,
        rngs=rngs,
    )
    assert np.mean(features < 0) == pytest.approx(0.5, abs=0.05)


def test_linear_resizing_is_the_authors() -> None:
    zoom = importlib.import_module("scipy.ndimage").zoom
    rng = np.random.default_rng(0)
    pos = rng.normal(0, 1, (1, 1 + 14 * 14, 3)).astype(np.float32)
    assert resize_pos_embedding(pos, (14, 14), (14, 14)) is pos
    large = resize_pos_embedding(pos, (14, 14), (27, 27))
    grid = large[:, 1:].reshape(27, 27, 3)
    np.testing.assert_array_equal(grid[::2, ::2].reshape(1, 196, 3), pos[:, 1:])
    np.testing.assert_array_equal(resize_pos_embedding(large, (27, 27), (14, 14)), pos)
    # The class token's entry stays as it is.
    np.testing.assert_array_equal(large[:, 0], pos[:, 0])
    for new in ((24, 24), (9, 30), (1, 5)):
        factors = (new[0] / 14, new[1] / 14, 1)
        expected = zoom(pos[0, 1:].reshape(14, 14, 3), factors, order=1)
        actual = resize_pos_embedding(pos[:, 1:], (14, 14), new)
        np.testing.assert_allclose(actual.reshape(*new, 3), expected, atol=1e-6)


@pytest.mark.parametrize("new", [(5, 8), (9, 3), (3, 12)])
def test_bicubic_resizing_is_antialiased(new: tuple[int, int]) -> None:
    pos = np.random.default_rng(0).normal(0, 1, (1, 5 * 8, 3)).astype(np.float32)
    expected = jax.image.resize(pos.reshape(5, 8, 3), (*new, 3), "cubic", antialias=True)
    actual = resize_pos_embedding(pos, (5, 8), new, "bicubic").reshape(*new, 3)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_resized_embedding_must_fit_its_grid() -> None:
    with raises(UserError, "grid", "(3, 3)", "9", "17"):
        resize_pos_embedding(np.zeros((1, 17, 2), np.float32), (3, 3), (4, 4))


def test_invalid_sizes_are_errors() -> None:
    with raises(UserError, "image_size", "16", "230", "224", "240"):
        FAMILY.check_image_size(VARIANTS["B/16"], 224, 230)
    with raises(UserError, "num_heads", "hidden_dim", "192", "5", "4"):
        create_model("ViT-Ti/16", num_heads=5)
    with raises(UserError, "hidden_dim", "sincos2d", "4", "6"):
        tiny_vit(hidden_dim=6, pos_embedding="sincos2d")


@pytest.mark.parametrize("kind", KINDS)
def test_variant_is_inferred_with_any_head(kind: str) -> None:
    config = dataclasses.replace(VARIANTS["L/16"], **KINDS[kind])
    assert FAMILY.infer_variant(config) == "L/16"
    assert FAMILY.infer_variant(dataclasses.replace(config, mlp_dim=8)) == "custom"
