"""Tests of the model: sizes, mathematics, and what each setting changes."""

import operator
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixer_jax
from mixer_jax.config.config import get_default
from mixer_jax.errors import UserError
from mixer_jax.model.making import build_model
from mixer_jax.model.mixer import MlpMixer
from mixer_jax.model.parameters import for_prediction
from mixer_jax.model.variants import VARIANTS, forward_flops, num_parameters
from tests.helpers.messages import mentions, raises

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
TINY: dict[str, Any] = {
    "num_blocks": 3,
    "patch_size": 4,
    "hidden_dim": 8,
    "tokens_mlp_dim": 6,
    "channels_mlp_dim": 10,
}


def tiny(num_classes: int = 5, **overrides: Any) -> MlpMixer:
    return mixer_jax.create_model("custom", num_classes, **TINY, **overrides)


def random_params(model: MlpMixer, size: int = 16) -> Any:
    """Parameters with nothing at zero, so that every one of them matters."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), param_shapes(model, size)
    )


def param_shapes(model: MlpMixer, size: int) -> Any:
    images = jnp.zeros((1, size, size, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images))["params"]


def init(model: MlpMixer) -> Any:
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]


def apply(model: MlpMixer, params: Any, images: jax.Array) -> jax.Array:
    return jax.jit(model.apply)({"params": params}, images)


@pytest.fixture
def images() -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1, maxval=1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("column", "num_classes"), [(0, 0), (1, 1000), (2, 21843)])
def test_parameter_counts(variant: str, column: int, num_classes: int) -> None:
    model = mixer_jax.create_model(variant, num_classes)
    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(model, 224)))
    assert count == COUNTS[variant][column]
    assert num_parameters(VARIANTS[variant], 224, num_classes) == count


@pytest.mark.parametrize(
    ("variant", "gflop"),
    [("S/32", 2.0), ("S/16", 7.6), ("B/32", 6.5), ("B/16", 25.2), ("L/16", 89.1), ("H/14", 242.0)],
)
def test_forward_flops(variant: str, gflop: float) -> None:
    assert round(forward_flops(VARIANTS[variant], 224, 1000) / 1e9, 1) == gflop


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: np.ndarray, p: Any) -> np.ndarray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def mlp(x: np.ndarray, p: Any) -> np.ndarray:
    hidden = gelu(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
    return hidden @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


def numpy_forward(params: Any, image: np.ndarray, patch: int) -> np.ndarray:
    """The paper's Section 2 for one image, written out in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    size, kernel = image.shape[0], p["stem"]["kernel"]
    rows = [
        np.tensordot(image[y : y + patch, x : x + patch], kernel, axes=3) + p["stem"]["bias"]
        for y in range(0, size, patch)
        for x in range(0, size, patch)
    ]
    table = np.stack(rows)
    num_blocks = p["blocks"]["LayerNorm_0"]["scale"].shape[0]
    for block in [jax.tree.map(operator.itemgetter(i), p["blocks"]) for i in range(num_blocks)]:
        table = table + mlp(layer_norm(table, block["LayerNorm_0"]).T, block["token_mixing"]).T
        table = table + mlp(layer_norm(table, block["LayerNorm_1"]), block["channel_mixing"])
    features = layer_norm(table, p["pre_head_layer_norm"]).mean(0)
    return features @ p["head"]["kernel"] + p["head"]["bias"]


def test_forward_equals_the_formulas_of_the_paper(images: jax.Array) -> None:
    model = tiny()
    params = random_params(model)
    logits = apply(model, params, images)
    expected = [numpy_forward(params, np.asarray(image, np.float64), 4) for image in images]
    np.testing.assert_allclose(logits, np.stack(expected), rtol=2e-5, atol=2e-5)


def test_initial_values_are_the_authors() -> None:
    model = tiny(num_classes=5, head_bias=-6.9)
    params = init(model)
    assert np.all(params["head"]["kernel"] == 0)
    assert np.all(params["head"]["bias"] == np.float32(-6.9))
    wide = mixer_jax.create_model("custom", 0, **{**TINY, "channels_mlp_dim": 4096})
    blocks = init(wide)["blocks"]
    kernel, bias = (blocks["channel_mixing"]["Dense_0"][name] for name in ("kernel", "bias"))
    assert np.all(bias == 0)
    # LeCun normal: variance 1 / fan-in, in every block, and no two blocks alike.
    for one in kernel:
        assert np.std(one) == pytest.approx(8**-0.5, rel=0.03)
    assert not np.array_equal(kernel[0], kernel[1])


