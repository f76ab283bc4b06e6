"""Feature extraction: the input of the head for every example of a split, in chunks."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int

from mixer_jax.data.loader import Batch
from mixer_jax.data.source import Source
from mixer_jax.errors import UserError
from mixer_jax.evaluation.loop import DatasetPass, EvalInputConfig, jit_inference


class BatchFeatures(NamedTuple):
    """Features of a batch, including padding, which `mask` excludes."""

    features: Float32[Array, "n d"]
    labels: Int[Array, " n"]
    mask: Bool[Array, " n"]


class FeatureChunk(NamedTuple):
    """Features of some examples of a source, on the host, and their indices in the source."""

    features: Float32[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]
    indices: Int[np.ndarray, " n"]


FeatureFn = Callable[[Any, Batch], BatchFeatures]


def make_feature_fn(model: Any, mesh: Mesh) -> FeatureFn:
    """Jits the model without its head; parameters may include the head. See `jit_inference`."""

    def postprocess(features: Array, batch: Batch) -> BatchFeatures:
        return BatchFeatures(features.astype(jnp.float32), batch["label"], batch["mask"])

    return jit_inference(model.clone(num_classes=0), mesh, postprocess)


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
        """Initializes the extractor; examples must have one label each."""
        self._name = source.name
        self._pass = DatasetPass(feature_fn, params, source, mesh, input_config)

    @property
    def num_bad(self) -> int:
        """Number of unusable images that were skipped; known after the last chunk."""
        return self._pass.num_bad

    def __iter__(self) -> Iterator[FeatureChunk]:
        """Yields the chunks.

        Raises:
            UserError: Features are not finite; or, at the end, images are unusable and must not be
                skipped.
        """
        start = 0
        for features, labels, mask in self._pass:
            rows = np.flatnonzero(mask)
            chunk = FeatureChunk(np.asarray(features)[rows], np.asarray(labels)[rows], start + rows)
            start += len(mask)
            if not np.isfinite(chunk.features).all():
                raise UserError(
                    f"{self._name}: features must be finite, got NaN or infinity. The weights are "
                    "damaged or diverged; choose another checkpoint."
                )
            if len(rows):
                yield chunk


def rechunk(chunks: Iterable[FeatureChunk], min_rows: int) -> Iterator[FeatureChunk]:
    """Concatenates chunks until each has at least `min_rows` rows, except for the last one."""
    buffer: list[FeatureChunk] = []
    for chunk in chunks:
        buffer.append(chunk)
        if sum(len(c.labels) for c in buffer) >= min_rows:
            yield FeatureChunk(*map(np.concatenate, zip(*buffer, strict=True)))
            buffer.clear()
    if buffer:
        yield FeatureChunk(*map(np.concatenate, zip(*buffer, strict=True)))
