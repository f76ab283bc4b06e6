"""Comparison of BiT with timm: the same logits and gradients from the same files."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mixer_jax.checkpoints.layouts import layout_tensors
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.weights import flatten_params
from mixer_jax.models.bit_config import BitConfig
from mixer_jax.models.registry import get_family

pytestmark = pytest.mark.baselines

FAMILY = get_family("bit")
CONFIGS = {
    "R50x1": FAMILY.get_config("R50x1"),
    "two blocks": BitConfig("2,1", 64),
    "wide": BitConfig("1,1,2", 128),
}


def make_timm_model(torch: Any, timm: Any, config: BitConfig) -> Any:
    """Creates timm's model, in which no parameter has its initial value."""
    variant = FAMILY.infer_variant(config)
    expression = FAMILY.timm_expression(variant, config, (64, 64), 10, "tanh")
    model = eval(expression, {"timm": timm}).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name and "weight" in name), 0.3, generator=rng)
    return model


@pytest.mark.parametrize(
    ("name", "size"), [("R50x1", (64, 64)), ("two blocks", (33, 48)), ("wide", (47, 47))]
)
def test_logits_and_gradients(
    torch: Any, timm: Any, name: str, size: tuple[int, int], tmp_path: Path
) -> None:
    theirs = make_timm_model(torch, timm, CONFIGS[name])
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.numpy() for name, tensor in theirs.state_dict().items()}, path)
    weights = load_checkpoint(path, image_size=size)
    assert weights.model_info.config == CONFIGS[name]
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    cotangent = rng.normal(size=(2, 10)).astype(np.float32)

    def compute(model: Any, dtype: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        batch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(dtype)
        model = model.to(dtype)
        model.zero_grad()
        logits = model(batch)
        (logits * torch.from_numpy(cotangent)).sum().backward()
        grads = {name: p.grad.double().numpy().copy() for name, p in model.named_parameters()}
        return logits.detach().double().numpy(), grads

    logits, grads = compute(theirs, torch.float32)
    _, exact_grads = compute(theirs, torch.float64)
    model = FAMILY.build(CONFIGS[name], 10)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, jnp.asarray(images))
        return jnp.sum(logits * cotangent), logits

    our_grads, our_logits = jax.jit(jax.grad(loss, has_aux=True))(weights.params)
    difference = np.abs(our_logits - logits).max() / logits.std()
    print(f"\n{name}: {difference:.1e} standard deviations of the logits")
    assert difference < 1e-4
    layout = next(layout for layout in FAMILY.weight_layouts() if layout.name == "timm")
    flat = {path: np.asarray(array) for path, array in flatten_params(our_grads)}
    found = dict(layout_tensors(flat, layout))
    assert found.keys() == grads.keys()
    # Rounding that changes the sign of an activation changes gradients: timm's own in float32
    # differ from those in float64 by as much.
    ours, timms = (_largest_error(each, exact_grads) for each in (found, grads))
    print(f"{name}: gradients within {ours:.1e} of float64, timm's float32 within {timms:.1e}")
    assert ours < max(3 * timms, 1e-4)


def _largest_error(grads: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> float:
    """Returns the largest difference of a parameter's gradient, relative to its norm."""
    norm = np.linalg.norm
    return max(float(norm(grads[name] - exact[name]) / norm(exact[name])) for name in exact)


@pytest.mark.parametrize("variant", ["R50x1", "R101x1"])
def test_timms_files_have_our_names_and_shapes(torch: Any, timm: Any, variant: str) -> None:
    config = FAMILY.get_config(variant)
    expression = FAMILY.timm_expression(variant, config, (224, 224), 7, "tanh")
    model = eval(expression, {"timm": timm})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layout = next(layout for layout in FAMILY.weight_layouts() if layout.name == "timm")
    flat = {
        path: np.broadcast_to(np.float32(0), shape)
        for path, shape in FAMILY.param_shapes(config, 224, 7).items()
    }
    assert {name: tensor.shape for name, tensor in layout_tensors(flat, layout)} == shapes