def test_no_classes_gives_the_features_under_the_head(images: jax.Array) -> None:
    model = tiny()
    params = random_params(model)
    headless = {name: value for name, value in params.items() if name != "head"}
    features = apply(tiny(num_classes=0), headless, images)
    assert features.shape == (2, 8)
    logits = features @ params["head"]["kernel"] + params["head"]["bias"][None]
    np.testing.assert_allclose(apply(model, params, images), logits, atol=1e-5)


def test_parameters_that_lie_apart_give_the_same(images: jax.Array) -> None:
    params = random_params(tiny())
    assert not isinstance(for_prediction(params, jnp.float32, "tpu")["blocks"], list)
    apart = for_prediction(params, jnp.float32, "cpu")
    assert isinstance(apart["blocks"], list)
    expected = apply(tiny(), params, images)
    for unroll in (0, 1):
        actual = apply(tiny(unroll=unroll), apart, images)
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_what_predicts_in_bfloat16_is_cast_once(images: jax.Array) -> None:
    model = tiny(dtype=jnp.bfloat16)
    params = random_params(tiny())
    ready = for_prediction(params, model.dtype, "cpu")
    kernels = [leaf for leaf in jax.tree.leaves(ready["blocks"]) if leaf.ndim == 2]
    assert len(kernels) == 4 * len(ready["blocks"])
    assert {leaf.dtype for leaf in kernels} == {jnp.dtype("bfloat16")}
    assert ready["head"]["kernel"].dtype == jnp.float32
    # To the bit: the model rounds them likewise.
    np.testing.assert_array_equal(apply(model, ready, images), apply(model, params, images))


@pytest.mark.parametrize(
    ("unroll", "remat"),
    [(1, "none"), (2, "none"), (1, "dots"), (3, "dots"), (1, "mlp_hidden"), (3, "full")],
)
def test_unroll_and_remat_change_no_value(unroll: int, remat: str, images: jax.Array) -> None:
    def value_and_grad(model: MlpMixer) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.sum(jnp.sin(model.apply({"params": params}, images)))

        return jax.jit(jax.value_and_grad(loss))(params)

    params = random_params(tiny())
    expected, actual = value_and_grad(tiny()), value_and_grad(tiny(unroll=unroll, remat=remat))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"device_kind": "TPU v6 lite"}, False),
        ({"device_kind": "TPU v6 lite", "for_cpu": True}, True),
        ({"for_cpu": False}, False),
    ],
)
def test_mlps_take_rows_of_one_matrix_on_cpus(
    settings: dict[str, Any], expected: bool, images: jax.Array
) -> None:
    model = tiny(**settings)
    program = jax.jit(model.apply).lower({"params": random_params(tiny())}, images).as_text()
    # Two images of sixteen tokens, to ten hidden units.
    assert ("-> tensor<32x10xf32>" in program) == expected
    assert ("-> tensor<2x16x10xf32>" in program) != expected


def test_bfloat16_keeps_parameters_and_logits_float32(images: jax.Array) -> None:
    model = tiny(dtype=jnp.bfloat16)
    params = init(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    params = random_params(model)
    logits, exact = (apply(m, params, images) for m in (model, tiny()))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, atol=0.1)
    assert not np.array_equal(logits, exact)


@pytest.mark.parametrize(
    ("settings", "train", "expected"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"device_kind": "TPU v6 lite"}, False, False),
    ],
)
def test_bfloat16_products_are_summed_in_float32_where_cpus_predict(
    settings: dict[str, Any], train: bool, expected: bool, images: jax.Array
) -> None:
    # Else XLA turns them into products of float32 numbers, several times slower there.
    model = tiny(**{"dtype": jnp.bfloat16, "unroll": 0, **settings})

    def forward(params: Any) -> jax.Array:
        return model.apply({"params": params}, images, train=train)

    program = jax.jit(forward).lower(random_params(tiny())).as_text()
    products = re.findall(r"dot_general .*: \((.*), (.*)\) -> (.*)\n", program)
    # The stem, a function of a block's four, and the head, which is in float32 in any case.
    assert len(products) == 6
    summed = [a.endswith("bf16>") and to.split(" ")[0].endswith("f32>") for a, _, to in products]
    assert sum(summed) == (5 if expected else 0)


