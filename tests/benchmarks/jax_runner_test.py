"""Tests that mixer_jax and the reference do the same work, and that their programs are timed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.benchmarks.candidates import MIXER_JAX, REFERENCE, Candidate, Workload
from mixer_jax.benchmarks.jax_runner import (
    JaxRunner,
    make_step,
    synthetic_batch,
    synthetic_state,
)
from mixer_jax.models import bit_config, mixer_config, vit_config

WORKLOAD = Workload("train", "Mixer-tiny", 32, 10, "float32", 8)
MODELS = ("Mixer-tiny", "ViT-tiny", "BiT-tiny")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds a small variant of each family."""
    mixer = mixer_config.MixerConfig(3, 8, 24, 12, 48)
    monkeypatch.setitem(mixer_config.VARIANTS, "tiny", mixer)
    monkeypatch.setitem(vit_config.VARIANTS, "tiny", vit_config.VitConfig(3, 8, 24, 48, 3))
    monkeypatch.setitem(bit_config.VARIANTS, "tiny", bit_config.BitConfig("2,1", 8))


def to_reference(params: dict[str, Any]) -> dict[str, Any]:
    """Converts parameters of a model to those of its reference, whose blocks are not stacked."""
    blocks = params.get("blocks", {})
    num_blocks = len(jax.tree.leaves(blocks)[0]) if blocks else 0
    unstacked = {
        f"block_{index}": jax.tree.map(lambda x, index=index: x[index], blocks)
        for index in range(num_blocks)
    }
    return {name: value for name, value in params.items() if name != "blocks"} | unstacked


# A step changes BiT's loss by 4 %. Adam turns the rounding of tiny gradients into updates: 8e-5.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "tolerance"), [("Mixer-tiny", 1e-5), ("ViT-tiny", 1e-5), ("BiT-tiny", 4e-4)]
)
def test_reference_has_the_same_losses_over_three_steps(model: str, tolerance: float) -> None:
    device, workload = jax.devices()[0], WORKLOAD._replace(model=model)
    batch = synthetic_batch(workload, workload.batch_size, device)
    ours, reference = (
        make_step(Candidate(name, name), workload, device) for name in (MIXER_JAX, REFERENCE)
    )
    state = synthetic_state(jax.eval_shape(ours.init_state), device)
    _, opt_state = synthetic_state(jax.eval_shape(reference.init_state), device)
    # A copy, because the step donates its state.
    reference_state = (jax.tree.map(jnp.copy, to_reference(state.params)), opt_state)
    losses, reference_losses = [], []
    for _ in range(3):
        state, metrics = ours.function(state, batch, *ours.args)
        losses.append(float(metrics["loss"]))
        reference_state, metrics = reference.function(reference_state, batch)
        reference_losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3
    np.testing.assert_allclose(reference_losses, losses, rtol=tolerance)


@pytest.mark.parametrize("model", MODELS)
def test_reference_has_the_same_logits(model: str) -> None:
    device, train = jax.devices()[0], WORKLOAD._replace(model=model)
    workload = train._replace(mode="infer")
    batch = synthetic_batch(workload, workload.batch_size, device)
    train_state = make_step(Candidate(MIXER_JAX, MIXER_JAX), train, device).init_state
    params = synthetic_state(jax.eval_shape(train_state), device).params
    ours = make_step(Candidate(MIXER_JAX, MIXER_JAX), workload, device)
    reference = make_step(Candidate(REFERENCE, REFERENCE), workload, device)
    logits = ours.function(params, batch)
    assert float(jnp.std(logits)) > 0.1
    shapes = jax.eval_shape(reference.init_state)
    reference_params = to_reference(params)
    assert jax.tree.map(jnp.shape, reference_params) == jax.tree.map(jnp.shape, shapes)
    reference_logits = reference.function(reference_params, batch)
    np.testing.assert_allclose(reference_logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_runner_times_all_candidates(mode: str) -> None:
    runner = JaxRunner(WORKLOAD._replace(mode=mode), jax.devices()[:1])
    for name in (MIXER_JAX, REFERENCE):
        candidate = Candidate(name, name)
        costs = runner.prepare(candidate)
        assert costs.first_step_seconds > (costs.compile_seconds or 0) > 0
        assert runner.measure_step(candidate) > 0
        assert bool(runner.measure_latencies(candidate)) == (mode == "infer")
    assert runner.images_per_second(Candidate(MIXER_JAX, MIXER_JAX), 2) > 0
