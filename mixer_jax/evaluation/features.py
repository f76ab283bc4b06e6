"""Feature extraction: the input of the head for every example of a split, in chunks."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int

from mixer_jax.data.loader import Batch
from mixer_jax.data.source import Source
from mixer_jax.distributed.sharding import replicate, replicated
from mixer_jax.distributed.xla_options import compiler_options
from mixer_jax.errors import UserError
from mixer_jax.evaluation.loop import DatasetPass, EvalInputConfig
from mixer_jax.models.layers import normalize_images
from mixer_jax.models.stack import use_partitionable_backend


class BatchFeatures(NamedTuple):
    """Features of a batch, including padding.

    Attributes:
        features: Input of the head.
        labels: Labels of the examples.
        mask: Whether the example counts.
    """

    features: Float32[Array, "n d"]
    labels: Int[Array, " n"]
    mask: Bool[Array, " n"]


class Chunk(NamedTuple):
    """Features of some examples of a source, on the host.

    Attributes:
        features: One row per example.
        labels: Labels of the examples.
        indices: Indices of the examples in the source.
    """

    features: Float32[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]
    indices: Int[np.ndarray, " n"]


FeatureFn = Callable[[Any, Batch], BatchFeatures]


def make_feature_fn(model: Any, mesh: Mesh) -> FeatureFn:
    """Compiles the model without its head, for parameters and a batch of `eval_batches`.

    The result is replicated, so that every host can read all features. Parameters may include the
    head; nothing is donated.
    """
    headless = use_partitionable_backend(model.clone(num_classes=0), mesh.size)
    options = compiler_options(mesh.devices.flat[0].platform, headless.execution.backend)

    @functools.partial(jax.jit, out_shardings=replicated(mesh), compiler_options=options)
    def feature_fn(params: Any, batch: Batch) -> BatchFeatures:
        params = replicate(params, mesh)
        features = headless.apply({"params": params}, normalize_images(batch["image"]))
        return BatchFeatures(features.astype(jnp.float32), batch["label"], batch["mask"])

    return feature_fn


class FeatureExtractor:
    """Features of every example of a source, in order, in chunks without padding.

    Iterate over it once. It does not hold on to the chunks.
    """

    def __init__(
        self,
        feature_fn: FeatureFn,
        params: Any,
        source: Source,
        mesh: Mesh,
        input_config: EvalInputConfig,
    ):
        """Initializes the extractor.

        Args:
            feature_fn: Result of `make_feature_fn`.
            params: Parameters of the model.
            source: Examples with one label each.
            mesh: Mesh of devices.
            input_config: Input pipeline.
        """
        self._name = source.name
        self._pass = DatasetPass(feature_fn, params, source, mesh, input_config)

    @property
    def num_bad(self) -> int:
        """Number of unusable images that were skipped; known after the last chunk."""
        return self._pass.num_bad

    def __iter__(self) -> Iterator[Chunk]:
        """Yields the chunks.

        Raises:
            UserError: Features are not finite; or, at the end, images are unusable and must not be
                skipped.
        """
        start = 0
        for features, labels, mask in self._pass:
            rows = np.flatnonzero(mask)
            chunk = Chunk(np.asarray(features)[rows], np.asarray(labels)[rows], start + rows)
            start += len(mask)
            if not np.isfinite(chunk.features).all():
                raise UserError(
                    f"{self._name}: features must be finite, got NaN or infinity. The weights are "
                    "damaged or diverged; choose another checkpoint."
                )
            if len(rows):
                yield chunk


def rechunk(chunks: Iterable[Chunk], min_rows: int) -> Iterator[Chunk]:
    """Concatenates chunks until each has at least `min_rows` rows, except for the last one."""
    buffer: list[Chunk] = []
    for chunk in chunks:
        buffer.append(chunk)
        if sum(len(c.labels) for c in buffer) >= min_rows:
            yield Chunk(*map(np.concatenate, zip(*buffer, strict=True)))
            buffer.clear()
    if buffer:
        yield Chunk(*map(np.concatenate, zip(*buffer, strict=True)))
