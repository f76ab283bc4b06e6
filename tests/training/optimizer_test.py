"""Tests of the recipe's optimizer against arithmetic by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.training.optimizer import make_optimizer, make_schedule, weight_decay_mask

SETTINGS: dict[str, Any] = {
    "weight_decay": 0.1,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "momentum": 0.9,
    "clip_norm": 1.0,
}


def paper_schedule(step: int, num_steps: int) -> float:
    """PAPER: linear warmup over 10,000 steps, then linear decay to zero."""
    if step < 10_000:
        return 1e-3 * step / 10_000
    return 1e-3 * (num_steps - step) / (num_steps - 10_000)


@pytest.mark.parametrize("step", [0, 1, 9_999, 10_000, 10_001, 51_448, 92_895, 92_896])
def test_schedule_is_the_papers(step: int) -> None:
    num_steps = 92_897
    schedule = make_schedule(
        num_steps,
        learning_rate=1e-3,
        warmup_steps=10_000,
        decay_type="linear",
        end_learning_rate=0.0,
    )
    expected = paper_schedule(step, num_steps)
    assert float(schedule(jnp.int32(step))) == pytest.approx(expected, rel=1e-5, abs=1e-10)


@pytest.mark.parametrize(
    ("decay", "end", "at"),
    [
        ("cosine", 0.0, {0: 0.0, 5: 0.005, 10: 0.01, 60: 0.005, 110: 0.0}),
        ("cosine", 0.002, {10: 0.01, 60: 0.006, 110: 0.002}),
        ("linear", 0.002, {10: 0.01, 35: 0.008, 110: 0.002}),
        ("none", 0.0, {0: 0.0, 10: 0.01, 109: 0.01}),
    ],
)
def test_decays_reach_their_stated_end(decay: str, end: float, at: dict[int, float]) -> None:
    schedule = make_schedule(
        110, learning_rate=0.01, warmup_steps=10, decay_type=decay, end_learning_rate=end
    )
    for step, expected in at.items():
        assert float(schedule(jnp.int32(step))) == pytest.approx(expected, abs=1e-7)


def test_no_warmup_begins_at_the_full_rate() -> None:
    schedule = make_schedule(
        100, learning_rate=0.01, warmup_steps=0, decay_type="linear", end_learning_rate=0.0
    )
    assert float(schedule(jnp.int32(0))) == pytest.approx(0.01)


def params_and_grads() -> tuple[Any, list[Any]]:
    rng = np.random.default_rng(0)
    params = {
        "stem": {"kernel": rng.normal(size=(2, 3)), "bias": rng.normal(size=3)},
        "LayerNorm_0": {"scale": rng.normal(size=3)},
    }
    # The first gradient is longer than 1 and is clipped, the second is not.
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


def hand_written(name: str, params: Any, all_grads: list[Any], rates: list[float]) -> Any:
    """Adam with decoupled decay (arXiv 1711.05101), or momentum SGD, in float64 NumPy."""
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
def test_two_steps_equal_a_computation_by_hand(name: str) -> None:
    params, all_grads = params_and_grads()
    rates = [0.01, 0.02]
    tx = make_optimizer(lambda step: 0.01 * (step + 1), name=name, **SETTINGS)
    actual = jax.tree.map(jnp.float32, params)
    state = tx.init(actual)
    for grads in all_grads:
        updates, state = tx.update(jax.tree.map(jnp.float32, grads), state, actual)
        actual = {a: {b: actual[a][b] + updates[a][b] for b in actual[a]} for a in actual}
    expected = hand_written(name, params, all_grads, rates)
    for key, value in flat(actual).items():
        np.testing.assert_allclose(value, expected[key], rtol=2e-5, atol=1e-7, err_msg=key)


def test_no_clipping_when_the_norm_is_zero() -> None:
    params, all_grads = params_and_grads()
    settings = {**SETTINGS, "clip_norm": 0.0, "weight_decay": 0.0}
    tx = make_optimizer(lambda step: 1.0, name="momentum", **settings)
    updates, _ = tx.update(all_grads[0], tx.init(params), params)
    np.testing.assert_allclose(
        flat(updates)["stem/bias"], -flat(all_grads[0])["stem/bias"], rtol=1e-6
    )


def test_decay_spares_biases_and_layer_norms() -> None:
    params, _ = params_and_grads()
    mask = weight_decay_mask({**params, "head": {"kernel": 0, "bias": 0}})
    assert mask == {
        "stem": {"kernel": True, "bias": False},
        "LayerNorm_0": {"scale": False},
        "head": {"kernel": True, "bias": False},
    }
