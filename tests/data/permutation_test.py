"""Tests of permutations of pixels: what they permute, and that all readers apply them last."""

from typing import Any

import numpy as np
import pytest

from mixer_jax.data.permutation import PixelPermutation, pixel_indices
from mixer_jax.data.preprocess import eval_image, train_image
from mixer_jax.errors import UserError
from tests.data.preprocess_test import PLAIN
from tests.helpers.images import encode, noise
from tests.helpers.messages import raises
from tests.helpers.tiny_run import small_config

PATCHES, PIXELS = PixelPermutation("patches", 4, 0), PixelPermutation("pixels", 4, 0)


def split_into_patches(image: np.ndarray, size: int) -> np.ndarray:
    """Returns (patches, pixels of a patch, channels), both in raster order."""
    rows, columns = image.shape[0] // size, image.shape[1] // size
    patches = image.reshape(rows, size, columns, size, -1).transpose(0, 2, 1, 3, 4)
    return patches.reshape(rows * columns, size * size, -1)


@pytest.mark.parametrize("shape", [(16, 16), (8, 20)])
def test_patches_and_the_pixels_within_them_are_permuted(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    before, after = (split_into_patches(x, 4) for x in (image, PATCHES(image)))
    sources = np.array(
        [next(i for i, old in enumerate(before) if same_pixels(old, new)) for new in after]
    )
    assert sorted(sources) == list(range(len(before)))
    assert not np.array_equal(sources, np.arange(len(before)))
    # One order of pixels for all patches.
    order = [int(np.flatnonzero((before[sources[0]] == pixel).all(1))[0]) for pixel in after[0]]
    np.testing.assert_array_equal(before[sources][:, order], after)
    assert order != sorted(order)


def same_pixels(patch: np.ndarray, other: np.ndarray) -> bool:
    return sorted(map(tuple, patch.tolist())) == sorted(map(tuple, other.tolist()))


def test_all_pixels_are_permuted_across_patches() -> None:
    indices = pixel_indices(PIXELS, 16, 12)
    np.testing.assert_array_equal(np.sort(indices), np.arange(16 * 12))
    patch_of = split_into_patches(np.arange(16 * 12).reshape(16, 12, 1), 4)[..., 0]
    moved = split_into_patches(indices.reshape(16, 12, 1), 4)[..., 0]
    assert not any(set(new) == set(old) for new in moved for old in patch_of)
    image = noise(16, 12)
    expected = image.reshape(-1, 3)[indices].reshape(image.shape)
    np.testing.assert_array_equal(PIXELS(image), expected)


def test_permutations_follow_from_the_seed_alone() -> None:
    """The values must never change: checkpoints store the seed, not the permutation."""
    other = PixelPermutation("patches", 4, 1)
    assert not np.array_equal(pixel_indices(PATCHES, 8, 8), pixel_indices(other, 8, 8))
    assert pixel_indices(PIXELS, 2, 3).tolist() == [0, 2, 1, 5, 4, 3]
    expected = [[6, 3, 12, 9], [7, 2, 13, 8], [14, 11, 4, 1], [15, 10, 5, 0]]
    small = PixelPermutation("patches", 2, 3)
    assert pixel_indices(small, 4, 4).reshape(4, 4).tolist() == expected


@pytest.mark.parametrize("permutation", [PATCHES, PIXELS])
def test_training_and_evaluation_images_are_permuted_last(permutation: PixelPermutation) -> None:
    encoded = encode(noise(40, 30), "PNG")
    settings: dict[str, Any] = PLAIN | {
        "image_size": 16,
        "train_crop": "random_shift",
        "flip": True,
        "randaugment_layers": 1,
    }
    for seed in range(4):
        plain = train_image(encoded, np.random.default_rng(seed), **settings)
        out = np.empty_like(plain)
        for target in (None, out):
            permuted = train_image(
                encoded,
                np.random.default_rng(seed),
                **settings,
                permutation=permutation,
                out=target,
            )
            np.testing.assert_array_equal(permuted, permutation(plain))
        np.testing.assert_array_equal(out, permutation(plain))
    for crop in ("shorter_side", "bicubic", "resize"):
        evaluated = eval_image(encoded, image_size=(16, 12), eval_crop=crop)
        permuted = eval_image(encoded, image_size=(16, 12), eval_crop=crop, permutation=permutation)
        np.testing.assert_array_equal(permuted, permutation(evaluated))


def test_image_of_its_final_size_is_not_permuted_in_place() -> None:
    """Decoding can return the array that it is resized into."""
    image = noise(16, 16)
    before = image.copy()
    PATCHES(image)
    np.testing.assert_array_equal(image, before)


def test_patches_must_divide_the_image(digits_dir: str) -> None:
    with raises(UserError, "preprocess.permute_patch_size", "image_size", "5", "16", "4"):
        small_config(digits_dir, preprocess__permute="patches", preprocess__permute_patch_size=5)
    for kind, size in (("pixels", 5), ("patches", 16)):
        changes: dict[str, Any] = {
            "preprocess__permute": kind,
            "preprocess__permute_patch_size": size,
        }
        assert small_config(digits_dir, **changes).preprocess.permute == kind
