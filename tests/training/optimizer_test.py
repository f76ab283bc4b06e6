"""Tests of schedule and optimizer against formulas in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
            if name == "adam":
                m[k] = 0.9 * m[k] + 0.1 * g
                v[k] = 0.999 * v[k] + 0.001 * g**2
                direction = (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-8)
            else:
                m[k] = 0.9 * m[k] + g
                direction = m[k]
            decay = 0.1 if k.endswith("kernel") else 0.0
            p[k] = p[k] - rate * (direction + decay * p[k])
    return p


@pytest.mark.parametrize("name", ["adam", "momentum"])
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


def test_make_optimizer_with_clip_norm_zero_does_not_clip() -> None:
    params, all_grads = params_and_grads()
    tx = make_optimizer(OptimizerConfig(name="momentum", clip_norm=0.0), lambda step: 1.0, MIXER)
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
