"""Tests of resizing: tiled weights are exact, interpolated ones follow the documented formula."""

import copy
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.errors import UserError
from mixer_jax.models.mixer import MlpMixer
from mixer_jax.models.mixer_config import VARIANTS, MixerConfig
from mixer_jax.models.mixer_resize import Grid, integer_scale, resize_token_mixing
from mixer_jax.models.registry import create_model, get_family

TINY: dict[str, Any] = {
    "num_blocks": 2,
    "patch_size": 4,
    "hidden_dim": 8,
    "tokens_mlp_dim": 6,
    "channels_mlp_dim": 10,
}
# PAPER: Appendix C with the arithmetic of its sizes; parameters without head at 448 px.
COUNTS_448 = {
    "S/16": 30_068_352,
    "B/16": 86_227_392,
    "L/16": 279_475_584,
    "H/14": 588_442_368,
}


def build(variant: str, **overrides: Any) -> MlpMixer:
    return create_model(variant, 0, scan_unroll=1, **overrides)


def tiny(tokens_mlp_dim: int = 6) -> MlpMixer:
    return build("custom", **{**TINY, "tokens_mlp_dim": tokens_mlp_dim})


def param_shapes(model: MlpMixer, grid: Grid) -> Any:
    images = jnp.zeros((1, grid[0] * model.config.patch_size, grid[1] * model.config.patch_size, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images))["params"]


def random_params(model: MlpMixer, grid: Grid) -> Any:
    """Parameters with nothing at zero, so scaled that every branch of a block matters."""
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> np.ndarray:
        # Of three axes, the first numbers the blocks.
        fan_in = {3: leaf.shape[1:2], 4: leaf.shape[:3]}.get(len(leaf.shape), (2,))
        return rng.normal(0, math.prod(fan_in) ** -0.5, leaf.shape).astype(np.float32)

    return jax.tree.map(draw, param_shapes(model, grid))


def draw_image(model: MlpMixer, grid: Grid) -> np.ndarray:
    size = (grid[0] * model.config.patch_size, grid[1] * model.config.patch_size)
    return np.random.default_rng(1).uniform(-1, 1, (1, *size, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def features(model: MlpMixer, params: Any, images: np.ndarray) -> jax.Array:
    return model.apply({"params": params}, images)


def mixing_of(params: Any) -> Any:
    return params["blocks"]["token_mixing"]


def with_mixing(params: Any, mixing: Any) -> Any:
    return {**params, "blocks": {**params["blocks"], "token_mixing": mixing}}


def raster_tiling(mixing: Any, factor: int) -> Any:
    """Returns block-diagonal copies over consecutive tokens, a misreading of Appendix C."""
    eye = np.eye(factor**2, dtype=np.float32)
    return {
        layer: {
            "kernel": np.stack([np.kron(eye, kernel) for kernel in values["kernel"]]),
            "bias": np.tile(values["bias"], factor**2),
        }
        for layer, values in mixing.items()
    }


# Features have a deviation of 0.7 to 1.0; the largest error seen is 5e-7, from float32 rounding.
TOLERANCE = 5e-6


@pytest.mark.parametrize(
    ("variant", "grid", "factor"),
    [
        ("S/32", (7, 7), 2),
        ("S/32", (7, 7), 3),
        ("S/16", (14, 14), 2),
        ("custom", (4, 4), 2),
        ("custom", (2, 5), 3),
    ],
)
def test_tiled_features_are_the_mean_over_quadrants(variant: str, grid: Grid, factor: int) -> None:
    overrides = TINY if variant == "custom" else {"num_blocks": 2}
    model = build(variant, **overrides)
    larger = (factor * grid[0], factor * grid[1])
    width = factor**2 * model.config.tokens_mlp_dim
    tiled_model = build(variant, **{**overrides, "tokens_mlp_dim": width})
    params = random_params(model, grid)
    image = draw_image(model, larger)
    tiles = [
        tile for rows in np.split(image, factor, axis=1) for tile in np.split(rows, factor, axis=2)
    ]
    expected = np.mean(features(model, params, np.concatenate(tiles)), axis=0)
    tiled = resize_token_mixing(params, grid, larger)
    actual = features(tiled_model, tiled, image)[0]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)

    # Copies over consecutive tokens, which are not quadrants, fail this test.
    wrong = with_mixing(params, raster_tiling(mixing_of(params), factor))
    error = np.abs(features(tiled_model, wrong, image)[0] - expected).max()
    assert error > 500 * TOLERANCE


def test_tiled_weights_are_block_diagonal_with_permuted_tokens() -> None:
    params = random_params(tiny(), (2, 3))
    tiled = mixing_of(resize_token_mixing(params, (2, 3), (4, 6)))
    # Features would not show a wrong bias 2: it shifts all channels of a token equally, which every
    # LayerNorm removes.
    plain = raster_tiling(mixing_of(params), 2)
    # The four quadrants of 2×3 in the 4×6 image, each in raster order.
    order = [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]
    order += [12, 13, 14, 18, 19, 20, 15, 16, 17, 21, 22, 23]
    first, second = tiled["Dense_0"], tiled["Dense_1"]
    np.testing.assert_array_equal(first["kernel"][:, order], plain["Dense_0"]["kernel"])
    np.testing.assert_array_equal(first["bias"], plain["Dense_0"]["bias"])
    np.testing.assert_array_equal(second["kernel"][:, :, order], plain["Dense_1"]["kernel"])
    np.testing.assert_array_equal(second["bias"][:, order], plain["Dense_1"]["bias"])


@pytest.mark.parametrize("variant", COUNTS_448)
def test_parameter_counts_at_448_pixels(variant: str) -> None:
    widths = VARIANTS[variant]
    old, new = ((size // widths.patch_size,) * 2 for size in (224, 448))
    family = get_family("mixer")
    larger = family.resize_config(widths, (224, 224), (448, 448)).config
    assert family.num_params(larger, 448, 0) == COUNTS_448[variant]
    # Broadcast zeros, so that the arrays of the old model need no memory.
    params = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), param_shapes(build(variant), old)
    )
    shapes = jax.tree.map(np.shape, resize_token_mixing(params, old, new))
    tiled_model = build(variant, tokens_mlp_dim=larger.tokens_mlp_dim)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, param_shapes(tiled_model, new))
    leaves = jax.tree.leaves(shapes, is_leaf=lambda node: isinstance(node, tuple))
    assert sum(math.prod(shape) for shape in leaves) == COUNTS_448[variant]