def test_layer_norm_statistics_are_float32_in_bfloat16() -> None:
    # All that reaches the last LayerNorm is the stem's bias. Its values are exact in bfloat16, but
    # their sum of squares is not: statistics in bfloat16 would lose the signal.
    model = tiny(num_classes=0, dtype=jnp.bfloat16)
    bias = np.tile([201.0, 199.0, 202.0, 198.0], 2)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), param_shapes(model, 16))
    params["stem"]["bias"] = jnp.asarray(bias, jnp.float32)
    params["pre_head_layer_norm"]["scale"] = jnp.ones(8)
    features = apply(model, params, jnp.zeros((1, 16, 16, 3)))
    np.testing.assert_allclose(features[0], (bias - 200) / np.sqrt(2.5), rtol=1e-2)


def test_gelu_kinds_differ_by_no_more_than_the_approximation(images: jax.Array) -> None:
    params = random_params(tiny())
    tanh, exact = (apply(tiny(gelu=kind), params, images) for kind in ("tanh", "exact"))
    difference = np.abs(np.asarray(tanh - exact)).max()
    assert 0 < difference < 1e-2


def outputs(model: MlpMixer, images: jax.Array, seed: int, train: bool = True) -> np.ndarray:
    rngs = {"dropout": jax.random.key(seed), "stochastic_depth": jax.random.key(seed)}
    params = random_params(tiny())
    compiled = jax.jit(model.apply, static_argnames="train")
    return np.asarray(compiled({"params": params}, images, train=train, rngs=rngs))


@pytest.mark.parametrize("setting", ["dropout", "stochastic_depth"])
def test_regularizers_act_in_training_only(setting: str, images: jax.Array) -> None:
    rates: dict[str, Any] = {setting: 0.5}
    model = tiny(**rates)
    plain = outputs(tiny(), images, seed=0)
    np.testing.assert_array_equal(outputs(model, images, seed=0, train=False), plain)
    first, again, other = (outputs(model, images, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, plain)


def test_stochastic_depth_needs_its_random_stream(images: jax.Array) -> None:
    model = tiny(stochastic_depth=0.5)
    with raises(Exception, "stochastic_depth"):
        model.apply({"params": random_params(model)}, images, train=True)


def test_drop_rates_rise_linearly_to_the_last_block() -> None:
    model = mixer_jax.create_model("B/16", stochastic_depth=0.1)
    rates = np.asarray(model.drop_rates())
    np.testing.assert_allclose(rates, [0.1 * i / 11 for i in range(12)], atol=1e-7)


def test_image_sizes_that_do_not_fit_name_the_nearest(images: jax.Array) -> None:
    model = mixer_jax.create_model("B/16")
    with raises(UserError, "image_size", "230", "patch_size", "16", "224", "240"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 230, 230, 3))))
    with raises(UserError, "image_size", "10", "patch_size", "16", "32"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 10, 3))))


def test_unknown_variants_and_open_widths_are_errors() -> None:
    with raises(UserError, "variant", "B/17", "S/32", "H/14", "custom"):
        mixer_jax.create_model("B/17")
    missing = ("hidden_dim", "tokens_mlp_dim", "channels_mlp_dim")
    with raises(UserError, "custom", *missing) as caught:
        mixer_jax.create_model("custom", num_blocks=2, patch_size=4)
    assert not mentions(str(caught.value), "num_blocks")


def test_build_model_reads_a_config_section() -> None:
    section = get_default().model.to_dict()
    model = build_model({**section, "patch_size": 8, "gelu": "exact"}, 7)
    assert (model.patch_size, model.hidden_dim, model.gelu) == (8, 768, "exact")
    assert model.dtype == jnp.float32
    assert build_model({**section, "dtype": "bfloat16"}, 7).dtype == jnp.bfloat16
