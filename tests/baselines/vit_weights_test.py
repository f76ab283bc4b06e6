"""Comparisons of ViT's weights with timm: its files give the same weights and logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax.checkpoints.export import export_weights
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.convert import timm_snippet
from mixer_jax.inference import Classifier, load_pretrained
from tests.baselines.timm_test import (
    assert_logits_close,
    make_timm_model,
    random_images,
    timm_logits,
)

pytestmark = pytest.mark.baselines

# Small models of each pooling that both libraries have.
CUSTOM = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch32_384": {"num_classes": 10},
    "token": CUSTOM,
    "gap": CUSTOM | {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "map": CUSTOM | {"global_pool": "map", "class_token": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_weights_round_trip_from_timm(name: str, torch: Any, timm: Any, tmp_path: Path) -> None:
    settings = MODELS[name]
    base = name if name.startswith("vit") else "vit_tiny_patch16_224"
    model = make_timm_model(torch, timm, base, **settings)
    folder = tmp_path / "theirs"
    timm.models.save_for_hf(model, folder, safe_serialization=True, model_args=settings)
    classifier = load_pretrained(str(folder), dtype="float32")
    info = classifier.model_info
    size = settings.get("img_size", int(name[-3:]) if name.startswith("vit") else 0)
    images = random_images(size)
    assert info.image_size == (size, size)
    assert_logits_close(classifier(images), timm_logits(torch, model, images))
    assert (info.gelu, info.eval_crop) == ("exact", "bicubic")
    assert info.eval_crop_fraction == (1.0 if size == 384 else 0.9)

    path = str(tmp_path / "ours.safetensors")
    export_weights(load_checkpoint(str(folder)), "timm", path)
    namespace: dict[str, Any] = {}
    exec("\n".join(timm_snippet(info, path)), namespace)
    copy = namespace["model"].eval()
    tensors = copy.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors.pop(key)), key
    assert not tensors
    assert_logits_close(timm_logits(torch, copy, images), timm_logits(torch, model, images))


def test_normalization_is_folded_into_the_stem(torch: Any, timm: Any, tmp_path: Path) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model = make_timm_model(torch, timm, "vit_tiny_patch16_224", **CUSTOM)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True, model_args=CUSTOM)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": mean, "std": std}
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = random_images(64)
    normalized = (((images + 1) / 2 - np.array(mean)) / np.array(std)).astype(np.float32)
    logits = Classifier(load_checkpoint(str(tmp_path)), "float32")(images)
    assert_logits_close(logits, timm_logits(torch, model, normalized))