def keys_matrix(old: int, new: int) -> np.ndarray:
    """Returns the m×n matrix of cubic interpolation of one axis, sample by sample."""
    matrix = np.zeros((new, old))
    for row in range(new):
        center = (row + 0.5) * old / new - 0.5
        for sample in range(math.floor(center) - 1, math.floor(center) + 3):
            x = abs(center - sample)
            weight = 1.5 * x**3 - 2.5 * x**2 + 1
            if x > 1:
                weight = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
            matrix[row, min(max(sample, 0), old - 1)] += weight
    return matrix


def resampling(old: Grid, new: Grid) -> np.ndarray:
    """Returns R(old→new) of a grid, as the full Kronecker product."""
    axes = [
        keys_matrix(n, m) if m >= n else np.linalg.pinv(keys_matrix(m, n))
        for n, m in zip(old, new, strict=True)
    ]
    return np.kron(*axes)


def assert_close_to_scale(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# Larger; smaller; one axis only; one larger and the other smaller; integer on one axis only.
GRIDS: list[tuple[Grid, Grid]] = [
    ((4, 6), (5, 9)),
    ((5, 9), (4, 6)),
    ((4, 6), (4, 7)),
    ((4, 6), (5, 4)),
    ((3, 4), (6, 4)),
    ((4, 4), (2, 2)),
    ((1, 2), (3, 3)),
]


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_interpolated_weights_match_formula(old: Grid, new: Grid) -> None:
    params = random_params(tiny(), old)
    before, after = mixing_of(params), mixing_of(resize_token_mixing(params, old, new))
    forward, back = resampling(old, new), resampling(new, old)
    for i in range(2):
        for layer, name, expected in [
            ("Dense_0", "kernel", back.T @ before["Dense_0"]["kernel"][i]),
            ("Dense_1", "kernel", before["Dense_1"]["kernel"][i] @ forward.T),
            ("Dense_1", "bias", forward @ before["Dense_1"]["bias"][i]),
        ]:
            assert_close_to_scale(after[layer][name][i], expected, 2e-7)


@pytest.mark.parametrize(("old", "new"), [(13, 14), (14, 15), (14, 16), (14, 28), (28, 30)])
def test_interpolation_is_well_conditioned(old: int, new: int) -> None:
    assert np.linalg.cond(keys_matrix(old, new)) < 2


def test_interpolation_by_hand() -> None:
    # Keys' kernel with a = −1/2 is −25/432 at 7/6. The repeated edge gets the remaining weight.
    params = random_params(tiny(), (1, 2))
    mixing_of(params)["Dense_1"]["bias"][:] = [0, 432]
    wider = mixing_of(resize_token_mixing(params, (1, 2), (1, 3)))["Dense_1"]["bias"]
    taller = mixing_of(resize_token_mixing(params, (2, 1), (3, 1)))["Dense_1"]["bias"]
    np.testing.assert_allclose(wider[0], [-25, 216, 457], rtol=1e-6)
    np.testing.assert_array_equal(taller, wider)


@pytest.mark.parametrize(
    ("old", "new"),
    [((14, 14), (16, 16)), ((14, 14), (20, 20)), ((4, 6), (5, 9)), ((3, 4), (6, 4))],
)
def test_larger_and_back_gives_the_original(old: Grid, new: Grid) -> None:
    params = random_params(tiny(), old)
    larger = resize_token_mixing(params, old, new)
    restored = resize_token_mixing(larger, new, old)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(restored), strict=True):
        assert_close_to_scale(after, before, 1e-5)
    first = mixing_of(larger)["Dense_0"]["kernel"]
    assert first.shape == (2, new[0] * new[1], 6)


