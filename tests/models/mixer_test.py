"""Tests of the model: sizes, mathematics, and the effect of each setting."""

import operator
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.errors import UserError
from mixer_jax.models.layers import Context, MlpBlock, vmap_vectors
from mixer_jax.models.mixer import MixerBlock, MlpMixer
from mixer_jax.models.mixer_config import VARIANTS, MixerConfig
from mixer_jax.models.registry import create_model, get_family
from mixer_jax.models.stack import forward_intermediates, stochastic_depth_rates
from tests.helpers.models import param_shapes, random_images, random_params, tiny_mixer

# PAPER: Table 1 with the arithmetic of its sizes; (no head, 1,000 classes, 21,843 classes).
COUNTS = {
    "S/32": (18_591_624, 19_104_624, 29_797_083),
    "S/16": (18_015_264, 18_528_264, 29_220_723),
    "B/32": (59_524_428, 60_293_428, 76_321_695),
    "B/16": (59_111_472, 59_880_472, 75_908_739),
    "L/32": (205_914_264, 206_939_264, 228_303_339),
    "L/16": (207_171_168, 208_196_168, 229_560_243),
    "H/14": (431_069_952, 432_350_952, 459_050_835),
}


def init(model: MlpMixer) -> Any:
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]


def apply(model: MlpMixer, params: Any, images: jax.Array) -> jax.Array:
    return jax.jit(model.apply)({"params": params}, images)


@pytest.fixture
def images() -> jax.Array:
    return random_images()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("column", "num_classes"), [(0, 0), (1, 1000), (2, 21843)])
def test_num_params(variant: str, column: int, num_classes: int) -> None:
    model = create_model(variant, num_classes)
    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(model, 224)))
    assert count == COUNTS[variant][column]
    assert get_family("mixer").num_params(VARIANTS[variant], 224, num_classes) == count


