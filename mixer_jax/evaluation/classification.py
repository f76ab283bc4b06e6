"""Classification metrics over a split, with every example counted exactly once."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from mixer_jax.data.loader import Batch
from mixer_jax.data.source import Source
from mixer_jax.errors import UserError
from mixer_jax.evaluation.loop import DatasetPass, EvalInputConfig, jit_inference, label_mask
from mixer_jax.evaluation.multi_label import (
    MultiLabelMetrics,
    make_score_step,
    score_source,
)

NUM_CALIBRATION_BINS = 15


class ClassificationMetrics(NamedTuple):
    """Classification metrics over a split, as fractions.

    Attributes:
        top1: Fraction of examples whose most probable class is correct.
        top5: Fraction of examples with a correct class among the five most probable ones.
        log_likelihood: Mean log-probability of the correct class, in nats.
        calibration_error: Expected calibration error, over 15 equal bins of confidence.
        num_bad: Examples skipped because their images are unusable.
        num_unlabeled: Examples skipped because they have no correct class.
    """

    top1: float
    top5: float
    log_likelihood: float
    calibration_error: float
    num_examples: int
    num_bad: int = 0
    num_unlabeled: int = 0

    def format_counts(self) -> str:
        """Formats the numbers of examples counted and skipped."""
        parts = [f"{self.num_examples:,} images"]
        if self.num_bad:
            parts.append(f"{self.num_bad:,} unusable skipped")
        if self.num_unlabeled:
            parts.append(f"{self.num_unlabeled:,} without a label skipped")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, float]:
        """Returns every metric by name."""
        return {name: float(value) for name, value in self._asdict().items()}

    def as_json(self) -> dict[str, Any]:
        """Converts to JSON-serializable metrics."""
        return self._asdict()

    def format_table(self) -> list[str]:
        """Formats the lines that the command `evaluate` prints."""
        return [
            f"top-1              {self.top1:.2%}",
            f"top-5              {self.top5:.2%}",
            f"log-likelihood     {self.log_likelihood:.4f} nats per image",
            f"calibration error  {self.calibration_error:.2%}",
        ]

    def format_progress(self) -> str:
        """Formats the line that is logged during training."""
        return (
            f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%}, "
            f"log-likelihood {self.log_likelihood:.4f} on {self.format_counts()}"
        )

    def format_summary(self) -> str:
        """Formats the line that is printed at the end of a run."""
        return (
            f"{self.top1:.2%} top-1, {self.top5:.2%} top-5, calibration error "
            f"{self.calibration_error:.2%}, on {self.format_counts()}"
        )


class ExampleMetrics(NamedTuple):
    """Metrics of each example of a batch.

    Attributes:
        rank: Number of incorrect classes that are at least as probable as the most probable correct
            one; 0 is best. Outside the top 5 if the logits are NaN, even with fewer classes.
        log_likelihood: Log-probability that a correct class holds.
        confidence: Probability of the most probable class.
    """

    rank: Int[Array, " n"]
    log_likelihood: Float[Array, " n"]
    confidence: Float[Array, " n"]
    mask: Bool[Array, " n"]


EvalStep = Callable[[Any, Batch], ExampleMetrics]
# From a source and parameters to metrics.
Evaluator = Callable[[Source, Any], ClassificationMetrics | MultiLabelMetrics]


def per_example_metrics(
    logits: Float[Array, "n classes"],
    target_mask: Bool[Array, "n classes"],
    mask: Bool[Array, " n"],
) -> ExampleMetrics:
    """Computes the metrics of each example of a batch; a tie counts against the model.

    Args:
        logits: Output of the model.
        target_mask: Correct classes: one, or several with ReaL labels (arXiv 2006.07159).
        mask: Examples that count.
    """
    # Softmax is correct for sigmoid-trained heads too: given that exactly one of several
    # independent classes holds, their probabilities are proportional to their odds, exp(logit).
    log_probs = jax.nn.log_softmax(logits)
    best = jnp.max(log_probs, axis=1, initial=-jnp.inf, where=target_mask)
    # Counting strictly better classes would make logits correct that are all equal or NaN.
    rank = jnp.sum(~target_mask & ~(log_probs < best[:, None]), axis=1)
    rank = jnp.where(jnp.isnan(log_probs[:, 0]), max(logits.shape[1], 5), rank)
    log_likelihood = jax.nn.logsumexp(log_probs, axis=1, where=target_mask)
    return ExampleMetrics(rank, log_likelihood, jnp.exp(jnp.max(log_probs, axis=1)), mask)


def make_evaluator(
    model: Any, mesh: Mesh, input_config: EvalInputConfig, multi_label: bool
) -> Evaluator:
    """Creates the function that evaluates a model.

    Args:
        model: Flax module.
        mesh: Device mesh.
        input_config: Input pipeline.
        multi_label: Whether the model was trained on images with any number of labels. Otherwise,
            several labels of an image are several correct answers, of which it has to find one.
    """
    if multi_label:
        score_step = make_score_step(model, mesh)
        return lambda source, params: (
            score_source(score_step, params, source, mesh, input_config).metrics
        )
    eval_step = make_eval_step(model, mesh)
    return lambda source, params: evaluate(eval_step, params, source, mesh, input_config)


def make_eval_step(model: Any, mesh: Mesh) -> EvalStep:
    """Jits the model, followed by `per_example_metrics`. See `jit_inference`."""
    return jit_inference(model, mesh, batch_metrics)


def batch_metrics(logits: Float[Array, "n classes"], batch: Batch) -> ExampleMetrics:
    """Computes `per_example_metrics` for a batch of `eval_batches`."""
    return per_example_metrics(logits, label_mask(batch, logits.shape[1]), batch["mask"])


def evaluate(
    eval_step: EvalStep,
    params: Any,
    source: Source,
    mesh: Mesh,
    input_config: EvalInputConfig,
) -> ClassificationMetrics:
    """Computes classification metrics over every example of a source.

    Raises:
        UserError: Images are unusable and must not be skipped, or no example counts.
    """
    dataset_pass = DatasetPass(eval_step, params, source, mesh, input_config)
    return aggregate_pass(list(dataset_pass), source, dataset_pass.num_bad)


def aggregate_pass(
    batches: Sequence[ExampleMetrics], source: Source, num_bad: int
) -> ClassificationMetrics:
    """Aggregates the metrics of all batches of a pass over a source.

    Raises:
        UserError: No example counts.
    """
    if not any(batch.mask.any() for batch in batches):
        raise UserError(f"{source.name} has no example to evaluate on. Choose another split.")
    metrics = aggregate(jax.tree.map(lambda *columns: np.concatenate(columns), *batches))
    num_unlabeled = len(source) - metrics.num_examples - num_bad
    return metrics._replace(num_bad=num_bad, num_unlabeled=num_unlabeled)


def aggregate(examples: ExampleMetrics) -> ClassificationMetrics:
    """Aggregates the metrics of examples, with exact sums.

    Raises:
        ValueError: No example counts.
    """
    mask = np.asarray(examples.mask)
    rank, log_likelihood, confidence = (np.asarray(column)[mask] for column in examples[:3])
    if not rank.size:
        raise ValueError("examples.mask must select at least one example")
    is_correct = rank == 0
    return ClassificationMetrics(
        top1=float(is_correct.mean()),
        top5=float((rank < 5).mean()),
        log_likelihood=math.fsum(log_likelihood.tolist()) / rank.size,
        calibration_error=calibration_error(confidence, is_correct),
        num_examples=rank.size,
    )


def calibration_error(
    confidence: Float[np.ndarray, " n"], is_correct: Bool[np.ndarray, " n"]
) -> float:
    """Computes the expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3)."""
    if np.isnan(confidence).any():
        return math.nan
    bins = calibration_bins(confidence, is_correct)
    gaps = [abs(bin.confidence - bin.num_correct) for bin in bins]
    return math.fsum(gaps) / len(confidence)


class CalibrationBin(NamedTuple):
    """Examples whose confidence is in one of `NUM_CALIBRATION_BINS` equal intervals.

    Attributes:
        confidence: Sum of the examples' confidence.
    """

    num_examples: int
    num_correct: int
    confidence: float


def calibration_bins(
    confidence: Float[np.ndarray, " n"], is_correct: Bool[np.ndarray, " n"]
) -> list[CalibrationBin]:
    """Groups examples by confidence, which must not be NaN, from 0 to 1."""
    bins = np.minimum((confidence * NUM_CALIBRATION_BINS).astype(int), NUM_CALIBRATION_BINS - 1)
    return [
        CalibrationBin(
            int((bins == b).sum()),
            int(is_correct[bins == b].sum()),
            math.fsum(confidence[bins == b].tolist()),
        )
        for b in range(NUM_CALIBRATION_BINS)
    ]


class ClassMetrics(NamedTuple):
    """Metrics of one class, as fractions, or their average over classes.

    Attributes:
        precision: Fraction of the predictions of the class that are correct; 0 without any.
        recall: Fraction of the images of the class that are found; 0 without any.
        f1: Harmonic mean of precision and recall.
        support: Number of images of the class.
    """

    precision: float
    recall: float
    f1: float
    support: int


class ClassReport(NamedTuple):
    """Metrics per class.

    Attributes:
        classes: Metrics by class index, of classes that are the label or prediction of any image.
        averages: Their "macro average", and their "weighted average" by support.
    """

    classes: dict[int, ClassMetrics]
    averages: dict[str, ClassMetrics]


def class_metrics(
    labels: Int[np.ndarray, " n"] | Bool[np.ndarray, "n classes"],
    predicted: Int[np.ndarray, " n"] | Bool[np.ndarray, "n classes"],
    indices: Sequence[int] | None = None,
) -> list[ClassMetrics]:
    """Computes the metrics of every class, as scikit-learn does by default.

    Args:
        labels: Class of each image, or its mask of classes.
        predicted: Predicted class of each image, or its mask of predicted classes.
        indices: Classes; None: all that are in a label or prediction, or all of the masks.
    """
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(
        labels, predicted, labels=indices, average=None, zero_division=0
    )
    return [ClassMetrics(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]


def class_report(labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"]) -> ClassReport:
    """Computes the metrics of the classes that occur, and their averages."""
    from sklearn.metrics import precision_recall_fscore_support

    indices = np.union1d(labels, predicted).tolist()
    classes = dict(zip(indices, class_metrics(labels, predicted, indices), strict=True))
    averages = {}
    for average in ("macro", "weighted"):
        scores = precision_recall_fscore_support(
            labels, predicted, labels=indices, average=average, zero_division=0
        )
        precision, recall, f1 = map(float, scores[:3])
        averages[f"{average} average"] = ClassMetrics(precision, recall, f1, len(labels))
    return ClassReport(classes, averages)


class ConfusedPair(NamedTuple):
    """Number of images of class `label` that are predicted to be of class `predicted`."""

    label: int
    predicted: int
    num_images: int


def confused_pairs(
    labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"]
) -> list[ConfusedPair]:
    """Counts the pairs of a label and another, predicted class; the most frequent come first."""
    is_wrong = labels != predicted
    wrong = np.stack([labels[is_wrong], predicted[is_wrong]])
    pairs, counts = np.unique(wrong, axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rows = zip(*pairs[:, order].tolist(), counts[order].tolist(), strict=True)
    return [ConfusedPair(*row) for row in rows]
