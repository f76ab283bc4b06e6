"""Tests of feature extraction: each example once, for any batch size and number of devices."""

import weakref
from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax.data.source import Source, subset
from mixer_jax.distributed.sharding import make_mesh
from mixer_jax.errors import UserError
from mixer_jax.evaluation.features import FeatureChunk, FeatureExtractor, make_feature_fn, rechunk
from mixer_jax.evaluation.loop import EvalInputConfig
from mixer_jax.models.mixer import MlpMixer
from tests.evaluation.conftest import IMAGE_SIZE, make_input_config, pixels_as_features
from tests.helpers.messages import raises


def join(chunks: Any) -> FeatureChunk:
    return FeatureChunk(*(np.concatenate(column) for column in zip(*chunks, strict=True)))


@pytest.mark.parametrize("devices", [1, 8])
def test_extractor_is_independent_of_batch_size_and_devices(
    devices: int,
    tiny_model: MlpMixer,
    tiny_params: Any,
    digits_test: Source,
    test_features: tuple[np.ndarray, np.ndarray],
) -> None:
    mesh = make_mesh(0, 1, jax.devices()[:devices])
    feature_fn = make_feature_fn(tiny_model, mesh)
    for batch_size in (7, 64, 1000):
        input_config = make_input_config(batch_size)
        found = join(FeatureExtractor(feature_fn, tiny_params, digits_test, mesh, input_config))
        assert found.indices.tolist() == list(range(360))
        assert found.labels.tolist() == test_features[1].tolist()
        assert found.features.dtype == np.float32
        # Not bit-identical: matmuls of other shapes sum in another order.
        np.testing.assert_allclose(found.features, test_features[0], atol=1e-6, rtol=0)


def test_make_feature_fn_replicates_outputs(tiny_model: MlpMixer, tiny_params: Any) -> None:
    batch: dict[str, Any] = {
        "image": np.zeros((16, *IMAGE_SIZE, 3), np.uint8),
        "label": np.zeros(16, np.int32),
        "mask": np.ones(16, bool),
    }
    for column in make_feature_fn(tiny_model, make_mesh(8, 1))(tiny_params, batch):
        assert column.sharding.is_fully_replicated
        assert len(column.sharding.device_set) == 8


@pytest.fixture(scope="module")
def some_broken(digits_test: Source) -> Source:
    examples = [dict(digits_test.examples[index]) for index in range(40)]
    for index in (3, 17):
        examples[index]["image"] = b"broken"
    return Source("forty", examples, digits_test.class_names)


def extract_pixels(source: Source, input_config: EvalInputConfig) -> FeatureExtractor:
    return FeatureExtractor(pixels_as_features, None, source, make_mesh(0, 1), input_config)


@pytest.mark.parametrize("batch_size", [8, 64])
def test_extractor_follows_the_order_of_a_subset(batch_size: int, digits_test: Source) -> None:
    indices = [200, 3, 3, 359, *range(20)]
    found = join(extract_pixels(subset(digits_test, indices), make_input_config(batch_size)))
    whole = join(extract_pixels(digits_test, make_input_config(100)))
    assert found.indices.tolist() == list(range(24))
    assert (found.features == whole.features[indices]).all()
    assert (found.labels == whole.labels[indices]).all()


def test_extractor_does_not_hold_on_to_chunks(digits_test: Source) -> None:
    refs: list[weakref.ref[np.ndarray]] = []
    for chunk in extract_pixels(digits_test, make_input_config(16)):
        refs.append(weakref.ref(chunk.features))
        assert sum(ref() is not None for ref in refs) <= 2
    assert len(refs) == 23


@pytest.mark.parametrize("batch_size", [8, 64])
def test_extractor_skips_bad_images_or_raises(batch_size: int, some_broken: Source) -> None:
    extractor = extract_pixels(some_broken, make_input_config(batch_size, skip_bad=True))
    indices = join(extractor).indices.tolist()
    assert indices == [index for index in range(40) if index not in (3, 17)]
    assert extractor.num_bad == 2
    names = (some_broken.examples[index]["name"] for index in (3, 17))
    with raises(UserError, "forty", "2", *names):
        list(extract_pixels(some_broken, make_input_config(batch_size)))


def test_extractor_rejects_nan_features(
    tiny_model: MlpMixer, tiny_params: Any, digits_test: Source
) -> None:
    mesh = make_mesh(0, 1)
    params = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), tiny_params)
    feature_fn = make_feature_fn(tiny_model, mesh)
    with raises(UserError, digits_test.name):
        list(FeatureExtractor(feature_fn, params, digits_test, mesh, make_input_config(64)))


def test_rechunk_concatenates_without_loss(digits_test: Source) -> None:
    small = list(extract_pixels(digits_test, make_input_config(16)))
    joined = list(rechunk(small, 100))
    assert [len(chunk.labels) for chunk in joined] == [112, 112, 112, 24]
    for column, joined_column in zip(join(small), join(joined), strict=True):
        np.testing.assert_array_equal(column, joined_column)
    assert list(rechunk([], 100)) == []
