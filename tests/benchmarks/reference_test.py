"""Tests that the reference does the same work as ours: the same losses, step after step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.benchmarks.contestants import OURS, REFERENCE, Contestant, Setting
from mixer_jax.benchmarks.conversion import to_reference
from mixer_jax.benchmarks.made_up import make_batch, make_state
from mixer_jax.benchmarks.with_jax import JaxSide, make_work
from mixer_jax.models.mixer_config import VARIANTS, MixerConfig

SETTING = Setting("train", "tiny", 32, 10, "float32", 8)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mixer of no paper."""
    monkeypatch.setitem(VARIANTS, "tiny", MixerConfig(3, 8, 24, 12, 48))


def test_losses_are_ours_over_three_steps() -> None:
    device = jax.devices()[0]
    batch = make_batch(SETTING, SETTING.batch_size, device)
    ours, reference = (
        make_work(Contestant(kind, kind), SETTING, device) for kind in (OURS, REFERENCE)
    )
    state = make_state(jax.eval_shape(ours.make_state), device)
    _, opt_state = make_state(jax.eval_shape(reference.make_state), device)
    # A copy, for the step uses up what it is given.
    their_state = (jax.tree.map(jnp.copy, to_reference(state.params)), opt_state)
    losses, their_losses = [], []
    for _ in range(3):
        state, metrics = ours.function(state, batch)
        losses.append(float(metrics["loss"]))
        their_state, their_metrics = reference.function(their_state, batch)
        their_losses.append(float(their_metrics["loss"]))
    print(losses, their_losses)
    assert len(set(losses)) == 3
    np.testing.assert_allclose(their_losses, losses, rtol=1e-5)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_all_of_jaxs_are_timed(mode: str) -> None:
    side = JaxSide(SETTING._replace(mode=mode), jax.devices()[:1])
    for kind in (OURS, REFERENCE):
        costs = side.prepare(Contestant(kind, kind))
        assert costs.first_step_seconds > (costs.compile_seconds or 0) > 0
        assert side.time(kind) > 0
        assert bool(side.latencies(kind)) == (mode == "infer")
    assert side.rate(Contestant(OURS, OURS), 2) > 0
