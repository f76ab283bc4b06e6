"""Multi-label metrics over a split: average precision, with every example counted exactly once."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32

from mixer_jax.data.loader import Batch
from mixer_jax.data.readers import BadImage
from mixer_jax.data.source import Source
from mixer_jax.data.wordnet import label_class
from mixer_jax.errors import UserError
from mixer_jax.evaluation.loop import DatasetPass, EvalInputConfig, jit_inference, label_mask

# Classes of which the command `evaluate` prints a line.
_MAX_TABLE_CLASSES = 100


class ClassPrecision(NamedTuple):
    """Average precision of one class.

    Attributes:
        average_precision: Fraction; NaN without any image of the class, or if logits are NaN.
        num_images: Number of images of the class.
    """

    name: str
    average_precision: float
    num_images: int


class MultiLabelMetrics(NamedTuple):
    """Metrics of images with any number of labels, as fractions.

    Attributes:
        mean_average_precision: Mean of the classes' average precision, over those with an image.
        micro_average_precision: Average precision of all pairs of an image and a class together.
        loss: Mean over examples of the binary cross-entropy, summed over classes, in nats.
        num_scored_classes: Number of classes with an image, which the mean is over.
        num_bad: Examples skipped because their images are unusable.
        classes: Metrics of every class.
    """

    mean_average_precision: float
    micro_average_precision: float
    loss: float
    num_scored_classes: int
    num_examples: int
    num_bad: int = 0
    classes: tuple[ClassPrecision, ...] = ()

    def format_counts(self) -> str:
        """Formats the numbers of examples and classes counted and skipped."""
        parts = [f"{self.num_examples:,} images"]
        if self.num_bad:
            parts.append(f"{self.num_bad:,} unusable skipped")
        if without := len(self.classes) - self.num_scored_classes:
            scored = f"{self.num_scored_classes:,} of {len(self.classes):,} classes"
            parts.append(f"{scored} ({without:,} without images)")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, float]:
        """Returns every metric of all classes together by name."""
        return {name: float(x) for name, x in self._asdict().items() if name != "classes"}

    def as_json(self) -> dict[str, Any]:
        """Converts to JSON-serializable metrics; average precision is None without an image."""
        per_class = {
            values.name: {
                "class_index": index,
                "average_precision": values.average_precision if values.num_images else None,
                "num_images": values.num_images,
            }
            for index, values in enumerate(self.classes)
        }
        return {**self._asdict(), "classes": per_class}

    def format_table(self) -> list[str]:
        """Formats the lines that the command `evaluate` prints, lowest average precision first."""
        classes = sorted(
            (values for values in self.classes if values.num_images),
            key=lambda values: (values.average_precision, values.name),
        )
        shown = classes[:_MAX_TABLE_CLASSES]
        lines = [
            f"mAP                {self.mean_average_precision:.2%}",
            f"micro AP           {self.micro_average_precision:.2%}",
            f"loss               {self.loss:.4f} nats per image",
            "",
            f"{'AP':>7}  {'images':>9}  class",
            *(
                f"{x.average_precision:7.2%}  {x.num_images:9,}  {label_class(x.name)}"
                for x in shown
            ),
        ]
        if len(shown) < len(classes):
            lines.append(f"{len(classes) - len(shown):,} more classes: --json, --report")
        return lines

    def format_progress(self) -> str:
        """Formats the line that is logged during training."""
        return (
            f"mAP {self.mean_average_precision:.2%}, micro AP {self.micro_average_precision:.2%}, "
            f"loss {self.loss:.4f} on {self.format_counts()}"
        )

    def format_summary(self) -> str:
        """Formats the line that is printed at the end of a run."""
        return self.format_progress()


class ExampleScores(NamedTuple):
    """Scores of each example of a batch.

    Attributes:
        logits: Output of the model.
        labels: Classes of the examples.
        loss: Binary cross-entropy, summed over classes.
        mask: Examples that count.
    """

    logits: Float[Array, "n classes"]
    labels: Bool[Array, "n classes"]
    loss: Float[Array, " n"]
    mask: Bool[Array, " n"]


ScoreStep = Callable[[Any, Batch], ExampleScores]


def make_score_step(model: Any, mesh: Mesh) -> ScoreStep:
    """Jits the model, followed by the scores of each image. See `jit_inference`."""

    def postprocess(logits: Array, batch: Batch) -> ExampleScores:
        labels = label_mask(batch, logits.shape[1])
        loss = optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype))
        return ExampleScores(logits, labels, jnp.sum(loss, axis=1), batch["mask"])

    return jit_inference(model, mesh, postprocess)


class ScoredSource(NamedTuple):
    """Metrics of a source, and the scores that they follow from.

    Attributes:
        scores: Scores of all examples in the order of the source, unusable ones included.
        bad: Unusable images on this host, in order.
    """

    metrics: MultiLabelMetrics
    scores: ExampleScores
    bad: list[BadImage]


def score_source(
    step: ScoreStep, params: Any, source: Source, mesh: Mesh, input_config: EvalInputConfig
) -> ScoredSource:
    """Computes scores and metrics of every example of a source.

    Images without labels count. All scores are held in memory: 5 bytes per image and class.

    Args:
        step: Result of `make_score_step`.
        params: Parameters of the model.
        source: Source with any number of labels per image.
        mesh: Device mesh.
        input_config: Input pipeline.

    Raises:
        UserError: Images are unusable and must not be skipped, or no example has a label.
    """
    input_config = input_config._replace(count_unlabeled=True)
    dataset_pass = DatasetPass(step, params, source, mesh, input_config)
    batches = list(dataset_pass)
    if not any(batch.labels[batch.mask].any() for batch in batches):
        raise UserError(
            f"{source.name} has no labeled example to evaluate on. Choose another split."
        )
    # The last batch is padded.
    scores = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(source)], *batches)
    metrics = aggregate_scores(scores, source.class_names)._replace(num_bad=dataset_pass.num_bad)
    return ScoredSource(metrics, scores, dataset_pass.bad)


def aggregate_scores(scores: ExampleScores, class_names: Sequence[str]) -> MultiLabelMetrics:
    """Aggregates the scores of examples, at least one of which has a label.

    Logits are compared, because probabilities near 0 and 1 round to ties.
    """
    mask = np.asarray(scores.mask)
    logits, labels, loss = (np.asarray(column)[mask] for column in scores[:3])
    # A class without any image has none, where scikit-learn warns and returns 0.
    classes = [
        ClassPrecision(name, average_precision(column, is_label), int(is_label.sum()))
        for name, column, is_label in zip(class_names, logits.T, labels.T, strict=True)
    ]
    found = [values.average_precision for values in classes if values.num_images]
    return MultiLabelMetrics(
        mean_average_precision=math.fsum(found) / len(found),
        micro_average_precision=average_precision(logits.ravel(), labels.ravel()),
        loss=math.fsum(loss.tolist()) / len(loss),
        num_scored_classes=len(found),
        num_examples=len(loss),
        classes=tuple(classes),
    )


def average_precision(scores: Float32[np.ndarray, " n"], is_label: Bool[np.ndarray, " n"]) -> float:
    """Computes the average precision of a class as scikit-learn does, equal scores being one rank.

    It is NaN without any image of the class, or if scores are, since NaN has no order.
    """
    from sklearn.metrics import average_precision_score

    if not is_label.any() or np.isnan(scores).any():
        return math.nan
    return float(average_precision_score(is_label, scores))
