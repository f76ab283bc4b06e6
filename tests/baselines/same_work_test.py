"""Tests that timm, as the benchmark trains it, does the same work as mixer_jax."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax.benchmarks.candidates import MIXER_JAX, TIMM, Candidate, Workload
from mixer_jax.benchmarks.jax_runner import make_step, synthetic_batch, synthetic_state
from mixer_jax.models.mixer_config import VARIANTS
from mixer_jax.models.registry import get_family
from tests.helpers.random_weights import random_weights, save_safetensors

pytestmark = pytest.mark.baselines

WORKLOAD = Workload("train", "Mixer-S/32", 64, 10, "float32", 4)


def test_timm_has_the_same_losses_over_three_steps(torch: Any, timm: Any, tmp_path: Path) -> None:
    from mixer_jax.benchmarks.torch_runner import TorchRunner

    weights = random_weights(VARIANTS["S/32"], (64, 64), gelu="exact")
    device = jax.devices()[0]
    batch = synthetic_batch(WORKLOAD, WORKLOAD.batch_size, device)
    ours = make_step(Candidate(MIXER_JAX, MIXER_JAX, {"gelu": "exact"}), WORKLOAD, device)
    state = synthetic_state(jax.eval_shape(ours.init_state), device)
    state = state._replace(params=jax.tree.map(jax.numpy.asarray, weights.params))

    runner = TorchRunner(WORKLOAD, "cpu")
    model = runner.make_model()
    timm.models.load_checkpoint(model, save_safetensors(weights, tmp_path / "ours.safetensors"))
    step = runner.make_train_step(model, model)
    images = torch.from_numpy(np.asarray(batch["image"]).transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(np.array(batch["label"], np.int64))

    losses, timm_losses = [], []
    for _ in range(3):
        state, metrics = ours.function(state, batch)
        losses.append(float(metrics["loss"]))
        timm_losses.append(float(step(images, labels)))
    print(f"\nmixer_jax {losses}, timm {timm_losses}")
    assert len(set(losses)) == 3
    np.testing.assert_allclose(timm_losses, losses, rtol=1e-4)


@pytest.mark.parametrize("variant", ["S/32", "H/14"])
def test_timm_has_the_parameters_of_the_paper(variant: str, torch: Any, timm: Any) -> None:
    from mixer_jax.benchmarks.torch_runner import create_timm_model

    with torch.device("meta"):
        model = create_timm_model(Workload("infer", f"Mixer-{variant}", 224, 1000, "float32", 1))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == get_family("mixer").num_params(VARIANTS[variant], 224, 1000)


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runner_times_timm(mode: str, dtype: str, torch: Any, timm: Any) -> None:
    from mixer_jax.benchmarks.torch_runner import TorchRunner

    runner = TorchRunner(WORKLOAD._replace(mode=mode, dtype=dtype, batch_size=1), "cpu")
    candidate = Candidate(TIMM, TIMM)
    assert runner.prepare(candidate).first_step_seconds > 0
    assert runner.measure_step(candidate) > 0
    assert bool(runner.measure_latencies(candidate)) == (mode == "infer")
