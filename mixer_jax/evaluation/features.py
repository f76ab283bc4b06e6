"""Feature extraction: the input of the head for every example of a split, in chunks."""

import functools
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
from mixer_jax.models.stack import compute_layers


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


class LayerBatch(NamedTuple):
    """Activations of a batch by name, including padding and bad images, which `mask` excludes."""

    layers: dict[str, Float32[Array, "n ..."]]
    mask: Bool[Array, " n"]


def make_layer_fn(
    model: Any, mesh: Mesh, layers: tuple[str, ...], pool: bool
) -> Callable[[Any, Batch], LayerBatch]:
    """Jits a model's activations, which stay sharded over the images of a batch.

    Args:
        model: Flax module.
        mesh: Devices of this host.
        layers: Names of activations; see `compute_layers`.
        pool: Whether activations are averaged over tokens or positions.
    """

    def postprocess(found: dict[str, Array], batch: Batch) -> LayerBatch:
        if pool:
            found = {name: x.mean(tuple(range(1, x.ndim - 1))) for name, x in found.items()}
        return LayerBatch(found, batch["mask"])

    forward = functools.partial(compute_layers, layers=layers)
    return jit_inference(model, mesh, postprocess, forward=forward, is_replicated=False)


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
            check_finite(self._name, chunk.features)
            if len(rows):
                yield chunk


def check_finite(source_name: str, features: np.ndarray) -> None:
    """Raises UserError if features of a source are not finite."""
    if not np.isfinite(features).all():
        raise UserError(
            f"{source_name}: features must be finite, got NaN or infinity. The weights are damaged "
            "or diverged; choose another checkpoint."
        )


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
