"""A tiny Mixer with random weights, and its features of the digits."""

from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax.data.loader import Batch
from mixer_jax.data.preprocess import eval_image
from mixer_jax.data.registry import open_dataset
from mixer_jax.data.source import Source
from mixer_jax.evaluation.features import BatchFeatures
from mixer_jax.evaluation.loop import EvalInputConfig
from mixer_jax.models.mixer import MlpMixer
from mixer_jax.models.registry import create_model

IMAGE_SIZE = (16, 16)


def make_input_config(batch_size: int, skip_bad: bool = False) -> EvalInputConfig:
    return EvalInputConfig(
        batch_size=batch_size,
        image_size=IMAGE_SIZE,
        eval_crop="resize",
        exif_orientation=False,
        skip_bad=skip_bad,
        num_threads=2,
        prefetch_batches=2,
    )


@pytest.fixture(scope="session")
def tiny_model() -> MlpMixer:
    return create_model(
        "custom",
        num_classes=10,
        num_blocks=1,
        patch_size=4,
        hidden_dim=24,
        tokens_mlp_dim=8,
        channels_mlp_dim=32,
    )


@pytest.fixture(scope="session")
def tiny_params(tiny_model: MlpMixer) -> Any:
    images = np.zeros((1, *IMAGE_SIZE, 3), np.float32)
    shapes = jax.eval_shape(tiny_model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape).astype(x.dtype), shapes)


@pytest.fixture(scope="session")
def digits_train(digits_dir: str) -> Source:
    return open_dataset("digits", "train", digits_dir)


@pytest.fixture(scope="session")
def digits_test(digits_dir: str) -> Source:
    return open_dataset("digits", "test", digits_dir)


def features_and_labels(
    model: MlpMixer, params: Any, source: Source
) -> tuple[np.ndarray, np.ndarray]:
    """Computes features (n, d) and labels (n,) of a source, without batches."""
    examples = [source.examples[index] for index in range(len(source))]
    images = np.stack(
        [eval_image(e["image"], image_size=IMAGE_SIZE, eval_crop="resize") for e in examples]
    )
    headless = {name: values for name, values in params.items() if name != "head"}
    apply = jax.jit(model.clone(num_classes=0).apply)
    features = apply({"params": headless}, images.astype(np.float32) / 127.5 - 1)
    return np.asarray(features), np.array([example["labels"][0] for example in examples])


@pytest.fixture(scope="session")
def train_features(
    tiny_model: MlpMixer, tiny_params: Any, digits_train: Source
) -> tuple[np.ndarray, np.ndarray]:
    return features_and_labels(tiny_model, tiny_params, digits_train)


@pytest.fixture(scope="session")
def test_features(
    tiny_model: MlpMixer, tiny_params: Any, digits_test: Source
) -> tuple[np.ndarray, np.ndarray]:
    return features_and_labels(tiny_model, tiny_params, digits_test)


def pixels_as_features(params: Any, batch: Batch) -> BatchFeatures:
    """Substitute for a compiled model: the pixels of the first row and channel."""
    del params
    features = jax.numpy.asarray(batch["image"][:, 0, :, 0], np.float32)
    return BatchFeatures(features, batch["label"], batch["mask"])
