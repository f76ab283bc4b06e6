"""Mixer on permuted images: the same function and the same run (Section 3.4, Figure 4)."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixer_jax.config.schema import RunConfig
from mixer_jax.data.permutation import PixelPermutation, pixel_indices
from mixer_jax.errors import UserError
from mixer_jax.inference import load_pretrained
from mixer_jax.models.layers import normalize_images
from mixer_jax.training.datasets import open_datasets
from mixer_jax.training.loop import train_and_evaluate
from mixer_jax.training.setup import build_experiment, make_train_batches
from tests.helpers.messages import raises
from tests.helpers.random_weights import random_weights
from tests.helpers.tiny_run import NO_REGULARIZATION, small_config

PATCH, SIZE = 4, 16
PERMUTATION = PixelPermutation("patches", PATCH, 0)
PERMUTE: dict[str, Any] = {
    "preprocess__permute": "patches",
    "preprocess__permute_patch_size": PATCH,
}


def permute_params(params: Any) -> Any:
    """Permutes what reads and writes tokens and pixels, as `PERMUTATION` permutes images."""
    flat = pixel_indices(PERMUTATION, SIZE, SIZE)
    rows, columns = flat // SIZE, flat % SIZE
    corner = (np.arange(0, SIZE, PATCH)[:, None] * SIZE + np.arange(0, SIZE, PATCH)).ravel()
    tokens = rows[corner] // PATCH * (SIZE // PATCH) + columns[corner] // PATCH
    first_patch = flat.reshape(SIZE, SIZE)[:PATCH, :PATCH].ravel()
    pixels = first_patch // SIZE % PATCH * PATCH + first_patch % SIZE % PATCH

    stem = params["stem"]["kernel"]
    mixing = params["blocks"]["token_mixing"]
    dense_in, dense_out = mixing["Dense_0"], mixing["Dense_1"]
    kernel_out, bias_out = dense_out["kernel"][..., tokens], dense_out["bias"][:, tokens]
    permuted = {
        "Dense_0": dense_in | {"kernel": dense_in["kernel"][:, tokens]},
        "Dense_1": {"kernel": kernel_out, "bias": bias_out},
    }
    kernel = stem.reshape(PATCH**2, *stem.shape[2:])[pixels].reshape(stem.shape)
    return params | {
        "stem": params["stem"] | {"kernel": kernel},
        "blocks": params["blocks"] | {"token_mixing": permuted},
    }


def draw_images(num: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, SIZE, SIZE, 3), np.uint8)


def permute_images(images: np.ndarray, permutation: PixelPermutation) -> np.ndarray:
    return np.stack([permutation(image) for image in images])


def test_permuted_mixer_computes_the_same_function_of_permuted_images() -> None:
    weights = random_weights()
    model = weights.model_info.build_model()

    @jax.jit
    def apply(params: Any, images: np.ndarray) -> jax.Array:
        return model.apply({"params": params}, normalize_images(jnp.asarray(images)))

    images = draw_images(8)
    expected = np.asarray(apply(weights.params, images))
    permuted = permute_images(images, PERMUTATION)
    logits = apply(permute_params(weights.params), permuted)
    # Sums over tokens and pixels have another order; logits have a deviation of about 1.
    np.testing.assert_allclose(logits, expected, atol=1e-5 * expected.std())
    assert abs(apply(weights.params, permuted) - expected).max() > 0.1 * expected.std()


def losses(config: RunConfig, permute: bool, num_steps: int = 16) -> list[float]:
    """Trains from the run's initial weights, or from the permuted ones."""
    experiment = build_experiment(config, open_datasets(config))
    state = experiment.create_state()
    if permute:
        params = jax.device_get(state.params)
        shardings = jax.tree.map(lambda x: x.sharding, state.params)
        state = state._replace(params=jax.device_put(permute_params(params), shardings))
    batches = make_train_batches(experiment, 0, lambda *_: None)
    found = []
    for _, batch in zip(range(num_steps), batches, strict=False):
        state, metrics = experiment.train_step(state, batch, experiment.hyperparams)
        found.append(float(metrics["loss"]))
    return found


def test_training_on_permuted_images_has_the_same_losses(digits_dir: str) -> None:
    settings: dict[str, Any] = NO_REGULARIZATION | {
        "optimizer__learning_rate": 0.02,
        "recipe__mixup": 0.2,
        "preprocess__flip": True,
    }
    plain = losses(small_config(digits_dir, **settings), permute=False)
    config = small_config(digits_dir, **settings, **PERMUTE)
    np.testing.assert_allclose(losses(config, permute=True), plain, rtol=1e-5)
    assert abs(plain[-1] - plain[0]) > 0.02
    # The same images from the weights that were not permuted.
    assert max(np.abs(np.subtract(losses(config, permute=False), plain))) > 1e-3


@pytest.mark.parametrize("kind", ["patches", "pixels"])
def test_checkpoints_store_the_permutation(kind: str, digits_dir: str, tmp_path: Path) -> None:
    config = small_config(
        digits_dir, num_steps=4, **NO_REGULARIZATION, **PERMUTE | {"preprocess__permute": kind}
    )
    scores = train_and_evaluate(config, str(tmp_path)).scores["test"].as_dict()
    classifier = load_pretrained(str(tmp_path))
    permutation = PixelPermutation(kind, PATCH, 0)
    assert classifier.model_info.permutation == permutation
    evaluated = classifier.evaluate("digits", "test", data_dir=digits_dir).as_dict()
    assert evaluated["log_likelihood"] == pytest.approx(scores["log_likelihood"], rel=1e-5)

    images = draw_images(3)
    expected = normalize_images(jnp.asarray(permute_images(images, permutation)))
    np.testing.assert_array_equal(classifier.preprocess(images), expected)
    exported = tmp_path / "model.safetensors"
    classifier.export(exported)
    again = load_pretrained(exported)
    np.testing.assert_array_equal(again.preprocess(images), expected)
    with raises(UserError, "image_size", "16 px", "32 px", "permuted"):
        load_pretrained(str(tmp_path), image_size=32)
