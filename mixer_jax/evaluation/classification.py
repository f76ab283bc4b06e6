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

from mixer_jax.data.pipeline import Batch, eval_batches
from mixer_jax.data.preprocess import to_model_range
from mixer_jax.data.sources import Source
from mixer_jax.model.mixer import MlpMixer
from mixer_jax.parallel.sharding import batch_sharding, replicated

NUM_CALIBRATION_BINS = 15


class Scores(NamedTuple):
    """What a split says of a model; shares lie in [0, 1].

    Attributes:
        top1: share of examples whose most probable class is right.
        top5: share whose right class is among the five most probable.
        log_likelihood: mean log-probability of the right class, nats.
        calibration_error: expected calibration error, over 15 equal bins of confidence.
        num_examples: how many were counted.
    """

    top1: float
    top5: float
    log_likelihood: float
    calibration_error: float
    num_examples: int


class Judgements(NamedTuple):
    """What is known of each example of a batch.

    Attributes:
        rank: classes at least as probable as the right one, itself not counted; 0 is best. All
            classes, where the logits are not numbers.
        log_likelihood: log-probability of the right class.
        confidence: probability of the likeliest class.
        mask: false for padding, which does not count.
    """

    rank: Int[Array, " n"]
    log_likelihood: Float[Array, " n"]
    confidence: Float[Array, " n"]
    mask: Bool[Array, " n"]


JudgeBatch = Callable[[Any, Batch], Judgements]


def judge(
    logits: Float[Array, "n classes"], labels: Int[Array, " n"], mask: Bool[Array, " n"]
) -> Judgements:
    """Judges every example of a batch on its own; a tie counts against the model."""
    # Softmax is right for sigmoid-trained heads as well: given that exactly one of several
    # independent classes holds, their probabilities are proportional to their odds, exp(logit).
    log_probs = jax.nn.log_softmax(logits)
    right = jnp.take_along_axis(log_probs, labels[:, None], axis=1)
    # Not "count the strictly better": logits that are all alike, or not numbers, would be right.
    better = logits.shape[1] - 1 - jnp.sum(log_probs < right, axis=1)
    rank = jnp.where(jnp.isnan(right[:, 0]), logits.shape[1], better)
    return Judgements(rank, right[:, 0], jnp.exp(jnp.max(log_probs, axis=1)), mask)


def compile_judge(model: MlpMixer, mesh: Mesh) -> JudgeBatch:
    """Returns `judge` for a model's parameters and a batch of `eval_batches`, compiled.

    The judgements lie whole on every device, so that every host can read all of them. Nothing is
    donated: parameters outlive an evaluation.
    """

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def judge_batch(params: Any, batch: Batch) -> Judgements:
        logits = model.apply({"params": params}, to_model_range(batch["image"]))
        return judge(logits, batch["label"], batch["mask"])

    return judge_batch


def evaluate(
    judge_batch: JudgeBatch,
    params: Any,
    source: Source,
    mesh: Mesh,
    *,
    batch_size: int,
    image_size: int,
    eval_crop: str,
    threads: int,
    prefetch_batches: int,
) -> Scores:
    """Scores a model on every example of a source.

    Args:
        judge_batch: from `compile_judge`.
        params: of the model.
        source: what to score on.
        mesh: of devices.
        batch_size: images at a time over all devices; rounded up to a multiple of their number.
        image_size: as `eval_batches` takes it, like the three below.
        eval_crop: likewise.
        threads: likewise.
        prefetch_batches: likewise.
    """
    batches = eval_batches(
        source,
        batch_size=math.ceil(batch_size / mesh.size) * mesh.size,
        image_size=image_size,
        eval_crop=eval_crop,
        threads=threads,
        prefetch_batches=prefetch_batches,
        sharding=batch_sharding(mesh),
    )
    finished: list[Judgements] = []
    running: Judgements | None = None
    for batch in batches:
        # Sent off before the last one is read, so that the device need not wait for the host.
        started = judge_batch(params, batch)
        if running is not None:
            finished.append(jax.device_get(running))
        running = started
    if running is None:
        raise ValueError(f"{source.name}: there is no example to score")
    finished.append(jax.device_get(running))
    return summarize(jax.tree.map(lambda *batches: np.concatenate(batches), *finished))


def summarize(judgements: Judgements) -> Scores:
    """Returns the scores of examples judged one by one, summed in float64.

    Raises:
        ValueError: no example counts.
    """
    mask = np.asarray(judgements.mask)
    rank, log_likelihood, confidence = (np.asarray(column)[mask] for column in judgements[:3])
    if not rank.size:
        raise ValueError("there is no example to score")
    right = rank == 0
    return Scores(
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