def test_smaller_and_back_projects_onto_interpolations() -> None:
    params = random_params(tiny(), (4, 6))
    resized = resize_token_mixing(params, (4, 6), (5, 4))
    restored = mixing_of(resize_token_mixing(resized, (5, 4), (4, 6)))
    # Rows grow, so that nothing is lost along them; columns are projected.
    columns = keys_matrix(4, 6) @ np.linalg.pinv(keys_matrix(4, 6))
    projection = np.kron(np.eye(4), columns)
    before = mixing_of(params)
    for name, value in [
        ("kernel", before["Dense_1"]["kernel"]),
        ("bias", before["Dense_1"]["bias"]),
    ]:
        assert_close_to_scale(restored["Dense_1"][name], value @ projection, 1e-5)
        assert not np.allclose(restored["Dense_1"][name], value, atol=0.1)
    first = before["Dense_0"]["kernel"].swapaxes(1, 2)
    assert_close_to_scale(restored["Dense_0"]["kernel"].swapaxes(1, 2), first @ projection, 1e-5)


@pytest.mark.parametrize(("old", "new"), [((14, 14), (16, 16)), ((4, 6), (5, 9))])
def test_interpolated_tokens_give_old_hidden_units_and_interpolated_output(
    old: Grid, new: Grid
) -> None:
    params = random_params(tiny(), old)
    before, after = mixing_of(params), mixing_of(resize_token_mixing(params, old, new))
    tokens = np.random.default_rng(2).normal(size=(old[0] * old[1]))
    larger = resampling(old, new) @ tokens
    hidden = tokens @ before["Dense_0"]["kernel"]
    assert_close_to_scale(larger @ after["Dense_0"]["kernel"], hidden, 1e-6)
    units = np.random.default_rng(3).normal(size=6)
    old_output, new_output = (
        units @ mixing["Dense_1"]["kernel"] + mixing["Dense_1"]["bias"]
        for mixing in (before, after)
    )
    assert_close_to_scale(new_output, old_output @ resampling(old, new).T, 1e-6)


@pytest.mark.parametrize(("old", "new"), [((5, 9), (4, 6)), ((14, 14), (7, 7))])
def test_fewer_tokens_give_hidden_units_of_their_interpolation(old: Grid, new: Grid) -> None:
    params = random_params(tiny(), old)
    tokens = np.random.default_rng(2).normal(size=(new[0] * new[1]))
    after = mixing_of(resize_token_mixing(params, old, new))["Dense_0"]["kernel"]
    before = mixing_of(params)["Dense_0"]["kernel"]
    assert_close_to_scale(tokens @ after, (resampling(new, old) @ tokens) @ before, 1e-6)


