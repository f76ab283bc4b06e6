"""From training to timm: a run is grown, fine-tuned and exported, and timm answers as it does."""

import dataclasses
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
import pytest

from mixer_jax.checkpoints.export import export_weights
from mixer_jax.checkpoints.load import PretrainedWeights, load_checkpoint
from mixer_jax.convert import timm_snippet
from mixer_jax.data.decode import decode
from mixer_jax.data.registry import open_dataset
from mixer_jax.inference import load_pretrained
from mixer_jax.models.mixer_config import VARIANTS, MixerConfig
from mixer_jax.training.loop import train_and_evaluate
from tests.helpers.random_weights import random_weights
from tests.helpers.tiny_run import small_config

pytestmark = pytest.mark.baselines
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
    """The model that the printed lines make of the exported file."""
    export_weights(weights, "timm", str(path))
    names: dict[str, Any] = {}
    exec("\n".join(timm_snippet(weights.model_info, str(path))), names)
    return names["model"].eval()


def ask(torch: Any, peer: Any, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return peer(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def test_digits_from_training_to_timm(
    digits_dir: str, tmp_path: Path, torch: Any, timm: Any
) -> None:
    first, tuned = str(tmp_path / "first"), str(tmp_path / "tuned")
    train_and_evaluate(small_config(digits_dir, num_steps=150, **RUN), first)
    config = small_config(digits_dir, num_steps=100, image_size=32, init_from=first, **RUN)
    scores = train_and_evaluate(config, tuned).scores["test"].as_dict()
    assert scores["num_examples"] == 360
    assert scores["top1"] > 0.85
    weights = load_checkpoint(tuned)
    assert weights.model_info.config.tokens_mlp_dim == 4 * 8

    files, pixels, labels = [], [], []
    for number, example in enumerate(open_dataset("digits/all", "test", digits_dir).examples):
        files.append(tmp_path / f"{number}.png")
        files[-1].write_bytes(example["image"])
        image = cv2.resize(decode(example["image"]), (32, 32), interpolation=cv2.INTER_LINEAR)
        pixels.append(image.astype(np.float32) / 127.5 - 1.0)
        labels.append(example["labels"][0])
    peer = load_in_timm(timm, weights, tmp_path / "digits.safetensors")
    theirs = ask(torch, peer, np.stack(pixels))
    for source in (tuned, str(tmp_path / "digits.safetensors")):
        ours = load_pretrained(source, dtype="float32").predict(files, topk=1, batch_size=512)
        told = [prediction.classes[0] for prediction in ours]
        assert [one.class_index for one in told] == theirs.argmax(1).tolist()
        assert [one.name for one in told] == [str(one.class_index) for one in told]
        right = np.mean([one.class_index == label for one, label in zip(told, labels, strict=True)])
        assert right == pytest.approx(scores["top1"])


@pytest.mark.parametrize(
    ("widths", "image_size"),
    [
        (VARIANTS["S/32"], (224, 224)),
        (VARIANTS["S/32"], (96, 160)),
        (MixerConfig(2, 14, 24, 7, 50), (28, 28)),
        # 29 / 58 · 58 is just below 29 in floating-point numbers for some of these.
        (MixerConfig(1, 8, 49, 29, 103), (16, 16)),
    ],
    ids=str,
)
@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_the_printed_lines_make_the_same_model(
    widths: MixerConfig,
    image_size: tuple[int, int],
    gelu: str,
    torch: Any,
    timm: Any,
    tmp_path: Path,
) -> None:
    widths = dataclasses.replace(widths, num_blocks=min(widths.num_blocks, 2))
    if image_size == (224, 224):
        widths = VARIANTS["S/32"]
    weights = random_weights(widths, image_size, gelu=gelu)
    peer = load_in_timm(timm, weights, tmp_path / "weights.safetensors")
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, *image_size, 3)).astype(np.float32)
    loaded = load_pretrained(str(tmp_path / "weights.safetensors"), dtype="float32")
    theirs = ask(torch, peer, images)
    difference = np.abs(np.asarray(jax.device_get(loaded(images))) - theirs).max()
    assert difference < 1e-4 * theirs.std()
