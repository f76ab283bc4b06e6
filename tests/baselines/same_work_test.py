"""Tests that timm, as the benchmark trains it, does the same work as ours."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax.benchmarks.contestants import EAGER, OURS, Contestant, Setting
from mixer_jax.benchmarks.made_up import make_batch, make_state
from mixer_jax.benchmarks.with_jax import make_work
from mixer_jax.models.mixer_config import VARIANTS, get_config, num_params
from tests.baselines.timm_test import export
from tests.helpers.random_weights import random_weights

pytestmark = pytest.mark.baselines

SETTING = Setting("train", "S/32", 64, 10, "float32", 4)


def test_losses_are_ours_over_three_steps(torch: Any, timm: Any, tmp_path: Path) -> None:
    from mixer_jax.benchmarks.with_torch import TorchSide

    weights = random_weights(VARIANTS["S/32"], (64, 64), gelu="exact")
    device = jax.devices()[0]
    batch = make_batch(SETTING, SETTING.batch_size, device)
    ours = make_work(Contestant(OURS, OURS, others=[("gelu", "exact")]), SETTING, device)
    state = make_state(jax.eval_shape(ours.make_state), device)
    state = state._replace(params=jax.tree.map(jax.numpy.asarray, weights.params))

    side = TorchSide(SETTING, "cpu")
    model = side.make_model()
    timm.models.load_checkpoint(model, str(export(weights, tmp_path / "ours.safetensors")))
    step = side.training(model, model)
    images = torch.from_numpy(np.asarray(batch["image"]).transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(np.array(batch["label"], np.int64))

    losses, their_losses = [], []
    for _ in range(3):
        state, metrics = ours.function(state, batch)
        losses.append(float(metrics["loss"]))
        their_losses.append(float(step(images, labels)))
    print(f"\nours {losses}, timm {their_losses}")
    assert len(set(losses)) == 3
    np.testing.assert_allclose(their_losses, losses, rtol=1e-4)


@pytest.mark.parametrize("variant", ["S/32", "H/14"])
def test_timms_models_are_the_papers(variant: str, torch: Any, timm: Any) -> None:
    from mixer_jax.benchmarks.timm_library import create_timm_mixer

    with torch.device("meta"):
        model = create_timm_mixer(variant, 224, 1000)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == num_params(get_config(variant), 224, 1000)


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_peer_is_timed(mode: str, dtype: str, torch: Any, timm: Any) -> None:
    from mixer_jax.benchmarks.with_torch import TorchSide

    side = TorchSide(SETTING._replace(mode=mode, dtype=dtype, batch_size=1), "cpu")
    assert side.facts()["timm"] == timm.__version__
    costs = side.prepare(Contestant(EAGER, EAGER))
    assert costs.first_step_seconds > 0
    assert side.time(EAGER) > 0
    assert bool(side.latencies(EAGER)) == (mode == "infer")
