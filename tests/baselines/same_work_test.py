"""Tests that timm, as the benchmark trains it, does the same work as mixer_jax."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax.benchmarks.candidates import MIXER_JAX, TIMM, Candidate, Workload
from mixer_jax.benchmarks.jax_runner import make_step, synthetic_batch, synthetic_state
from mixer_jax.checkpoints.formats import write_safetensors
from mixer_jax.checkpoints.layouts import layout_tensors
from mixer_jax.checkpoints.weights import flatten_params
from mixer_jax.models import bit_config, bit_family, mixer_config, vit_config
from mixer_jax.models.registry import get_family, parse_model_name

pytestmark = pytest.mark.baselines

WORKLOAD = Workload("train", "Mixer-tiny", 64, 10, "float32", 4)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds small variants."""
    mixer = mixer_config.MixerConfig(2, 16, 64, 32, 128)
    monkeypatch.setitem(mixer_config.VARIANTS, "tiny", mixer)
    monkeypatch.setitem(vit_config.VARIANTS, "tiny", vit_config.VitConfig(2, 16, 64, 128, 2))
    monkeypatch.setitem(bit_config.VARIANTS, "tiny", bit_config.BitConfig("1,1", 64))
    monkeypatch.setattr(bit_family, "_NOT_IN_TIMM", (*bit_family._NOT_IN_TIMM, "tiny"))


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("Mixer-tiny", {"gelu": "exact"}),
        ("ViT-tiny", {"gelu": "exact"}),
        # Few units: without warmup, rounding grows with the depth.
        ("BiT-tiny", {}),
    ],
)
def test_timm_has_the_same_losses_over_three_steps(
    model: str,
    overrides: Any,
    torch: Any,
    timm: Any,
    tmp_path: Path,
) -> None:
    from mixer_jax.benchmarks.torch_runner import TorchRunner

    workload, device = WORKLOAD._replace(model=model), jax.devices()[0]
    batch = synthetic_batch(workload, workload.batch_size, device)
    ours = make_step(Candidate(MIXER_JAX, MIXER_JAX, overrides), workload, device)
    state = synthetic_state(jax.eval_shape(ours.init_state), device)
    path = tmp_path / "ours.safetensors"
    layouts = {layout.name: layout for layout in workload.family.weight_layouts()}
    flat = {name: np.asarray(array) for name, array in flatten_params(state.params)}
    write_safetensors(str(path), layout_tensors(flat, layouts["timm"]), {})

    runner = TorchRunner(workload, "cpu")
    timm_model = runner.make_model()
    timm.models.load_checkpoint(timm_model, str(path))
    step = runner.make_train_step(timm_model, timm_model)
    images = torch.from_numpy(np.asarray(batch["image"]).transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(np.array(batch["label"], np.int64))

    losses, timm_losses = [], []
    for _ in range(3):
        state, metrics = ours.function(state, batch, *ours.args)
        losses.append(float(metrics["loss"]))
        timm_losses.append(float(step(images, labels)))
    print(f"\nmixer_jax {losses}, timm {timm_losses}")
    assert len(set(losses)) == 3
    np.testing.assert_allclose(timm_losses, losses, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["Mixer-S/32", "Mixer-H/14", "ViT-S/32", "ViT-H/14", "BiT-R50x1", "BiT-R152x1"]
)
def test_timm_has_the_parameters_of_the_paper(name: str, torch: Any, timm: Any) -> None:
    from mixer_jax.benchmarks.torch_runner import create_timm_model

    with torch.device("meta"):
        model = create_timm_model(Workload("infer", name, 224, 1000, "float32", 1))
    count = sum(parameter.numel() for parameter in model.parameters())
    family_name, variant = parse_model_name(name)
    family = get_family(family_name)
    assert count == family.num_params(family.variants[variant], 224, 1000)


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runner_times_timm(mode: str, dtype: str, torch: Any, timm: Any) -> None:
    from mixer_jax.benchmarks.torch_runner import TorchRunner

    runner = TorchRunner(WORKLOAD._replace(mode=mode, dtype=dtype, batch_size=1), "cpu")
    candidate = Candidate(TIMM, TIMM)
    assert runner.prepare(candidate).first_step_seconds > 0
    assert runner.measure_step(candidate) > 0
    assert bool(runner.measure_latencies(candidate)) == (mode == "infer")
