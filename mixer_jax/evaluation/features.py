"""Features before the head, of every example of a split, chunk by chunk."""

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
from mixer_jax.models.mixer import MlpMixer
from mixer_jax.models.stack import use_partitionable_backend


class BatchFeatures(NamedTuple):
    """The features of a batch, padding and all.

    Attributes:
        features: what the head would see.
        labels: of the examples.
        mask: false for what does not count.
    """

    features: Float32[Array, "n d"]
    labels: Int[Array, " n"]
    mask: Bool[Array, " n"]


class Chunk(NamedTuple):
    """The features of some examples of a source, on the host.

    Attributes:
        features: one row an example.
        labels: of the examples.
        places: of the examples in the source.
    """

    features: Float32[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]
    places: Int[np.ndarray, " n"]


FeatureFn = Callable[[Any, Batch], BatchFeatures]


def make_feature_fn(model: MlpMixer, mesh: Mesh) -> FeatureFn:
    """Returns the model without its head, for parameters and a batch of `eval_batches`, compiled.

    The features lie whole on every device, so that every host can read all of them. The head's
    parameters may be there or not; nothing is donated.
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
    """The features of every example of a source, once, in order, in chunks without padding.

    It is there to be iterated over once; nothing of a chunk is kept.
    """

    def __init__(
        self,
        feature_fn: FeatureFn,
        params: Any,
        source: Source,
        mesh: Mesh,
        reading: EvalInputConfig,
    ):
        """Takes what is passed over.

        Args:
            feature_fn: from `make_feature_fn`.
            params: of the model.
            source: of the examples, each with one label.
            mesh: of devices.
            reading: how they are read.
        """
        self._name = source.name
        self._pass = DatasetPass(feature_fn, params, source, mesh, reading)

    @property
    def num_bad(self) -> int:
        """How many images were left out because they cannot be used, after the last chunk."""
        return self._pass.num_bad

    def __iter__(self) -> Iterator[Chunk]:
        """Yields the chunks.

        Raises:
            UserError: features are not finite; or at the end, images cannot be used and none may
                be left out.
        """
        start = 0
        for features, labels, mask in self._pass:
            rows = np.flatnonzero(mask)
            chunk = Chunk(np.asarray(features)[rows], np.asarray(labels)[rows], start + rows)
            start += len(mask)
            if not np.isfinite(chunk.features).all():
                raise UserError(
                    f"{self._name}: some features are not finite numbers, so the weights are "
                    "damaged or diverged; choose others"
                )
            if len(rows):
                yield chunk


def rechunk(chunks: Iterable[Chunk], rows: int) -> Iterator[Chunk]:
    """Yields the same in larger chunks.

    Args:
        chunks: of one pass.
        rows: that one has at least, but for the last.
    """
    held: list[Chunk] = []
    for chunk in chunks:
        held.append(chunk)
        if sum(len(one.labels) for one in held) >= rows:
            yield Chunk(*map(np.concatenate, zip(*held, strict=True)))
            held.clear()
    if held:
        yield Chunk(*map(np.concatenate, zip(*held, strict=True)))
