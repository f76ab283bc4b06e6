"""Scores of a classifier on a whole split, every example counted exactly once."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from mixer_jax.data.loader import Batch
from mixer_jax.data.source import Source
from mixer_jax.distributed.sharding import replicate, replicated
from mixer_jax.distributed.xla_options import compiler_options
from mixer_jax.errors import UserError
from mixer_jax.evaluation.loop import DatasetPass, EvalInputConfig
from mixer_jax.models.layers import normalize_images
from mixer_jax.models.mixer import MlpMixer
from mixer_jax.models.stack import use_partitionable_backend

NUM_CALIBRATION_BINS = 15


class ClassificationMetrics(NamedTuple):
    """What a split says of a model; shares lie in [0, 1].

    Attributes:
        top1: share of examples whose most probable class is right.
        top5: share whose right class is among the five most probable.
        log_likelihood: mean log-probability of the right class, nats.
        calibration_error: expected calibration error, over 15 equal bins of confidence.
        num_examples: how many were counted.
        num_bad: how many were left out because their images cannot be used.
        num_unlabelled: how many were left out because no answer is right.
    """

    top1: float
    top5: float
    log_likelihood: float
    calibration_error: float
    num_examples: int
    num_bad: int = 0
    num_unlabelled: int = 0

    def counted(self) -> str:
        """Returns how many were counted and left out, for people."""
        parts = [f"{self.num_examples:,} images"]
        if self.num_bad:
            parts.append(f"{self.num_bad:,} left out that cannot be used")
        if self.num_unlabelled:
            parts.append(f"{self.num_unlabelled:,} left out without a right answer")
        return ", ".join(parts)

    def values(self) -> dict[str, float]:
        """Returns every number by its name, for files and pictures."""
        return {name: float(value) for name, value in self._asdict().items()}

    def told(self) -> str:
        """Returns what is said of an evaluation while a run goes on."""
        return (
            f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%}, "
            f"log-likelihood {self.log_likelihood:.4f} on {self.counted()}"
        )

    def summary(self) -> str:
        """Returns what is said of an evaluation when a run ends."""
        return (
            f"{self.top1:.2%} top-1, {self.top5:.2%} top-5, calibration error "
            f"{self.calibration_error:.2%}, on {self.counted()}"
        )


class ExampleMetrics(NamedTuple):
    """What is known of each example of a batch.

    Attributes:
        rank: wrong classes at least as probable as the most probable right one; 0 is best. All
            classes, where the logits are not numbers.
        log_likelihood: log-probability that a right class holds.
        confidence: probability of the likeliest class.
        mask: false for what does not count.
    """

    rank: Int[Array, " n"]
    log_likelihood: Float[Array, " n"]
    confidence: Float[Array, " n"]
    mask: Bool[Array, " n"]


EvalStep = Callable[[Any, Batch], ExampleMetrics]


def per_example_metrics(
    logits: Float[Array, "n classes"], right: Bool[Array, "n classes"], mask: Bool[Array, " n"]
) -> ExampleMetrics:
    """Judges every example of a batch on its own; a tie counts against the model.

    Args:
        logits: of the model.
        right: which classes are right: one, or for ReaL labels (arXiv 2006.07159) one or several.
        mask: which examples count.
    """
    # Softmax is right for sigmoid-trained heads as well: given that exactly one of several
    # independent classes holds, their probabilities are proportional to their odds, exp(logit).
    log_probs = jax.nn.log_softmax(logits)
    best = jnp.max(log_probs, axis=1, initial=-jnp.inf, where=right)
    # Not "count the strictly better": logits that are all alike, or not numbers, would be right.
    rank = jnp.sum(~right & ~(log_probs < best[:, None]), axis=1)
    rank = jnp.where(jnp.isnan(log_probs[:, 0]), logits.shape[1], rank)
    log_likelihood = jax.nn.logsumexp(log_probs, axis=1, where=right)
    return ExampleMetrics(rank, log_likelihood, jnp.exp(jnp.max(log_probs, axis=1)), mask)


def make_eval_step(model: MlpMixer, mesh: Mesh) -> EvalStep:
    """Compiles `per_example_metrics` of a model's parameters and a batch of `eval_batches`.

    The result is replicated, so that every host can read all of it. Nothing is donated:
    parameters outlive an evaluation.
    """
    model = use_partitionable_backend(model, mesh.size)
    options = compiler_options(mesh.devices.flat[0].platform, model.execution.backend)

    @functools.partial(jax.jit, out_shardings=replicated(mesh), compiler_options=options)
    def eval_step(params: Any, batch: Batch) -> ExampleMetrics:
        params = replicate(params, mesh)
        logits = model.apply({"params": params}, normalize_images(batch["image"]))
        right = batch["label"]
        if right.ndim == 1:
            right = jax.nn.one_hot(right, logits.shape[1], dtype=jnp.bool_)
        return per_example_metrics(logits, right, batch["mask"])

    return eval_step


def evaluate(
    eval_step: EvalStep,
    params: Any,
    source: Source,
    mesh: Mesh,
    reading: EvalInputConfig,
) -> ClassificationMetrics:
    """Scores a model on every example of a source.

    Args:
        eval_step: from `make_eval_step`.
        params: of the model.
        source: what to score on.
        mesh: of devices.
        reading: how they are read and prepared.

    Raises:
        UserError: images cannot be used and none may be left out; or no example counts.
    """
    judging = DatasetPass(eval_step, params, source, mesh, reading)
    finished = list(judging)
    if not any(metrics_per_example.mask.any() for metrics_per_example in finished):
        raise UserError(f"{source.name}: there is no example to score")
    scores = aggregate(jax.tree.map(lambda *batches: np.concatenate(batches), *finished))
    num_unlabelled = len(source) - scores.num_examples - judging.num_bad
    return scores._replace(num_bad=judging.num_bad, num_unlabelled=num_unlabelled)


def aggregate(metrics_per_example: ExampleMetrics) -> ClassificationMetrics:
    """Returns the scores of examples judged one by one, summed in float64.

    Raises:
        ValueError: no example counts.
    """
    mask = np.asarray(metrics_per_example.mask)
    rank, log_likelihood, confidence = (
        np.asarray(column)[mask] for column in metrics_per_example[:3]
    )
    if not rank.size:
        raise ValueError("there is no example to score")
    right = rank == 0
    return ClassificationMetrics(
        top1=float(right.mean()),
        top5=float((rank < 5).mean()),
        log_likelihood=math.fsum(log_likelihood.tolist()) / rank.size,
        calibration_error=calibration_error(confidence, right),
        num_examples=rank.size,
    )


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Returns the expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3).

    Args:
        confidence: (n,) probability of the likeliest class.
        right: (n,) whether that class is the right one.
    """
    if np.isnan(confidence).any():
        return math.nan
    bins = np.minimum((confidence * NUM_CALIBRATION_BINS).astype(int), NUM_CALIBRATION_BINS - 1)
    gaps = [
        abs(math.fsum(confidence[bins == b].tolist()) - int(right[bins == b].sum()))
        for b in range(NUM_CALIBRATION_BINS)
    ]
    return math.fsum(gaps) / len(confidence)
