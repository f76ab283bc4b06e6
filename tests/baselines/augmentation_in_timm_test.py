"""Boxes of random erasing and CutMix have the distribution of timm's."""

import importlib
import random
from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax.data.preprocess import erase_random_box
from mixer_jax.training.mixup import sample_cutmix_mask

STATS: Any = importlib.import_module("scipy.stats")
pytestmark = pytest.mark.baselines
COUNT, HEIGHT, WIDTH = 4000, 48, 64


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Finds top, left, height, width and area of the box of each mask, bool (n, h, w)."""
    rows, columns = masks.any(2), masks.any(1)
    height, width = rows.sum(1), columns.sum(1)
    return np.stack([rows.argmax(1), columns.argmax(1), height, width, height * width], axis=1)


def assert_same_distribution(found: np.ndarray, expected: np.ndarray) -> None:
    for index, name in enumerate(["top", "left", "height", "width", "area"]):
        test = STATS.ks_2samp(found[:, index], expected[:, index])
        # Samples that differ by 5 % of their mass have a p-value below 1e-4.
        assert test.pvalue > 1e-3, (name, test)


def test_random_erasing_has_the_boxes_of_timm(torch: Any, timm: Any) -> None:
    erasing = importlib.import_module("timm.data.random_erasing")
    random.seed(0)
    erase = erasing.RandomErasing(probability=1.0, mode="const", device="cpu")
    expected = [erase(torch.ones(3, HEIGHT, WIDTH))[0].numpy() == 0 for _ in range(COUNT)]
    rng, black = np.random.default_rng(0), np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    found = [erase_random_box(black, rng, "constant")[..., 0] > 0 for _ in range(COUNT)]
    assert_same_distribution(boxes_of(np.stack(found)), boxes_of(np.stack(expected)))


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_cutmix_has_the_boxes_of_timm(alpha: float, torch: Any, timm: Any) -> None:
    mixup = importlib.import_module("timm.data.mixup")
    # timm draws from the global generator.
    np.random.seed(0)  # noqa: NPY002
    expected = np.zeros((COUNT, HEIGHT, WIDTH), bool)
    weights, rng = [], np.random.default_rng(1)
    for mask in expected:
        sample = rng.beta(alpha, alpha)
        (top, bottom, left, right), weight = mixup.cutmix_bbox_and_lam((3, HEIGHT, WIDTH), sample)
        mask[top:bottom, left:right] = True
        weights.append(weight)
    draw = jax.jit(jax.vmap(lambda rng: sample_cutmix_mask(rng, HEIGHT, WIDTH, alpha)))
    masks = np.asarray(draw(jax.random.split(jax.random.key(0), COUNT)))
    assert_same_distribution(boxes_of(masks[:, 0, :, :, 0] == 0), boxes_of(expected))
    # Labels are weighted alike.
    areas = boxes_of(expected)[:, -1]
    np.testing.assert_allclose(weights, 1 - areas / (HEIGHT * WIDTH))
    test = STATS.ks_2samp(masks.mean((1, 2, 3, 4)), weights)
    assert test.pvalue > 1e-3, test
