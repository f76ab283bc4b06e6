"""Features before the head, of every example of a split, chunk by chunk."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int

from mixer_jax.data.examples import Source
from mixer_jax.data.pipeline import Batch
from mixer_jax.errors import UserError
from mixer_jax.evaluation.passes import Pass, Reading
from mixer_jax.model.making import for_devices
from mixer_jax.model.mixer import MlpMixer
from mixer_jax.model.pixels import to_model_range
from mixer_jax.parallel.compiler import compiler_options
from mixer_jax.parallel.sharding import gathered, replicated


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


FeaturesOf = Callable[[Any, Batch], BatchFeatures]


def compile_features(model: MlpMixer, mesh: Mesh) -> FeaturesOf:
    """Returns the model without its head, for parameters and a batch of `eval_batches`, compiled.

    The features lie whole on every device, so that every host can read all of them. The head's
    parameters may be there or not; nothing is donated.
    """
    headless = for_devices(model.clone(num_classes=0), mesh.size)
    options = compiler_options(mesh.devices.flat[0].platform, headless.kernels)

    @functools.partial(jax.jit, out_shardings=replicated(mesh), compiler_options=options)
    def features_of(params: Any, batch: Batch) -> BatchFeatures:
        params = gathered(params, mesh)
        features = headless.apply({"params": params}, to_model_range(batch["image"]))
        return BatchFeatures(features.astype(jnp.float32), batch["label"], batch["mask"])

    return features_of


class FeaturePass:
    """The features of every example of a source, once, in order, in chunks without padding.

    It is there to be iterated over once; nothing of a chunk is kept.
    """

    def __init__(
        self, features_of: FeaturesOf, params: Any, source: Source, mesh: Mesh, reading: Reading
    ):
        """Takes what is passed over.

        Args:
            features_of: from `compile_features`.
            params: of the model.
            source: of the examples, each with one label.
            mesh: of devices.
            reading: how they are read.
        """
        self._name = source.name
        self._pass = Pass(features_of, params, source, mesh, reading)

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


def together(chunks: Iterable[Chunk], rows: int) -> Iterator[Chunk]:
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
