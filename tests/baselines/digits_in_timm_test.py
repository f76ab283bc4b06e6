"""Export to timm: a run, fine-tuned at a larger image size, predicts the same in timm."""

import dataclasses
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
import pytest

from mixer_jax.checkpoints.export import export_weights
from mixer_jax.checkpoints.load import load_checkpoint
from mixer_jax.checkpoints.weights import PretrainedWeights
from mixer_jax.convert import timm_snippet
from mixer_jax.data.decode import decode
from mixer_jax.data.registry import open_dataset
from mixer_jax.inference import load_pretrained
from mixer_jax.models.bit_config import BitConfig
from mixer_jax.models.mixer_config import VARIANTS, MixerConfig
from mixer_jax.models.registry import get_family
from mixer_jax.models.vit_config import VitConfig
from mixer_jax.training.loop import train_and_evaluate
from tests.helpers.random_weights import random_weights
from tests.helpers.tiny_run import small_config

pytestmark = pytest.mark.baselines
# 51 / 21 · 21 is just below 51 in floating point.
VIT = VitConfig(num_blocks=2, patch_size=14, hidden_dim=21, mlp_dim=51, num_heads=3)
RUN: dict[str, Any] = {
    "model__channels_mlp_dim": 64,
    "model__hidden_dim": 32,
    "model__stochastic_depth": 0.0,
    "recipe__mixup": 0.0,
    "batch_size": 128,
    "log_every_steps": 50,
    "checkpoint__every_steps": 0,
    "evals__test__every_steps": 0,
    "tensorboard": False,
}


def load_in_timm(timm: Any, weights: PretrainedWeights, path: Path) -> Any:
    """Exports weights and runs the code that the convert command prints to load them in timm."""
    export_weights(weights, "timm", str(path))
    names: dict[str, Any] = {}
    exec("\n".join(timm_snippet(weights.model_info, str(path))), names)
    return names["model"].eval()


def timm_logits(torch: Any, model: Any, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def test_digits_from_training_to_timm(
    digits_dir: str, tmp_path: Path, torch: Any, timm: Any
) -> None:
    pretrained, tuned = str(tmp_path / "pretrained"), str(tmp_path / "tuned")
    train_and_evaluate(small_config(digits_dir, num_steps=150, **RUN), pretrained)
    config = small_config(digits_dir, num_steps=100, image_size=32, init_from=pretrained, **RUN)
    metrics = train_and_evaluate(config, tuned).scores["test"].as_dict()
    assert metrics["num_examples"] == 360
    assert metrics["top1"] > 0.85
    weights = load_checkpoint(tuned)
    assert weights.model_info.config.tokens_mlp_dim == 4 * 8

    files, pixels, labels = [], [], []
    for index, example in enumerate(open_dataset("digits/all", "test", digits_dir).examples):
        files.append(tmp_path / f"{index}.png")
        files[-1].write_bytes(example["image"])
        image = cv2.resize(decode(example["image"]), (32, 32), interpolation=cv2.INTER_LINEAR)
        pixels.append(image.astype(np.float32) / 127.5 - 1.0)
        labels.append(example["labels"][0])
    model = load_in_timm(timm, weights, tmp_path / "digits.safetensors")
    expected = timm_logits(torch, model, np.stack(pixels)).argmax(1)
    for source in (tuned, str(tmp_path / "digits.safetensors")):
        predictions = load_pretrained(source, dtype="float32").predict(files, 1, batch_size=512)
        classes = [prediction.classes[0] for prediction in predictions]
        assert [entry.class_index for entry in classes] == expected.tolist()
        assert [entry.name for entry in classes] == [str(index) for index in expected]
        accuracy = np.mean([entry.class_index for entry in classes] == np.array(labels))
        assert accuracy == pytest.approx(metrics["top1"])


CONFIGS: list[tuple[Any, tuple[int, int]]] = [
    (VARIANTS["S/32"], (224, 224)),
    (dataclasses.replace(VARIANTS["S/32"], num_blocks=2), (96, 160)),
    (MixerConfig(2, 14, 24, 7, 50), (28, 28)),
    # 27 / 49 · 49 is just below 27 in floating point.
    (MixerConfig(1, 8, 49, 27, 101), (16, 16)),
    (get_family("vit").get_config("Ti/16"), (224, 224)),
    (VIT, (28, 42)),
    (dataclasses.replace(VIT, pooling="gap"), (28, 28)),
    (dataclasses.replace(VIT, pooling="map"), (28, 28)),
]


@pytest.mark.parametrize(
    ("config", "image_size", "gelu"),
    [
        *((*case, gelu) for case in CONFIGS for gelu in ("tanh", "exact")),
        (BitConfig("2,1", 64), (33, 48), "tanh"),
    ],
    ids=str,
)
def test_timm_snippet_creates_the_same_model(
    config: Any,
    image_size: tuple[int, int],
    gelu: str,
    torch: Any,
    timm: Any,
    tmp_path: Path,
) -> None:
    weights = random_weights(config, image_size, gelu=gelu)
    # Twelve blocks of attention amplify rounding less if scores are small.
    weights = weights._replace(params=jax.tree.map(lambda x: x / 3, weights.params))
    model = load_in_timm(timm, weights, tmp_path / "weights.safetensors")
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, *image_size, 3)).astype(np.float32)
    classifier = load_pretrained(str(tmp_path / "weights.safetensors"), dtype="float32")
    expected = timm_logits(torch, model, images)
    difference = np.abs(np.asarray(jax.device_get(classifier(images))) - expected).max()
    assert difference < 1e-4 * expected.std()


@pytest.mark.parametrize("family", ["vit", "bit"])
def test_timm_models_of_variants_have_our_size(family: str, torch: Any, timm: Any) -> None:
    rules = get_family(family)
    for variant, config in rules.variants.items():
        expression = rules.timm_expression(variant, config, (224, 224), 10, "tanh")
        with torch.device("meta"):
            model = eval(expression, {"timm": timm})
        found = sum(parameter.numel() for parameter in model.parameters())
        assert found == rules.num_params(config, 224, 10), variant
