"""Tests of schedule and optimizer against formulas in NumPy."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from mixer_jax.checkpoints.weights import unflatten_params
from mixer_jax.config.schema import OptimizerConfig
from mixer_jax.models.registry import get_family
from mixer_jax.training.optimizer import make_optimizer, make_schedule, weight_decay_mask

MIXER = get_family("mixer")


def paper_schedule(step: int, num_steps: int) -> float:
    """Computes the schedule of the paper: 10,000 steps of warmup, then linear decay to zero."""
    if step < 10_000:
        return 1e-3 * step / 10_000
    return 1e-3 * (num_steps - step) / (num_steps - 10_000)


@pytest.mark.parametrize("step", [0, 1, 9_999, 10_000, 10_001, 51_448, 92_895, 92_896])
def test_make_schedule_equals_the_papers(step: int) -> None:
    num_steps = 92_897
    schedule = make_schedule(OptimizerConfig(learning_rate=1e-3), num_steps)
    expected = paper_schedule(step, num_steps)
    assert float(schedule(jnp.int32(step))) == pytest.approx(expected, rel=1e-5, abs=1e-10)


@pytest.mark.parametrize(
    ("decay_type", "end", "expected"),
    [
        ("cosine", 0.0, {0: 0.0, 5: 0.005, 10: 0.01, 60: 0.005, 110: 0.0}),
        ("cosine", 0.002, {10: 0.01, 60: 0.006, 110: 0.002}),
        ("linear", 0.002, {10: 0.01, 35: 0.008, 110: 0.002}),
        ("none", 0.0, {0: 0.0, 10: 0.01, 109: 0.01}),
    ],
)
def test_make_schedule_decays_to_its_end(
    decay_type: Any, end: float, expected: dict[int, float]
) -> None:
    config = OptimizerConfig(
        learning_rate=0.01, warmup_steps=10, decay_type=decay_type, end_learning_rate=end
    )
    schedule = make_schedule(config, num_steps=110)
    for step, rate in expected.items():
        assert float(schedule(jnp.int32(step))) == pytest.approx(rate, abs=1e-7)


@pytest.mark.parametrize(
    ("num_steps", "points", "first_steps"),
    [
        # BASELINES: BiT-S, 90 epochs of ImageNet-1k with decays at epochs 30, 60 and 80.
        (28_150, "30/90,60/90,80/90", (9_384, 18_767, 25_023)),
        (10_000, "0.3,0.6,0.9", (3_000, 6_000, 9_000)),
        # Two points may be the same step of a short run.
        (10, "0.5,0.59,0.9", (5, 6, 9)),
        (4, "0.5,0.7,0.9", (2, 3, 4)),
    ],
)
def test_staircase_divides_the_rate_by_ten_from_each_point_on(
    num_steps: int, points: str, first_steps: tuple[int, ...]
) -> None:
    config = OptimizerConfig(
        learning_rate=0.48, warmup_steps=1, decay_type="staircase", decay_points=points
    )
    schedule = make_schedule(config, num_steps)
    assert float(schedule(jnp.int32(0))) == 0
    assert schedule(jnp.int32(1)) == np.float32(0.48)
    for count, step in enumerate(first_steps, start=1):
        assert schedule(jnp.int32(step)) == np.float32(0.48 * 0.1**count)
        if step - 1 not in first_steps:
            assert schedule(jnp.int32(step - 1)) == np.float32(0.48 * 0.1 ** (count - 1))


def test_staircase_points_count_from_the_start_of_warmup() -> None:
    config = OptimizerConfig(
        learning_rate=1.0, warmup_steps=40, decay_type="staircase", decay_points="0.2,0.5"
    )
    schedule = make_schedule(config, num_steps=100)
    rates = [float(schedule(jnp.int32(step))) for step in (20, 39, 40, 49, 50)]
    # A decay within the warmup takes effect at its end.
    assert rates == pytest.approx([0.5, 0.975, 0.1, 0.1, 0.01])


def big_vision_rate(step: int, warmup: int, timescale: int, cooldown: int, total: int) -> float:
    """Computes rsqrt with warmup and cooldown to zero as big_vision does."""
    rate = 1.0 if step < warmup else 1 / math.sqrt(1 + (step - warmup) / timescale)
    return rate * min(1, step / warmup) * min(1, (total - step) / cooldown)


@pytest.mark.parametrize("step", [0, 3, 10, 11, 60, 79, 80, 81, 99, 100])
def test_rsqrt_with_cooldown_equals_its_formula(step: int) -> None:
    config = OptimizerConfig(
        learning_rate=0.5,
        warmup_steps=10,
        decay_type="rsqrt",
        rsqrt_timescale=30,
        cooldown_steps=20,
    )
    rate = float(make_schedule(config, num_steps=100)(jnp.int32(step)))
    assert rate == pytest.approx(0.5 * big_vision_rate(step, 10, 30, 20, 100), rel=1e-6)


@pytest.mark.parametrize("decay_type", ["none", "rsqrt"])
def test_cooldown_ends_at_the_end_learning_rate(decay_type: Any) -> None:
    config = OptimizerConfig(
        learning_rate=1.0,
        warmup_steps=0,
        decay_type=decay_type,
        rsqrt_timescale=50,
        cooldown_steps=10,
        end_learning_rate=0.2,
    )
    schedule = make_schedule(config, num_steps=60)
    start, middle, end = (float(schedule(jnp.int32(step))) for step in (50, 55, 60))
    plain = [1.0, 1.0] if decay_type == "none" else [0.5**0.5, (50 / 105) ** 0.5]
    assert [start, middle, end] == pytest.approx([plain[0], (plain[1] + 0.2) / 2, 0.2], rel=1e-6)


@pytest.mark.parametrize("decay_type", ["linear", "cosine", "staircase", "rsqrt", "none"])
@pytest.mark.parametrize("end", [0.0, 1e-4])
def test_peak_as_an_argument_replaces_that_of_the_config(decay_type: Any, end: float) -> None:
    config = OptimizerConfig(
        learning_rate=0.003,
        warmup_steps=10,
        decay_type=decay_type,
        decay_points="0.5,0.8" if decay_type == "staircase" else "",
        end_learning_rate=end,
    )

    @jax.jit
    def rate(peak: jax.Array, step: jax.Array) -> jax.Array:
        return make_schedule(dataclasses.replace(config, learning_rate=1.0), 100, peak)(step)

    for step in map(jnp.int32, (0, 5, 10, 60, 99)):
        expected = jax.jit(make_schedule(config, 100))(step)
        # Constants are rounded to float32 after the difference of peak and end, arguments before.
        tolerance = 2e-7 if end or decay_type == "staircase" else 0.0
        actual = rate(jnp.float32(0.003), step)
        np.testing.assert_allclose(actual, expected, rtol=tolerance)


def test_make_schedule_without_warmup_starts_at_the_peak() -> None:
    schedule = make_schedule(OptimizerConfig(learning_rate=0.01, warmup_steps=0), num_steps=100)
    assert float(schedule(jnp.int32(0))) == pytest.approx(0.01)


def params_and_grads() -> tuple[Any, list[Any]]:
    rng = np.random.default_rng(0)
    params = {
        "stem": {"kernel": rng.normal(size=(2, 3)), "bias": rng.normal(size=3)},
        "LayerNorm_0": {"scale": rng.normal(size=3)},
    }
    # The first gradients have a norm above 1 and are clipped, the second are not.
    grads = [
        {"stem": {"kernel": rng.normal(size=(2, 3)) * s, "bias": rng.normal(size=3) * s},
         "LayerNorm_0": {"scale": rng.normal(size=3) * s}}
        for s in (5.0, 0.01)
    ]  # fmt: skip
    return params, grads


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {
        f"{a}/{b}": np.asarray(v, np.float64) for a, node in tree.items() for b, v in node.items()
    }


def clip(grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    return {name: g * min(1.0, 1.0 / norm) for name, g in grads.items()}


def numpy_optimizer(name: str, params: Any, all_grads: list[Any], rates: list[float]) -> Any:
    """Computes Adam with decoupled decay (arXiv 1711.05101), or momentum SGD, in float64."""
    p = flat(params)
    m = {k: np.zeros_like(v) for k, v in p.items()}
    v = {k: np.zeros_like(x) for k, x in p.items()}
    for t, (tree, rate) in enumerate(zip(all_grads, rates, strict=True), start=1):
        for k, g in clip(flat(tree)).items():
            if name == "adamw":
                m[k] = 0.9 * m[k] + 0.1 * g
                v[k] = 0.999 * v[k] + 0.001 * g**2
                direction = (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-8)
            else:
                m[k] = 0.9 * m[k] + g
                direction = m[k]
            decay = 0.1 if k.endswith("kernel") else 0.0
            p[k] = p[k] - rate * (direction + decay * p[k])
    return p


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_make_optimizer_equals_numpy_over_two_steps(name: Any) -> None:
    params, all_grads = params_and_grads()
    rates = [0.01, 0.02]
    config = OptimizerConfig(name=name, weight_decay=0.1)
    tx = make_optimizer(config, lambda step: 0.01 * (step + 1), MIXER)
    actual = jax.tree.map(jnp.float32, params)
    state = tx.init(actual)
    for grads in all_grads:
        updates, state = tx.update(jax.tree.map(jnp.float32, grads), state, actual)
        actual = {a: {b: actual[a][b] + updates[a][b] for b in actual[a]} for a in actual}
    expected = numpy_optimizer(name, params, all_grads, rates)
    for key, value in flat(actual).items():
        np.testing.assert_allclose(value, expected[key], rtol=2e-5, atol=1e-7, err_msg=key)


BLOCK_SHAPES = {"kernel": (48, 32), "bias": (32,)}
SHAPES = {"stem": {"kernel": (3, 3, 4), "bias": (4,)}, "head": {"kernel": (32, 2), "bias": (2,)}}
WEIGHT_DECAY = 0.1


def random_tree(shapes: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def stack(params: Any) -> Any:
    """Stacks the parameters of blocks."""
    blocks = [params[name] for name in params if name.startswith("block")]
    rest = {name: node for name, node in params.items() if not name.startswith("block")}
    return rest | {"blocks": jax.tree.map(lambda *arrays: jnp.stack(arrays), *blocks)}


def kernels(tree: Any) -> Any:
    return {node: {name: name == "kernel" for name in tree[node]} for node in tree}


def muon_axes(params: Any) -> Any:
    def axes(node: str, name: str) -> Any:
        is_matrix = node.startswith("block") and name == "kernel"
        return optax.contrib.MuonDimensionNumbers() if is_matrix else None

    return {node: {name: axes(node, name) for name in params[node]} for node in params}


# The optimizers of optax with the same settings, and those that differ from a config's defaults.
ALIASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (
        functools.partial(optax.adamw, b2=0.95, weight_decay=WEIGHT_DECAY, mask=kernels),
        {"b2": 0.95, "weight_decay": WEIGHT_DECAY},
    ),
    "sgd": (functools.partial(optax.sgd, momentum=0.8), {"momentum": 0.8}),
    "lion": (
        functools.partial(optax.lion, weight_decay=WEIGHT_DECAY, mask=kernels),
        {"b2": 0.99, "weight_decay": WEIGHT_DECAY},
    ),
    "lamb": (
        functools.partial(optax.lamb, weight_decay=WEIGHT_DECAY, mask=kernels),
        {"eps": 1e-6, "weight_decay": WEIGHT_DECAY},
    ),
    "muon": (
        functools.partial(
            optax.contrib.muon, consistent_rms=0.2, muon_weight_dimension_numbers=muon_axes
        ),
        {"momentum": 0.95},
    ),
    "adafactor": (
        functools.partial(
            optax.adafactor,
            min_dim_size_to_factor=32,
            multiply_by_parameter_scale=False,
            momentum=0.9,
        ),
        {},
    ),
}


@pytest.mark.parametrize("name", ALIASES)
def test_make_optimizer_equals_optax_and_updates_each_block_separately(name: Any) -> None:
    alias, settings = ALIASES[name]
    shapes = SHAPES | {"block0": BLOCK_SHAPES, "block1": BLOCK_SHAPES}
    start, target = random_tree(shapes, seed=0), random_tree(shapes, seed=1)
    # Blocks whose parameters and gradients have other magnitudes.
    start["block1"] = jax.tree.map(lambda x: 10 * x, start["block1"])
    config = OptimizerConfig(name=name, clip_norm=0.0, **settings)

    def train(tx: optax.GradientTransformation, params: Any, target: Any) -> Any:
        @jax.jit
        def step(params: Any, state: Any) -> Any:
            grads = jax.tree.map(lambda x, y: (x - y) + jnp.sin(3 * x), params, target)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for _ in range(50):
            params, state = step(params, state)
        return params

    actual = train(make_optimizer(config, lambda step: 0.01, MIXER), stack(start), stack(target))
    expected = stack(train(alias(0.01), start, target))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=str(path))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).mean()) > 0.01, actual, stack(start))
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
    ("family", "path", "shape", "matrix"),
    [
        ("mixer", "blocks/token_mixing/Dense_0/kernel", (2, 8, 6), (8, 6)),
        ("vit", "blocks/attention/query/kernel", (2, 8, 2, 3), (8, 6)),
        ("vit", "blocks/attention/out/kernel", (2, 2, 3, 8), (6, 8)),
        ("vit", "blocks/mlp/Dense_0/kernel", (2, 8, 6), (8, 6)),
        ("bit", "block1/unit01/conv2/kernel", (3, 3, 2, 8), (18, 8)),
    ],
)
def test_muon_orthogonalizes_the_matrix_of_each_block(
    family: str, path: str, shape: tuple[int, ...], matrix: tuple[int, int]
) -> None:
    config = OptimizerConfig(name="muon", clip_norm=0.0)
    tx = make_optimizer(config, lambda step: -1.0, get_family(family))
    params = unflatten_params({path: random_tree(shape, seed=0)})
    updates, _ = tx.update(params, tx.init(params), params)
    (update,) = jax.tree.leaves(updates)
    singular_values = np.linalg.svd(np.reshape(update, (-1, *matrix)), compute_uv=False)
    # Five iterations end between 0.7 and 1.2, times the scale of the update.
    scaled = singular_values / (0.2 * max(matrix) ** 0.5)
    assert 0.6 < scaled.min() < scaled.max() < 1.3


@pytest.mark.parametrize("path", ["stem/kernel", "head/kernel", "blocks/LayerNorm_0/scale"])
def test_muon_leaves_all_other_parameters_to_adam(path: str) -> None:
    params = unflatten_params({path: random_tree((3, 5), seed=0)})
    config = OptimizerConfig(name="muon", clip_norm=0.0)
    updates = []
    for tx in (make_optimizer(config, lambda step: 0.1, MIXER), optax.nadam(0.1)):
        updates += jax.tree.leaves(tx.update(params, tx.init(params), params)[0])
    np.testing.assert_array_equal(*updates)


def stacked_params() -> tuple[Any, Any]:
    """Returns the architecture and the parameters of a Mixer of three blocks."""
    sizes = {"num_blocks": 3, "patch_size": 2, "hidden_dim": 4}
    config = MIXER.get_config("custom", **sizes, tokens_mlp_dim=3, channels_mlp_dim=5)
    shapes = unflatten_params(MIXER.param_shapes(config, 4, 2))
    return config, random_tree(shapes, seed=0)


@pytest.mark.parametrize("name", ALIASES)
def test_layer_decay_scales_updates_and_weight_decay(name: Any) -> None:
    architecture, params = stacked_params()
    settings: dict[str, Any] = {"name": name, "clip_norm": 0.0, "weight_decay": 0.1}
    updates = []
    for decay in (1.0, 0.5):
        config = OptimizerConfig(layer_decay=decay, **settings)
        tx = make_optimizer(config, lambda step: 0.1, MIXER, architecture)
        updates.append(tx.update(params, tx.init(params), params)[0])
    factors = {"stem": 0.5**4, "pre_head_layer_norm": 0.5, "head": 1.0}
    for module in updates[0]:
        for plain, scaled in zip(*(jax.tree.leaves(u[module]) for u in updates), strict=True):
            factor = np.array([0.5**3, 0.5**2, 0.5]).reshape(-1, *(1,) * (plain.ndim - 1))
            expected = plain * factors.get(module, factor)
            np.testing.assert_allclose(scaled, expected, rtol=1e-6, err_msg=module)


@pytest.mark.parametrize("name", ALIASES)
def test_arrays_that_are_frozen_as_a_whole_have_no_state(name: Any) -> None:
    architecture, params = stacked_params()
    config = OptimizerConfig(name=name, freeze="stem,blocks,pre_head*")
    tx = make_optimizer(config, lambda step: 0.1, MIXER, architecture)
    state = tx.init(params)
    plain = make_optimizer(OptimizerConfig(name=name), lambda step: 0.1, MIXER)
    expected = plain.init({"head": params["head"]})
    sizes = [sorted(x.size for x in jax.tree.leaves(tree)) for tree in (state, expected)]
    assert sizes[0] == sizes[1]


def test_frozen_parameters_do_not_count_in_the_norm_of_clipping() -> None:
    architecture, params = stacked_params()
    grads = jax.tree.map(jnp.zeros_like, params) | {"head": params["head"]}
    updates = []
    for freeze in ("", "stem"):
        config = OptimizerConfig(name="sgd", freeze=freeze)
        tx = make_optimizer(config, lambda step: 1.0, MIXER, architecture)
        updates.append(tx.update(grads, tx.init(params), params)[0]["head"])
        # The stem's gradient would now be clipped as well.
        grads["stem"] = jax.tree.map(lambda x: 100 * x, params["stem"])
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(updates[0][leaf], updates[1][leaf])
    assert float(optax.tree.norm(updates[1])) == pytest.approx(1)


def test_make_optimizer_with_clip_norm_zero_does_not_clip() -> None:
    params, all_grads = params_and_grads()
    tx = make_optimizer(OptimizerConfig(name="sgd", clip_norm=0.0), lambda step: 1.0, MIXER)
    updates, _ = tx.update(all_grads[0], tx.init(params), params)
    np.testing.assert_allclose(
        flat(updates)["stem/bias"], -flat(all_grads[0])["stem/bias"], rtol=1e-6
    )


def test_weight_decay_mask_is_true_for_kernels() -> None:
    params, _ = params_and_grads()
    mask = weight_decay_mask({**params, "head": {"kernel": 0, "bias": 0}}, MIXER)
    assert mask == {
        "stem": {"kernel": True, "bias": False},
        "LayerNorm_0": {"scale": False},
        "head": {"kernel": True, "bias": False},
    }