@pytest.mark.parametrize(
    ("variant", "gflop"),
    [("S/32", 2.0), ("S/16", 7.6), ("B/32", 6.5), ("B/16", 25.2), ("L/16", 89.1), ("H/14", 242.0)],
)
def test_forward_flops(variant: str, gflop: float) -> None:
    flops = get_family("mixer").forward_flops(VARIANTS[variant], 224, 1000)
    assert round(flops / 1e9, 1) == gflop


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: np.ndarray, p: Any) -> np.ndarray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def mlp(x: np.ndarray, p: Any) -> np.ndarray:
    hidden = gelu(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
    return hidden @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


def numpy_forward(params: Any, image: np.ndarray, patch: int) -> dict[str, np.ndarray]:
    """The paper's Section 2 for one image, written out in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    size, kernel = image.shape[0], p["stem"]["kernel"]
    rows = [
        np.tensordot(image[y : y + patch, x : x + patch], kernel, axes=3) + p["stem"]["bias"]
        for y in range(0, size, patch)
        for x in range(0, size, patch)
    ]
    table = np.stack(rows)
    found: dict[str, Any] = {"stem": table}
    num_blocks = p["blocks"]["LayerNorm_0"]["scale"].shape[0]
    for i in range(num_blocks):
        block = jax.tree.map(operator.itemgetter(i), p["blocks"])
        branch = mlp(layer_norm(table, block["LayerNorm_0"]).T, block["token_mixing"]).T
        found[f"blocks.{i}.token_mixing"] = branch
        table = table + branch
        branch = mlp(layer_norm(table, block["LayerNorm_1"]), block["channel_mixing"])
        found[f"blocks.{i}.channel_mixing"] = branch
        table = table + branch
        found[f"blocks.{i}"] = table
    tokens = layer_norm(table, p["pre_head_layer_norm"])
    features = tokens.mean(0)
    logits = features @ p["head"]["kernel"] + p["head"]["bias"]
    found |= {"tokens": tokens, "pooled": features, "pre_logits": features}
    return {**found, "logits": logits}


def test_forward_matches_paper(images: jax.Array) -> None:
    model = tiny_mixer()
    params = random_params(model)
    logits = apply(model, params, images)
    expected = [numpy_forward(params, np.asarray(i, np.float64), 4)["logits"] for i in images]
    np.testing.assert_allclose(logits, np.stack(expected), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scan_unroll", [0, 1])
def test_forward_intermediates_match_paper(scan_unroll: int, images: jax.Array) -> None:
    # A custom backend computes the same function, and gives way to the modules here.
    model = tiny_mixer(scan_unroll=scan_unroll, remat="dots", backend="triton", interpret=True)
    params = random_params(model)
    logits, activations = forward_intermediates(model, params, images)
    for i in range(2):
        expected = numpy_forward(params, np.asarray(images[i], np.float64), 4)
        np.testing.assert_allclose(logits[i], expected.pop("logits"), rtol=2e-5, atol=2e-5)
        assert activations.keys() == expected.keys()
        for name, value in expected.items():
            actual = activations[name][i]
            np.testing.assert_allclose(actual, value, rtol=2e-5, atol=2e-5, err_msg=name)


def test_initial_values_are_the_authors() -> None:
    params = init(tiny_mixer(num_classes=5, head_bias=-6.9))
    assert np.all(params["head"]["kernel"] == 0)
    assert np.all(params["head"]["bias"] == np.float32(-6.9))
    blocks = init(tiny_mixer(0, channels_mlp_dim=4096))["blocks"]
    kernel, bias = (blocks["channel_mixing"]["Dense_0"][name] for name in ("kernel", "bias"))
    assert np.all(bias == 0)
    # LeCun normal: variance 1 / fan-in, in every block, and no two blocks alike.
    for one in kernel:
        assert np.std(one) == pytest.approx(8**-0.5, rel=0.03)
    assert not np.array_equal(kernel[0], kernel[1])


def test_no_classes_returns_features(images: jax.Array) -> None:
    model = tiny_mixer()
    params = random_params(model)
    headless = {name: value for name, value in params.items() if name != "head"}
    features = apply(tiny_mixer(num_classes=0), headless, images)
    assert features.shape == (2, 8)
    logits = features @ params["head"]["kernel"] + params["head"]["bias"][None]
    np.testing.assert_allclose(apply(model, params, images), logits, atol=1e-5)


@pytest.mark.parametrize(
    ("scan_unroll", "remat"),
    [(1, "none"), (2, "none"), (1, "dots"), (3, "dots"), (1, "mlp_hidden"), (3, "full")],
)
def test_scan_and_remat_do_not_change_values(
    scan_unroll: int, remat: str, images: jax.Array
) -> None:
    def value_and_grad(model: MlpMixer) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.sum(jnp.sin(model.apply({"params": params}, images)))

        return jax.jit(jax.value_and_grad(loss))(params)

    params = random_params(tiny_mixer())
    expected = value_and_grad(tiny_mixer())
    actual = value_and_grad(tiny_mixer(scan_unroll=scan_unroll, remat=remat))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"target_device_kind": "TPU v6 lite"}, False),
        ({"target_device_kind": "TPU v6 lite", "flatten_batch": True}, True),
        ({"flatten_batch": False}, False),
    ],
)
def test_cpus_flatten_the_batch(
    settings: dict[str, Any], expected: bool, images: jax.Array
) -> None:
    model = tiny_mixer(**settings)
    params = random_params(tiny_mixer())
    program = jax.jit(model.apply).lower({"params": params}, images).as_text()
    # Two images of sixteen tokens, to ten hidden units.
    assert ("-> tensor<32x10xf32>" in program) == expected
    assert ("-> tensor<2x16x10xf32>" in program) != expected


def test_bfloat16_keeps_params_and_logits_float32(images: jax.Array) -> None:
    model = tiny_mixer(dtype="bfloat16")
    params = init(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    params = random_params(model)
    logits, exact = (apply(m, params, images) for m in (model, tiny_mixer()))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, atol=0.1)
    assert not np.array_equal(logits, exact)


@pytest.mark.parametrize(
    ("settings", "train", "expected"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"target_device_kind": "TPU v6 lite"}, False, False),
    ],
)
def test_bfloat16_matmuls_accumulate_in_float32_for_cpu_inference(
    settings: dict[str, Any], train: bool, expected: bool, images: jax.Array
) -> None:
    # Otherwise XLA converts them to float32 matmuls, several times slower on CPUs.
    model = tiny_mixer(dtype="bfloat16", scan_unroll=0, **settings)

    def forward(params: Any) -> jax.Array:
        return model.apply({"params": params}, images, train=train)

    program = jax.jit(forward).lower(random_params(tiny_mixer())).as_text()
    matmuls = re.findall(r"dot_general .*: \((.*), (.*)\) -> (.*)\n", program)
    # The stem, a function with a block's four, and the head, which is always float32.
    assert len(matmuls) == 6
    widened = [a.endswith("bf16>") and to.split(" ")[0].endswith("f32>") for a, _, to in matmuls]
    assert sum(widened) == (5 if expected else 0)


def test_layer_norm_statistics_are_float32_in_bfloat16() -> None:
    # All that reaches the last LayerNorm is the stem's bias. Its values are exact in bfloat16, but
    # their sum of squares is not: statistics in bfloat16 would lose the signal.
    model = tiny_mixer(num_classes=0, dtype="bfloat16")
    bias = np.tile([201.0, 199.0, 202.0, 198.0], 2)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), param_shapes(model))
    params["stem"]["bias"] = jnp.asarray(bias, jnp.float32)
    params["pre_head_layer_norm"]["scale"] = jnp.ones(8)
    features = apply(model, params, jnp.zeros((1, 16, 16, 3)))
    np.testing.assert_allclose(features[0], (bias - 200) / np.sqrt(2.5), rtol=1e-2)


def test_gelus_differ_by_the_approximation_only(images: jax.Array) -> None:
    params = random_params(tiny_mixer())
    tanh, exact = (apply(tiny_mixer(gelu=name), params, images) for name in ("tanh", "exact"))
    difference = np.abs(np.asarray(tanh - exact)).max()
    assert 0 < difference < 1e-2


def outputs(model: MlpMixer, images: jax.Array, seed: int, train: bool = True) -> np.ndarray:
    rngs = {"dropout": jax.random.key(seed), "stochastic_depth": jax.random.key(seed)}
    params = random_params(tiny_mixer())
    compiled = jax.jit(model.apply, static_argnames="train")
    return np.asarray(compiled({"params": params}, images, train=train, rngs=rngs))


@pytest.mark.parametrize("setting", ["dropout", "stochastic_depth"])
def test_regularizers_act_in_training_only(setting: str, images: jax.Array) -> None:
    rates: dict[str, Any] = {setting: 0.5}
    model = tiny_mixer(**rates)
    plain = outputs(tiny_mixer(), images, seed=0)
    np.testing.assert_array_equal(outputs(model, images, seed=0, train=False), plain)
    first, again, other = (outputs(model, images, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, plain)


@pytest.mark.parametrize("setting", ["dropout", "stochastic_depth"])
def test_masks_depend_on_example_index_only(setting: str) -> None:
    rates: dict[str, Any] = {setting: 0.5}
    model, images = tiny_mixer(**rates), random_images(6)
    params, rngs = random_params(tiny_mixer()), {setting: jax.random.key(0)}

    def apply(rows: slice) -> jax.Array:
        index = jnp.arange(6)[rows]
        args = {"params": params}, images[rows], True, index
        return jax.jit(model.apply, static_argnums=2)(*args, rngs=rngs)

    whole = apply(slice(None))
    np.testing.assert_allclose(apply(slice(4, 6)), whole[4:], rtol=1e-5, atol=1e-5)


def test_stochastic_depth_needs_its_random_stream(images: jax.Array) -> None:
    model = tiny_mixer(stochastic_depth=0.5)
    with pytest.raises(Exception, match="stochastic_depth"):
        model.apply({"params": random_params(model)}, images, train=True)


def test_stochastic_depth_rates_rise_linearly_to_the_last_block() -> None:
    rates = np.asarray(stochastic_depth_rates(create_model("B/16", stochastic_depth=0.1)))
    np.testing.assert_allclose(rates, [0.1 * i / 11 for i in range(12)], atol=1e-7)


def test_invalid_image_size_names_the_nearest_valid_ones() -> None:
    model = create_model("B/16")
    with pytest.raises(UserError, match=r"\(16\), got 230.* 224 and 240"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 230, 230, 3))))
    with pytest.raises(UserError, match=r"\(16\), got 10.* 16 and 32"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 10, 3))))


BLOCK_CONFIG = MixerConfig(1, 4, 8, tokens_mlp_dim=6, channels_mlp_dim=10)
NO_MASKS = (None, None)


def test_mlp_is_shared_over_the_axes_it_is_mapped_over() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 5, 7))
    index = jnp.arange(14).reshape(2, 7)
    mapped, plain = vmap_vectors(MlpBlock, 1)(4), MlpBlock(4)
    variables = mapped.init(jax.random.key(1), x, index)
    assert variables["params"]["Dense_0"]["kernel"].shape == (5, 4)
    columns = [[plain.apply(variables, x[i, :, c], index[i, c]) for c in range(7)] for i in (0, 1)]
    np.testing.assert_allclose(
        mapped.apply(variables, x, index), np.stack(columns).swapaxes(1, 2), atol=1e-6
    )


def test_flatten_batch_does_not_change_values() -> None:
    x = jax.random.normal(jax.random.key(0), (6, 4, 8))
    index = jnp.arange(6) + 10
    masks = (jnp.arange(6.0) % 2, jnp.arange(6.0) % 3)
    params = MixerBlock(BLOCK_CONFIG).init(jax.random.key(1), x, NO_MASKS, index)
    rngs = {"dropout": jax.random.key(2)}

    def value_and_grads(flatten_batch: bool) -> Any:
        ctx = Context(train=True, flatten_batch=flatten_batch)
        block = MixerBlock(BLOCK_CONFIG, dropout=0.3, ctx=ctx)

        def loss(params: Any, x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(block.apply(params, x, masks, index, rngs=rngs)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x)

    rows, mapped = value_and_grads(True), value_and_grads(False)
    for a, b in zip(jax.tree.leaves(rows), jax.tree.leaves(mapped), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_dropout_keeps_expectations() -> None:
    x, index = jnp.ones((20_000, 3)), jnp.arange(20_000)
    rows = vmap_vectors(MlpBlock, None)
    inference, training = rows(4, dropout=0.25), rows(4, dropout=0.25, ctx=Context(train=True))
    variables = inference.init(jax.random.key(0), x, index)
    outputs = training.apply(variables, x, index, rngs={"dropout": jax.random.key(1)})
    expected = inference.apply(variables, x, index)[0]
    np.testing.assert_allclose(np.mean(outputs, axis=0), expected, atol=0.02)
    assert np.mean(outputs == 0) == pytest.approx(0.25, abs=0.01)