@pytest.mark.parametrize("new", [(5, 9), (3, 4), (5, 4)])
def test_constant_image_has_the_same_features_at_every_size(new: Grid) -> None:
    params = random_params(tiny(), (4, 6))
    # Token mixing must add the same to all tokens, or they would differ after the first block.
    second = mixing_of(params)["Dense_1"]
    constant = {name: np.repeat(value[..., :1], 24, axis=-1) for name, value in second.items()}
    params = with_mixing(params, {**mixing_of(params), "Dense_1": constant})
    resized = resize_token_mixing(params, (4, 6), new)
    color = np.array([0.5, -0.2, 0.1], np.float32)
    expected, actual = (
        features(tiny(), values, np.broadcast_to(color, (1, 4 * rows, 4 * columns, 3)))
        for values, (rows, columns) in ((params, (4, 6)), (resized, new))
    )
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)
    assert np.std(expected) > 0.1


def test_interpolated_parameters_run_in_the_model() -> None:
    params = resize_token_mixing(random_params(tiny(), (4, 6)), (4, 6), (5, 9))
    actual = features(tiny(), params, draw_image(tiny(), (5, 9)))
    assert np.isfinite(actual).all()
    assert np.std(actual) > 0.1


@pytest.mark.parametrize(
    ("new", "changed"),
    [
        (
            (8, 12),
            {
                ("Dense_0", "kernel"),
                ("Dense_0", "bias"),
                ("Dense_1", "kernel"),
                ("Dense_1", "bias"),
            },
        ),
        ((5, 9), {("Dense_0", "kernel"), ("Dense_1", "kernel"), ("Dense_1", "bias")}),
        ((4, 6), set()),
    ],
)
def test_unchanged_arrays_are_shared(new: Grid, changed: set[tuple[str, str]]) -> None:
    params = random_params(tiny(), (4, 6))
    original = copy.deepcopy(params)
    resized = resize_token_mixing(params, (4, 6), new)
    jax.tree.map(np.testing.assert_array_equal, params, original)
    old_leaves = {id(leaf) for leaf in jax.tree.leaves(params)}
    found = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(resized):
        assert leaf.dtype == np.float32
        assert leaf.flags.c_contiguous
        if id(leaf) not in old_leaves:
            names = [entry.key for entry in path]
            assert names[:2] == ["blocks", "token_mixing"]
            found.add((names[2], names[3]))
    assert found == changed


@pytest.mark.parametrize(
    ("old", "new", "factor", "method", "width"),
    [
        ((14, 14), (14, 14), 1, "identity", 256),
        ((14, 14), (28, 28), 2, "tiled", 1024),
        ((2, 5), (6, 15), 3, "tiled", 2304),
        ((14, 14), (16, 16), 0, "interpolated", 256),
        ((14, 14), (28, 42), 0, "interpolated", 256),
        ((14, 14), (28, 14), 0, "interpolated", 256),
        ((28, 28), (14, 14), 0, "interpolated", 256),
        ((2, 6), (6, 2), 0, "interpolated", 256),
    ],
)
def test_resize_config(old: Grid, new: Grid, factor: int, method: str, width: int) -> None:
    assert integer_scale(old, new) == factor
    config = MixerConfig(1, 1, 8, 256, 10)
    resized = get_family("mixer").resize_config(config, old, new)
    assert resized.method == method
    assert resized.config == dataclasses.replace(config, tokens_mlp_dim=width)


def test_invalid_grids_are_errors() -> None:
    params = random_params(tiny(), (4, 6))
    with pytest.raises(UserError, match=r"\(24\), got \(4, 5\), which has 20"):
        resize_token_mixing(params, (4, 5), (8, 10))
    with pytest.raises(UserError, match=r"\(24\), got \(4, 5\), which has 20"):
        resize_token_mixing(params, (4, 5), (4, 5))
    for old, new in (((4, 6), (0, 6)), ((4, -6), (4, 6))):
        with pytest.raises(UserError, match=r"grid .* at least 1.* got \(.*[0-6]\)"):
            resize_token_mixing(params, old, new)
        with pytest.raises(UserError, match="at least 1"):
            integer_scale(old, new)
