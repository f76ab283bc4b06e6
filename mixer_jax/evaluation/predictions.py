"""Predictions for every image of a split, together with the metrics of an evaluation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from mixer_jax.data.decode import BadImageError
from mixer_jax.data.loader import Batch
from mixer_jax.data.readers import BadImage
from mixer_jax.data.source import Source
from mixer_jax.errors import UserError
from mixer_jax.evaluation.classification import (
    ClassificationMetrics,
    ExampleMetrics,
    aggregate_pass,
    batch_metrics,
)
from mixer_jax.evaluation.loop import DatasetPass, EvalInputConfig, jit_inference
from mixer_jax.evaluation.multi_label import MultiLabelMetrics, ScoreStep, score_source

# Up to MAX_ALL_CLASSES, probabilities of all classes are kept; otherwise those of the NUM_TOP most
# probable ones, so that memory does not depend on the number of classes.
MAX_ALL_CLASSES, NUM_TOP = 100, 5


class Predictions(NamedTuple):
    """Predictions for the n images of a source, in its order.

    Attributes:
        names: Path of each file, or position in the dataset.
        labels: Correct class of each image; only valid where `mask` is set.
        mask: Images that count; the others are unusable.
        top_classes: Most probable classes in descending order: all, or the first `NUM_TOP` of more
            than `MAX_ALL_CLASSES`.
        top_probabilities: Their probabilities.
        rank: Number of other classes that are at least as probable as the correct one.
        log_likelihood: Log-probability of the correct class.
        confidence: Probability of the most probable class.
        errors: Reason why an image is unusable, by its index.
    """

    names: list[str]
    labels: Int32[np.ndarray, " n"]
    mask: Bool[np.ndarray, " n"]
    top_classes: Int32[np.ndarray, "n k"]
    top_probabilities: Float32[np.ndarray, "n k"]
    rank: Int32[np.ndarray, " n"]
    log_likelihood: Float32[np.ndarray, " n"]
    confidence: Float32[np.ndarray, " n"]
    errors: dict[int, str]

    @property
    def predicted(self) -> Int32[np.ndarray, " n"]:
        """Most probable class of each image; of several, the first."""
        return self.top_classes[:, 0]


class MultiLabelPredictions(NamedTuple):
    """Predictions of a multi-label model for the n images of a source, in its order.

    Attributes:
        names: Path of each file, or position in the dataset.
        labels: Classes of each image; only valid where `mask` is set.
        probabilities: Probability of each class, on its own.
        mask: Images that count; the others are unusable.
        errors: Reason why an image is unusable, by its index.
    """

    names: list[str]
    labels: Bool[np.ndarray, "n classes"]
    probabilities: Float32[np.ndarray, "n classes"]
    mask: Bool[np.ndarray, " n"]
    errors: dict[int, str]

    @property
    def predicted(self) -> Bool[np.ndarray, "n classes"]:
        """Classes that are more probable than not."""
        return self.probabilities > 0.5


class BatchPredictions(NamedTuple):
    """Output of a prediction step; see `Predictions`."""

    metrics: ExampleMetrics
    labels: Int[Array, " n"]
    top_classes: Int[Array, "n k"]
    top_probabilities: Float[Array, "n k"]


PredictionStep = Callable[[Any, Batch], BatchPredictions]


def make_prediction_step(model: Any, mesh: Mesh) -> PredictionStep:
    """Jits the model, followed by the metrics and the most probable classes of each image."""

    def postprocess(logits: Array, batch: Batch) -> BatchPredictions:
        num_classes = logits.shape[1]
        num_top = num_classes if num_classes <= MAX_ALL_CLASSES else NUM_TOP
        # In the same way as the metrics, so that the confidence is the first probability.
        log_probs, classes = jax.lax.top_k(jax.nn.log_softmax(logits), num_top)
        return BatchPredictions(
            batch_metrics(logits, batch), batch["label"], classes, jnp.exp(log_probs)
        )

    return jit_inference(model, mesh, postprocess)


def predict_source(
    step: PredictionStep, params: Any, source: Source, mesh: Mesh, input_config: EvalInputConfig
) -> tuple[ClassificationMetrics, Predictions]:
    """Evaluates a source like `evaluate`, and keeps the prediction for every image.

    Images are not kept. The process must be the only one.

    Args:
        step: Result of `make_prediction_step`.
        params: Parameters of the model.
        source: Source with one label per image.
        mesh: Device mesh.
        input_config: Input pipeline.

    Raises:
        UserError: Images are unusable and must not be skipped, no example counts, or the model's
            output for an image is not finite.
    """
    recorded, names = _record_names(source)
    dataset_pass = DatasetPass(step, params, recorded, mesh, input_config)
    batches = list(dataset_pass)
    metrics = aggregate_pass([batch.metrics for batch in batches], source, dataset_pass.num_bad)
    # The last batch is padded.
    joined = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(source)], *batches)
    mask = joined.metrics.mask
    _check_finite(joined.metrics.confidence[mask])
    return metrics, Predictions(
        names,
        joined.labels,
        mask,
        joined.top_classes,
        joined.top_probabilities,
        joined.metrics.rank,
        joined.metrics.log_likelihood,
        joined.metrics.confidence,
        _list_errors(names, mask, dataset_pass.bad),
    )


def predict_multi_label_source(
    step: ScoreStep, params: Any, source: Source, mesh: Mesh, input_config: EvalInputConfig
) -> tuple[MultiLabelMetrics, MultiLabelPredictions]:
    """Evaluates a source like `score_source`, and keeps the prediction for every image.

    The process must be the only one. Arguments are those of `score_source`.

    Raises:
        UserError: Images are unusable and must not be skipped, no example has a label, or the
            model's output for an image is not finite.
    """
    recorded, names = _record_names(source)
    metrics, scores, bad = score_source(step, params, recorded, mesh, input_config)
    logits, mask = np.asarray(scores.logits), np.asarray(scores.mask)
    _check_finite(logits[mask].sum(axis=1))
    return metrics, MultiLabelPredictions(
        names,
        np.asarray(scores.labels),
        np.asarray(jax.nn.sigmoid(logits)),
        mask,
        _list_errors(names, mask, bad),
    )


def _record_names(source: Source) -> tuple[Source, list[str]]:
    """Returns a source and the list of its names, which is filled while the source is read."""
    recorder = _NameRecorder(source.examples)
    return dataclasses.replace(source, examples=recorder), recorder.names


def _check_finite(outputs: Float[np.ndarray, " n"]) -> None:
    """Raises UserError if the output for any image is NaN."""
    if num_nan := int(np.isnan(outputs).sum()):
        raise UserError(
            f"the model's output must be finite for a report, got NaN for {num_nan:,} of "
            f"{len(outputs):,} images. The run that trained it has diverged."
        )


def _list_errors(
    names: list[str], mask: Bool[np.ndarray, " n"], bad: list[BadImage]
) -> dict[int, str]:
    """Returns the reason why an image is unusable, by its index."""
    reasons = dict(bad)
    return {index: reasons.get(names[index], "") for index in np.flatnonzero(~mask).tolist()}


def worst_mistakes(predictions: Predictions, count: int) -> Int[np.ndarray, " m"]:
    """Finds the images with a wrong prediction, the most confident first."""
    wrong = np.flatnonzero(predictions.mask & (predictions.predicted != predictions.labels))
    confidence = predictions.confidence[wrong]
    return wrong[np.argsort(-confidence, kind="stable")[:count]]


class _NameRecorder(Sequence[Any]):
    """Examples whose names are recorded while they are read, in any thread.

    Attributes:
        names: Name of each example; empty until it is read.
    """

    def __init__(self, examples: Sequence[Any]):
        self._examples = examples
        self.names = [""] * len(examples)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        try:
            example = self._examples[index]
        except BadImageError as error:
            self.names[index] = error.name
            raise
        self.names[index] = example["name"]
        return example
