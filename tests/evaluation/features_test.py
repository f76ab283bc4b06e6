"""Tests of extracting features: each example once, whatever the batches and the devices."""

import weakref
from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax.data.source import Source, subset
from mixer_jax.distributed.sharding import make_mesh
from mixer_jax.errors import UserError
from mixer_jax.evaluation.features import Chunk, FeatureExtractor, make_feature_fn, rechunk
from mixer_jax.evaluation.loop import EvalInputConfig
from mixer_jax.models.mixer import MlpMixer
from tests.evaluation.conftest import IMAGE_SIZE, pixels_as_features, read_by
from tests.helpers.messages import raises


def join(chunks: Any) -> Chunk:
    return Chunk(*(np.concatenate(column) for column in zip(*chunks, strict=True)))


@pytest.mark.parametrize("devices", [1, 8])
def test_neither_batch_size_nor_devices_matter(
    devices: int,
    small_model: MlpMixer,
    small_params: Any,
    digits_test: Source,
    test_features: tuple[np.ndarray, np.ndarray],
) -> None:
    mesh = make_mesh(0, 1, jax.devices()[:devices])
    feature_fn = make_feature_fn(small_model, mesh)
    for batch_size in (7, 64, 1000):
        reading = read_by(batch_size)
        found = join(FeatureExtractor(feature_fn, small_params, digits_test, mesh, reading))
        assert found.places.tolist() == list(range(360))
        assert found.labels.tolist() == test_features[1].tolist()
        assert found.features.dtype == np.float32
        # Not to the bit: another size of matrix is multiplied in another order.
        np.testing.assert_allclose(found.features, test_features[0], atol=1e-6, rtol=0)


def test_every_host_can_read_all_features(small_model: MlpMixer, small_params: Any) -> None:
    batch: dict[str, Any] = {
        "image": np.zeros((16, *IMAGE_SIZE, 3), np.uint8),
        "label": np.zeros(16, np.int32),
        "mask": np.ones(16, bool),
    }
    for column in make_feature_fn(small_model, make_mesh(8, 1))(small_params, batch):
        assert column.sharding.is_fully_replicated
        assert len(column.sharding.device_set) == 8


@pytest.fixture(scope="module")
def some_broken(digits_test: Source) -> Source:
    examples = [dict(digits_test.examples[index]) for index in range(40)]
    for index in (3, 17):
        examples[index]["image"] = b"broken"
    return Source("forty", examples, digits_test.class_names)


def look_at_pixels(source: Source, reading: EvalInputConfig) -> FeatureExtractor:
    return FeatureExtractor(pixels_as_features, None, source, make_mesh(0, 1), reading)


@pytest.mark.parametrize("batch_size", [8, 64])
def test_some_examples_in_the_order_asked_for(batch_size: int, digits_test: Source) -> None:
    places = [200, 3, 3, 359, *range(20)]
    found = join(look_at_pixels(subset(digits_test, places), read_by(batch_size)))
    whole = join(look_at_pixels(digits_test, read_by(100)))
    assert found.places.tolist() == list(range(24))
    assert (found.features == whole.features[places]).all()
    assert (found.labels == whole.labels[places]).all()


def test_nothing_is_kept_of_chunks_handed_out(digits_test: Source) -> None:
    made: list[weakref.ref[np.ndarray]] = []
    for chunk in look_at_pixels(digits_test, read_by(16)):
        made.append(weakref.ref(chunk.features))
        assert sum(one() is not None for one in made) <= 2
    assert len(made) == 23


@pytest.mark.parametrize("batch_size", [8, 64])
def test_images_that_cannot_be_used_are_left_out_or_an_error(
    batch_size: int, some_broken: Source
) -> None:
    seen = look_at_pixels(some_broken, read_by(batch_size, skip_bad=True))
    places = join(seen).places.tolist()
    assert places == [index for index in range(40) if index not in (3, 17)]
    assert seen.num_bad == 2
    named = (some_broken.examples[index]["name"] for index in (3, 17))
    with raises(UserError, "forty", "2", *named):
        list(look_at_pixels(some_broken, read_by(batch_size)))


def test_features_that_are_no_numbers(
    small_model: MlpMixer, small_params: Any, digits_test: Source
) -> None:
    mesh = make_mesh(0, 1)
    params = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), small_params)
    feature_fn = make_feature_fn(small_model, mesh)
    with raises(UserError, digits_test.name):
        list(FeatureExtractor(feature_fn, params, digits_test, mesh, read_by(64)))


def test_chunks_are_joined_and_lose_nothing(digits_test: Source) -> None:
    small = list(look_at_pixels(digits_test, read_by(16)))
    joined = list(rechunk(small, 100))
    assert [len(chunk.labels) for chunk in joined] == [112, 112, 112, 24]
    for one, all_of_them in zip(join(small), join(joined), strict=True):
        np.testing.assert_array_equal(one, all_of_them)
    assert list(rechunk([], 100)) == []
