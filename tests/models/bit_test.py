"""Tests of BiT-ResNet against the paper's sizes and an independent implementation."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.checkpoints.weights import flatten_params
from mixer_jax.errors import UserError
from mixer_jax.models.bit_config import VARIANTS, BitConfig, convolutions, num_groups
from mixer_jax.models.params import cast_weights
from mixer_jax.models.registry import create_model, get_family
from mixer_jax.models.stack import forward_intermediates
from mixer_jax.planning.hlo_costs import region_of_op
from tests.helpers.messages import raises
from tests.helpers.models import random_params

FAMILY = get_family("bit")
# Parameters without head, with heads of 1,000 and of 21,843 classes; GFLOPs with 1,000 classes at
# 128, 224, 384, 448 and 480 px.
SIZES = {
    "R50x1": (23_500_352, 25_549_352, 68_256_659, (2.67, 8.18, 24.0, 32.7, 37.5)),
    "R50x2": (93_891_712, 97_988_712, 183_382_483, (10.53, 32.23, 94.7, 128.9, 148.0)),
    "R50x3": (211_174_080, 217_319_080, 345_399_315, (23.57, 72.16, 212.1, 288.6, 331.3)),
    "R101x1": (42_492_480, 44_541_480, 87_248_787, (5.10, 15.60, 45.8, 62.4, 71.6)),
    "R101x3": (381_789_888, 387_934_888, 516_015_123, (45.39, 138.98, 408.4, 555.9, 638.2)),
    "R152x1": (58_136_128, 60_185_128, 102_892_435, (7.52, 23.03, 67.7, 92.1, 105.7)),
    "R152x2": (232_238_208, 236_335_208, 321_728_979, (29.93, 91.63, 269.3, 366.5, 420.7)),
    "R152x4": (928_340_224, 936_533_224, 1_107_299_923, (119.38, 365.55, 1074.3, 1462.2, 1678.5)),
    "R200x3": (562_488_000, 568_633_000, 696_713_235, (87.75, 268.69, 789.6, 1074.7, 1233.8)),
}


def test_variants_have_the_papers_sizes() -> None:
    assert VARIANTS.keys() == SIZES.keys()
    for name, (*counts, gflops) in SIZES.items():
        config = FAMILY.get_config(name)
        assert [FAMILY.num_params(config, 224, n) for n in (0, 1000, 21843)] == counts
        for size, expected in zip((128, 224, 384, 448, 480), gflops, strict=True):
            flops = FAMILY.forward_flops(config, size, 1000) / 1e9
            # To the last digit given.
            assert abs(flops - expected) <= (0.0051 if expected in gflops[:2] else 0.051)


def test_published_widths_have_32_groups() -> None:
    for config in VARIANTS.values():
        assert num_groups(config.root_width) == num_groups(config.num_features) == 32
    assert [num_groups(n) for n in (2, 16, 20, 24, 32, 96)] == [1, 8, 4, 8, 16, 32]


@pytest.mark.parametrize("units", ["", "3,,3", "3,x", "0,1", "3,100", "1,1,1,1,1,1,1,1,1,1", "-1"])
def test_invalid_units_are_errors(units: str) -> None:
    with raises(UserError, "units", repr(units)):
        BitConfig(units, 64)


def test_other_invalid_fields_are_errors() -> None:
    with raises(UserError, "root_width", "0"):
        BitConfig("1", 0)
    with raises(UserError, "image_size", "0"):
        FAMILY.check_image_size(VARIANTS["R50x1"], 0, 5)


def tiny(num_classes: int = 5, **overrides: Any) -> Any:
    fields = {"units": "2,1", "root_width": 8, **overrides}
    return create_model("BiT-custom", num_classes, **fields)


def images(batch_size: int = 2, height: int = 13, width: int = 18) -> jax.Array:
    shape = (batch_size, height, width, 3)
    return jax.random.uniform(jax.random.key(1), shape, minval=-1, maxval=1)


def reference_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolves with a standardized kernel, as one matmul of patches of the padded image."""
    matrix = kernel.transpose(2, 0, 1, 3).reshape(-1, kernel.shape[-1])
    matrix = (matrix - matrix.mean(0)[None]) / jnp.sqrt(matrix.var(0) + 1e-10)[None]
    size = len(kernel)
    x = jnp.pad(x, ((0, 0), *((size // 2, size // 2),) * 2, (0, 0)))
    patches = jax.lax.conv_general_dilated_patches(
        x, (size, size), (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return patches @ matrix


def reference_norm_relu(x: jax.Array, params: Any) -> jax.Array:
    n, h, w, c = x.shape
    groups = x.reshape(n, h * w, num_groups(c), -1)
    mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (jnp.mean, jnp.var))
    x = ((groups - mean) / jnp.sqrt(variance + 1e-5)).reshape(x.shape)
    return jnp.maximum(x * params["scale"][None, None, None] + params["bias"][None, None, None], 0)


def reference_pool(x: jax.Array) -> jax.Array:
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.max(jnp.stack(windows), axis=0)[:, ::2, ::2]


def reference(params: Any, x: jax.Array, config: BitConfig) -> jax.Array:
    """Computes logits by plain operations, without Flax."""
    kernel = params["stem"]["kernel"]
    x = reference_conv(x, kernel, 2 if config.root == "7x7" else 1)
    x = reference_pool(x) if config.root == "7x7" else x
    for b, num_units in enumerate(config.units_per_block):
        for u in range(num_units):
            unit = params[f"block{b + 1}"][f"unit{u + 1:02}"]
            stride = 2 if b and not u else 1
            p = reference_norm_relu(x, unit["norm1"])
            if not u:
                x = reference_conv(p, unit["conv_proj"]["kernel"], stride)
            y = reference_conv(p, unit["conv1"]["kernel"], 1)
            y = reference_conv(
                reference_norm_relu(y, unit["norm2"]), unit["conv2"]["kernel"], stride
            )
            y = reference_conv(reference_norm_relu(y, unit["norm3"]), unit["conv3"]["kernel"], 1)
            x = x + y
    x = reference_norm_relu(x, params["norm"]).mean((1, 2))
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


def with_layout(model: Any, flatten_batch: bool) -> Any:
    """Returns a model in the layout of CPUs (true) or of accelerators (false)."""
    execution = dataclasses.replace(model.execution, flatten_batch=flatten_batch)
    return model.clone(execution=execution)


@pytest.mark.parametrize("flatten_batch", [True, False])
@pytest.mark.parametrize("root", ["7x7", "3x3"])
def test_outputs_and_gradients_are_those_of_a_plain_implementation(
    root: Any, flatten_batch: bool
) -> None:
    model, x = with_layout(tiny(root=root), flatten_batch), images()
    params = random_params(model)

    def compute(apply: Any) -> Any:
        def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = apply(params, x)
            return jnp.sum(jnp.sin(logits)), logits

        (_, logits), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
        return logits, grads

    logits, grads = compute(lambda p, x: model.apply({"params": p}, x, train=True))
    expected, expected_grads = compute(lambda p, x: reference(p, x, model.config))
    np.testing.assert_allclose(logits, expected, atol=1e-4 * float(expected.std()))
    for actual, wanted in zip(*map(jax.tree.leaves, (grads, expected_grads)), strict=True):
        np.testing.assert_allclose(actual, wanted, atol=2e-4 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("flatten_batch", [True, False])
def test_remat_changes_no_gradients_and_saves_less(flatten_batch: bool) -> None:
    x, params = images(), random_params(tiny(units="2"))

    def compute(remat: str) -> tuple[Any, int]:
        model = with_layout(tiny(units="2", remat=remat), flatten_batch)
        grad = jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, x))))
        jaxpr = str(jax.make_jaxpr(grad)(params))
        num_convolutions = len(re.findall(r"(?:conv_general_dilated|dot_general)\[", jaxpr))
        return jax.tree.leaves(jax.jit(grad)(params)), num_convolutions

    expected, num_convolutions = compute("none")
    # Each unit recomputes two convolutions; the output of the third and of the projection are not
    # needed.
    for remat, num_recomputed in {"dots": 0, "full": 4}.items():
        grads, count = compute(remat)
        assert count == num_convolutions + num_recomputed
        for a, b in zip(expected, grads, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_scaled_and_shifted_kernels_are_the_same() -> None:
    """Weight standardization removes the scale and the mean of each output channel's kernel."""
    rng, params = np.random.default_rng(0), random_params(tiny())

    def change(path: Any, kernel: jax.Array) -> jax.Array:
        if path[-1].key != "kernel" or path[0].key == "head":
            return kernel
        shape = (1, 1, 1, kernel.shape[-1])
        return kernel * rng.uniform(0.5, 4, shape) + rng.uniform(-1, 1, shape)

    changed = jax.tree_util.tree_map_with_path(change, params)
    apply = jax.jit(tiny().apply)
    logits, expected = (apply({"params": p}, images()) for p in (changed, params))
    np.testing.assert_allclose(logits, expected, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize("train", [False, True])
def test_an_image_has_the_same_logits_in_any_batch(train: bool) -> None:
    x, params = images(batch_size=5), random_params(tiny())
    apply = jax.jit(functools.partial(tiny().apply, train=train))
    logits = apply({"params": params}, x)
    alone = jnp.concatenate([apply({"params": params}, x[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(logits, alone, atol=1e-5 * float(logits.std()))


def test_max_pool_is_padded_by_zeros() -> None:
    """A constant negative value of the root is 0 at the border and the constant elsewhere."""
    model = tiny(units="1")
    params = random_params(model)
    # Its standardized kernel has -1 for the color 0, and 0.5 for the two others.
    kernel = jnp.zeros_like(params["stem"]["kernel"]).at[:, :, 0].set(-3.0)
    images = jnp.zeros((1, 32, 32, 3)).at[..., 0].set(1.0)
    params = {**params, "stem": {"kernel": kernel}}
    _, activations = forward_intermediates(model, params, images)
    stem = activations["stem"][0, :, :, 0]
    assert stem.shape == (8, 8)
    assert (stem[0] == 0).all()
    assert (stem[:, 0] == 0).all()
    # The last window of an even size does not reach beyond the image.
    assert (stem[1:, 1:] < -1).all()


def test_initial_values() -> None:
    model = tiny(10, units="1,1", root_width=64, head_bias=-3.0)
    params = jax.jit(model.init)(jax.random.key(0), images())["params"]
    for path, array in flatten_params(params):
        if path == "head/bias":
            assert (array == -3.0).all()
        elif path.startswith("head") or path.endswith("bias"):
            assert (array == 0.0).all()
        elif path.endswith("scale"):
            assert (array == 1.0).all()
        else:
            # LeCun's normal distribution, truncated at two deviations.
            deviation = np.prod(array.shape[:3]) ** -0.5
            tolerance = 4 / np.sqrt(2 * array.size)
            assert abs(array.std() / deviation - 1) < tolerance, path
            assert abs(array.mean()) < 5 * deviation / np.sqrt(array.size), path
            assert 1.9 < jnp.abs(array).max() / deviation / 1.1368 <= 2.01, path
    logits = jax.jit(model.apply)({"params": params}, images())
    np.testing.assert_array_equal(logits, np.full((2, 10), -3.0))


def test_bfloat16_keeps_statistics_and_kernels_in_float32() -> None:
    """A large mean, of channels or of kernels, would be lost in bfloat16."""
    model, params, x = tiny(dtype="bfloat16"), random_params(tiny()), images()
    expected = tiny().apply({"params": params}, x)
    shifted = jax.tree_util.tree_map_with_path(
        lambda path, k: k + 50.0 if path[-1].key == "kernel" and path[0].key != "head" else k,
        params,
    )
    cast = cast_weights(shifted, "bfloat16", FAMILY)
    logits = model.apply({"params": cast}, x)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=0.1 * float(expected.std()))


def test_any_image_size_and_intermediates() -> None:
    model, params = tiny(units="1,1,1"), random_params(tiny(units="1,1,1"))
    for height, width in ((1, 1), (33, 64)):
        x = images(1, height, width)
        logits, activations = forward_intermediates(model, params, x)
        assert np.isfinite(logits).all()
        sizes = [(-(-height // s), -(-width // s)) for s in (4, 4, 8, 16)]
        names = ["stem", "block1", "block2", "block3"]
        assert [activations[name].shape[1:3] for name in names] == sizes
        assert activations["pre_logits"].shape == (1, model.config.num_features)


@pytest.mark.parametrize(
    ("variant", "image_size", "millions"),
    [
        ("R50x1", 224, 11.11),
        ("R101x1", 224, 16.23),
        ("R50x3", 224, 33.34),
        ("R101x3", 224, 48.70),
        ("R152x2", 224, 45.11),
        ("R152x4", 224, 90.22),
        ("R152x4", 480, 414.26),
    ],
)
def test_outputs_of_convolutions_are_as_many_as_timm_counts(
    variant: str, image_size: int, millions: float
) -> None:
    outputs = sum(conv.num_outputs for conv in convolutions(VARIANTS[variant], image_size))
    assert outputs / 1e6 == pytest.approx(millions, abs=0.0051)


def test_costs_agree_with_each_other() -> None:
    costs, config = FAMILY.cost_model, VARIANTS["R50x1"]
    saved = [
        costs.saved_activation_bytes(config, 224, remat, 2) for remat in ("none", "dots", "full")
    ]
    assert saved == sorted(saved, reverse=True)
    for train in (False, True):
        traffic = costs.estimate_traffic(config, 224, 1000, batch_size=64, itemsize=2, train=train)
        assert traffic.keys() == FAMILY.regions.keys()
        flops = sum(region.flops for region in traffic.values())
        # The gradient of the image is not computed.
        missing = 2 * 7**2 * 3 * 64 * 112**2 if train else 0
        assert flops == (3 if train else 1) * FAMILY.forward_flops(config, 224, 1000) - missing
        recomputed = costs.recomputed_flops(config, 224, "full") if train else 0
        assert sum(region.fused_flops for region in traffic.values()) == flops + recomputed
        assert all(region.fused_bytes <= region.unfused_bytes for region in traffic.values())


def test_regions_are_found_by_the_names_of_operations() -> None:
    model = tiny(units="1,1")
    params = jax.eval_shape(model.init, jax.random.key(0), images())
    text = jax.jit(model.apply).lower(params, images()).compile().as_text()
    names = re.findall(r'op_name="([^"]*)"', str(text))
    found = {region_of_op(name, FAMILY.regions) for name in names}
    assert set(FAMILY.regions) <= found
    (pool,) = {region_of_op(name, FAMILY.regions) for name in names if "reduce_window" in name}
    assert pool == "stem"
