"""Comparison of Vision Transformers with timm's: logits and gradients from the same files."""

import json
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
from mixer_jax.models.registry import create_model
from mixer_jax.models.vit_config import VitConfig
from mixer_jax.models.vit_layouts import TIMM

pytestmark = pytest.mark.baselines

TOLERANCE = 1e-4  # Relative to the standard deviation.
# A small model, for the kinds of pooling, on images that are not square.
SMALL: dict[str, Any] = {"img_size": (32, 48), "patch_size": 16, "embed_dim": 24, "depth": 2}
POOLINGS: dict[str, Any] = {
    "token": {},
    "gap": {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "map": {"global_pool": "map", "class_token": False, "fc_norm": False},
}


def randomize(torch: Any, model: Any) -> Any:
    """Sets all parameters to values that are not their initial ones."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim == 2 else 0.3
            parameter.normal_(0.0, scale, generator=rng)
            if "norm" in key and key.endswith("weight"):
                parameter += 1.0
    return model.eval()


def compare(torch: Any, theirs: Any, ours: Any, size: Any, folder: Path) -> None:
    """Compares logits and the gradients of a function of them."""
    randomize(torch, theirs)
    path = folder / "model.safetensors"
    save_file({name: tensor.numpy() for name, tensor in theirs.state_dict().items()}, path)
    settings = {"model_args": {"num_heads": ours.config.num_heads}}
    (folder / "config.json").write_text(json.dumps(settings))
    weights = load_checkpoint(path, image_size=size)
    assert weights.model_info.config == ours.config
    images = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)

    def compute(dtype: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        model = theirs.to(dtype)
        model.zero_grad()
        logits = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(dtype))
        torch.sin(logits).sum().backward()
        grads = {name: p.grad.double().numpy().copy() for name, p in model.named_parameters()}
        return logits.detach().double().numpy(), grads

    def loss(params: Any) -> Any:
        found = ours.apply({"params": params}, jnp.asarray(images))
        return jnp.sin(found).sum(), found

    logits, grads = compute(torch.float32)
    _, exact_grads = compute(torch.float64)
    our_grads, our_logits = jax.jit(jax.grad(loss, has_aux=True))(weights.params)
    assert np.abs(our_logits - logits).max() < TOLERANCE * logits.std()
    flat = {path: np.asarray(array) for path, array in flatten_params(our_grads)}
    found = dict(layout_tensors(flat, TIMM))
    assert found.keys() == grads.keys()
    # The gradient of keys' biases is zero but for rounding.
    scale = np.sqrt(np.mean(np.concatenate([g.ravel() for g in exact_grads.values()]) ** 2))

    def error(actual: Any, expected: Any) -> float:
        differences = (
            np.abs(actual[name] - expected[name]).max() / max(exact_grads[name].std(), scale)
            for name in expected
        )
        return float(max(differences))

    print(
        f"\ngradients differ by {error(found, grads):.1e}; from float64, ours by "
        f"{error(found, exact_grads):.1e} and timm's by {error(grads, exact_grads):.1e}"
    )
    assert error(found, grads) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("vit_tiny_patch16_224", "Ti/16"),
        ("vit_small_patch32_224", "S/32"),
        ("vit_base_patch32_224", "B/32"),
    ],
)
def test_logits_and_gradients_are_those_of_timm(
    name: str, variant: str, torch: Any, timm: Any, tmp_path: Path
) -> None:
    theirs = timm.create_model(name, img_size=96, num_classes=10)
    ours = create_model(f"ViT-{variant}", 10, gelu="exact")
    compare(torch, theirs, ours, (96, 96), tmp_path)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_poolings_and_gelus_are_those_of_timm(
    pooling: str, gelu: Any, torch: Any, timm: Any, tmp_path: Path
) -> None:
    act_layer = {"act_layer": timm.layers.GELUTanh} if gelu == "tanh" else {}
    theirs = timm.models.vision_transformer.VisionTransformer(
        **SMALL, **POOLINGS[pooling], **act_layer, num_heads=3, mlp_ratio=2, num_classes=10
    )
    config = VitConfig(2, 16, 24, 48, 3, pooling=pooling)  # type: ignore[arg-type]
    ours = create_model("ViT-custom", 10, gelu=gelu, **vars(config))
    compare(torch, theirs, ours, (32, 48), tmp_path)
