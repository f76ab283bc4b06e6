"""Comparison of Vision Transformers with timm's: logits and gradients of the same weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.models.registry import create_model
from mixer_jax.models.vit_config import VitConfig

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


def convert(tensors: dict[str, np.ndarray], config: VitConfig) -> dict[str, Any]:
    """Converts timm's tensors, or their gradients, to the tree of our parameters."""

    def dense(name: str) -> dict[str, np.ndarray]:
        return {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def mlp(name: str) -> dict[str, Any]:
        return {"Dense_0": dense(f"{name}.fc1"), "Dense_1": dense(f"{name}.fc2")}

    def attention(name: str, merged: dict[str, tuple[str, ...]]) -> dict[str, Any]:
        heads = (config.num_heads, config.hidden_dim // config.num_heads)
        found = {}
        for source, parts in merged.items():
            weights = np.split(tensors[f"{name}.{source}.weight"], len(parts))
            biases = np.split(tensors[f"{name}.{source}.bias"], len(parts))
            for part, weight, bias in zip(parts, weights, biases, strict=True):
                kernel = weight.T.reshape(config.hidden_dim, *heads)
                found[part] = {"kernel": kernel, "bias": bias.reshape(heads)}
        out = dense(f"{name}.proj")
        return found | {"out": out | {"kernel": out["kernel"].reshape(*heads, -1)}}

    blocks = [
        {
            "LayerNorm_0": norm(f"blocks.{i}.norm1"),
            "attention": attention(f"blocks.{i}.attn", {"qkv": ("query", "key", "value")}),
            "LayerNorm_1": norm(f"blocks.{i}.norm2"),
            "mlp": mlp(f"blocks.{i}.mlp"),
        }
        for i in range(config.num_blocks)
    ]
    stem = tensors["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    params: dict[str, Any] = {
        "stem": {"kernel": stem, "bias": tensors["patch_embed.proj.bias"]},
        "pos_embedding": tensors["pos_embed"],
        "blocks": jax.tree.map(lambda *arrays: np.stack(arrays), *blocks),
        "encoder_norm": norm("norm"),
        "head": dense("head"),
    }
    if config.pooling == "token":
        params["cls"] = tensors["cls_token"]
    if config.pooling == "map":
        params["map_head"] = {
            "probe": tensors["attn_pool.latent"],
            "attention": attention("attn_pool", {"q": ("query",), "kv": ("key", "value")}),
            "LayerNorm_0": norm("attn_pool.norm"),
            "mlp": mlp("attn_pool.mlp"),
        }
    return params


def compare(torch: Any, theirs: Any, ours: Any, height: int, width: int) -> None:
    """Compares logits and the gradients of a function of them."""
    randomize(torch, theirs)
    images = np.random.default_rng(0).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    logits = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    torch.sin(logits).sum().backward()
    expected = logits.detach().numpy()
    tensors = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}

    def loss(params: Any) -> Any:
        found = ours.apply({"params": params}, jnp.asarray(images))
        return jnp.sin(found).sum(), found

    params = convert(tensors, ours.config)
    (_, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()
    converted = convert(gradients, ours.config)
    scale = np.sqrt(np.mean(np.concatenate([g.ravel() for g in jax.tree.leaves(converted)]) ** 2))
    for (path, actual), gradient in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(converted), strict=True
    ):
        # The gradient of keys' biases is zero but for rounding.
        tolerance = TOLERANCE * max(gradient.std(), scale)
        assert np.abs(actual - gradient).max() < 10 * tolerance, path


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("vit_tiny_patch16_224", "Ti/16"),
        ("vit_small_patch32_224", "S/32"),
        ("vit_base_patch32_224", "B/32"),
    ],
)
def test_logits_and_gradients_are_those_of_timm(
    name: str, variant: str, torch: Any, timm: Any
) -> None:
    theirs = timm.create_model(name, img_size=96, num_classes=10)
    compare(torch, theirs, create_model(f"ViT-{variant}", 10, gelu="exact"), 96, 96)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_poolings_and_gelus_are_those_of_timm(
    pooling: str, gelu: Any, torch: Any, timm: Any
) -> None:
    act_layer = {"act_layer": timm.layers.GELUTanh} if gelu == "tanh" else {}
    theirs = timm.models.vision_transformer.VisionTransformer(
        **SMALL, **POOLINGS[pooling], **act_layer, num_heads=3, mlp_ratio=2, num_classes=10
    )
    config = VitConfig(2, 16, 24, 48, 3, pooling=pooling)  # type: ignore[arg-type]
    ours = create_model("ViT-custom", 10, gelu=gelu, **vars(config))
    compare(torch, theirs, ours, 32, 48)
