"""Tests of predictions for every image of a split."""

from typing import Any

import jax
import numpy as np
import pytest

from mixer_jax.checkpoints.weights import PretrainedWeights
from mixer_jax.data.synthetic import synthetic_source
from mixer_jax.distributed.sharding import make_mesh, shard_inference_params
from mixer_jax.errors import UserError
from mixer_jax.evaluation.checkpoint import make_input_config
from mixer_jax.evaluation.classification import ClassificationMetrics, evaluate, make_eval_step
from mixer_jax.evaluation.predictions import (
    MAX_ALL_CLASSES,
    NUM_TOP,
    Predictions,
    make_prediction_step,
    predict_source,
)
from mixer_jax.inference import Classifier
from tests.helpers.messages import raises
from tests.helpers.random_weights import random_weights

COUNT = 21


def make_weights(num_classes: int) -> PretrainedWeights:
    return random_weights(class_names=tuple(map(str, range(num_classes))))


def predict(
    weights: PretrainedWeights, batch_size: int = 8
) -> tuple[ClassificationMetrics, Predictions]:
    mesh = make_mesh(data=0, fsdp=1)
    model = weights.model_info.build_model("")
    source = synthetic_source("test", weights.model_info.num_classes, COUNT, 16)
    params = shard_inference_params(weights.params, model, mesh)
    input_config = make_input_config(weights, batch_size, False)
    step = make_prediction_step(model, mesh)
    metrics, predictions = predict_source(step, params, source, mesh, input_config)
    expected = evaluate(make_eval_step(model, mesh), params, source, mesh, input_config)
    assert metrics._asdict() == pytest.approx(expected._asdict())
    return metrics, predictions


@pytest.mark.parametrize("num_classes", [3, MAX_ALL_CLASSES, MAX_ALL_CLASSES + 1])
def test_predictions_are_those_of_the_model_for_every_image(num_classes: int) -> None:
    weights = make_weights(num_classes)
    metrics, predictions = predict(weights)
    source = synthetic_source("test", num_classes, COUNT, 16)
    num_kept = num_classes if num_classes <= MAX_ALL_CLASSES else NUM_TOP
    assert predictions.top_classes.shape == (COUNT, num_kept)
    assert predictions.mask.all()
    assert predictions.errors == {}
    classifier = Classifier(weights)
    images = [example["image"] for example in source.examples]
    expected = classifier.predict(images, topk=num_kept, exif_orientation=False)
    for index, prediction in enumerate(expected):
        assert predictions.names[index] == f"example {index}"
        assert predictions.labels[index] == source.examples[index]["labels"][0]
        classes = [entry.class_index for entry in prediction.classes]
        assert predictions.top_classes[index].tolist() == classes
        np.testing.assert_allclose(
            predictions.top_probabilities[index],
            [entry.probability for entry in prediction.classes],
            rtol=1e-4,
            atol=1e-7,
        )
    np.testing.assert_array_equal(predictions.confidence, predictions.top_probabilities[:, 0])
    assert (predictions.predicted == predictions.labels).mean() == pytest.approx(metrics.top1)


def test_predictions_do_not_depend_on_the_batch_size() -> None:
    weights = make_weights(5)
    _, first = predict(weights, 4)
    _, second = predict(weights, 64)
    assert first.names == second.names
    np.testing.assert_array_equal(first.top_classes, second.top_classes)
    np.testing.assert_allclose(first.top_probabilities, second.top_probabilities, rtol=1e-5)


def fill_head(weights: PretrainedWeights, value: float) -> PretrainedWeights:
    def fill(path: Any, array: np.ndarray) -> np.ndarray:
        return np.full_like(array, value) if "head" in jax.tree_util.keystr(path) else array

    params = jax.tree_util.tree_map_with_path(fill, weights.params)
    return PretrainedWeights(params, weights.model_info)


def test_equally_probable_classes_are_wrong_and_the_first_is_the_prediction() -> None:
    metrics, predictions = predict(fill_head(make_weights(3), 0.0))
    assert metrics.top1 == 0
    assert not predictions.predicted.any()
    assert (predictions.rank == 2).all()


def test_predictions_must_be_finite() -> None:
    with raises(UserError, "NaN", str(COUNT)):
        predict(fill_head(make_weights(3), np.nan))
