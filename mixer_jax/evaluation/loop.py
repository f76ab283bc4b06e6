"""Evaluation loop: every example of a split exactly once, in order, for any batch size."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from mixer_jax.data.loader import Batch, eval_batches
from mixer_jax.data.permutation import PixelPermutation
from mixer_jax.data.preprocess import CROP_FRACTION
from mixer_jax.data.readers import BadImage
from mixer_jax.data.source import Source
from mixer_jax.distributed import multihost
from mixer_jax.distributed.sharding import batch_sharding, replicate, replicated
from mixer_jax.distributed.xla_options import compiler_options
from mixer_jax.errors import UserError, abbreviate
from mixer_jax.models.layers import normalize_images
from mixer_jax.models.stack import use_partitionable_backend

Output = TypeVar("Output")


class EvalInputConfig(NamedTuple):
    """Input pipeline of an evaluation.

    Attributes:
        batch_size: Global batch size; rounded up to a multiple of the number of devices.
        image_size: Height and width, in pixels.
        skip_bad: Whether unusable images are skipped; otherwise they are an error.
        num_threads: Threads that load images; 0 chooses by the number of cores.
        count_unlabeled: Whether images without labels count: they have none of the classes.
    """

    batch_size: int
    image_size: tuple[int, int]
    eval_crop: str
    exif_orientation: bool
    skip_bad: bool
    num_threads: int
    prefetch_batches: int
    eval_crop_fraction: float = CROP_FRACTION
    permutation: PixelPermutation | None = None
    count_unlabeled: bool = False


def _apply(model: Any, params: Any, images: Array) -> Array:
    return model.apply({"params": params}, images)


def jit_inference(
    model: Any,
    mesh: Mesh,
    postprocess: Callable[[Any, Batch], Output],
    *,
    forward: Callable[[Any, Any, Array], Any] = _apply,
    is_replicated: bool = True,
) -> Callable[[Any, Batch], Output]:
    """Jits a model for parameters and a batch of `eval_batches`.

    Nothing is donated: parameters outlive an evaluation.

    Args:
        model: Flax module.
        mesh: Device mesh.
        postprocess: Function from the model's output and the batch to the result.
        forward: Function from model, parameters and images in [-1, 1] to the output.
        is_replicated: Whether every device gets all of the result, so that every host can read it;
            otherwise, it is sharded over the images of the batch.
    """
    model = use_partitionable_backend(model, mesh.size)
    options = compiler_options(mesh.devices.flat[0].platform, model.execution.backend)

    out_sharding = replicated(mesh) if is_replicated else batch_sharding(mesh)

    @functools.partial(jax.jit, out_shardings=out_sharding, compiler_options=options)
    def step(params: Any, batch: Batch) -> Output:
        params = replicate(params, mesh)
        return postprocess(forward(model, params, normalize_images(batch["image"])), batch)

    return step


def label_mask(batch: Batch, num_classes: int) -> Bool[Array, "n classes"]:
    """Converts the labels of a batch of `eval_batches` to masks of classes."""
    labels = batch["label"]
    return jax.nn.one_hot(labels, num_classes, dtype=jnp.bool_) if labels.ndim == 1 else labels


class DatasetPass(Generic[Output]):
    """One pass of a compiled function over a source. Iterate over it once.

    Attributes:
        bad: Unusable images on this host, in order; those of a batch precede its output.
        num_bad: Unusable images on all hosts; known after the last batch.
    """

    def __init__(
        self,
        fn: Callable[[Any, Batch], Output],
        params: Any,
        source: Source,
        mesh: Mesh,
        input_config: EvalInputConfig,
    ):
        """Initializes a pass of `fn`, a result of `jit_inference`, over every example."""
        self._fn, self._params = fn, params
        self._source, self._mesh, self._input_config = source, mesh, input_config
        self.bad: list[BadImage] = []
        self.num_bad = 0

    def __iter__(self) -> Iterator[Output]:
        """Yields the output for each batch, on the host.

        Raises:
            UserError: The source has another number of examples on another host; or, at the end,
                images are unusable and `skip_bad` is false.
        """
        self._check_sizes()
        pending: Output | None = None
        with contextlib.closing(self._batches()) as batches:
            for batch in batches:
                # Dispatched before the last output is read, so that the device never waits.
                dispatched = self._fn(self._params, batch)
                if pending is not None:
                    yield jax.device_get(pending)
                pending = dispatched
        if pending is not None:
            yield jax.device_get(pending)
        # Only at the end: if this host raised at the first bad image, the others would hang.
        (self.num_bad,) = multihost.sum_across_hosts(len(self.bad))
        if self.num_bad and not self._input_config.skip_bad:
            raise bad_images_error(self._source, self.bad, self.num_bad)

    def _check_sizes(self) -> None:
        """Checks that all hosts have as many batches, so that none waits for one that has ended."""
        sizes = multihost.all_gather(np.array(len(self._source))).tolist()
        if len(set(sizes)) > 1:
            raise UserError(
                f"{self._source.name} must have the same images on all hosts, got "
                f"{', '.join(f'{size:,}' for size in sizes)}. Copy the same files to every host."
            )

    def _batches(self) -> Any:
        config = self._input_config
        return eval_batches(
            self._source,
            batch_size=math.ceil(config.batch_size / self._mesh.size) * self._mesh.size,
            image_size=config.image_size,
            eval_crop=config.eval_crop,
            eval_crop_fraction=config.eval_crop_fraction,
            exif_orientation=config.exif_orientation,
            permutation=config.permutation,
            count_unlabeled=config.count_unlabeled,
            num_threads=config.num_threads,
            prefetch_batches=config.prefetch_batches,
            sharding=batch_sharding(self._mesh),
            on_bad_images=lambda step, found: self.bad.extend(found),
        )


def bad_images_error(source: Source, bad: list[BadImage], num_bad: int) -> UserError:
    """Creates the error about `num_bad` unusable images on all hosts; `bad` are on this one."""
    named = abbreviate(f"{name} ({reason})" for name, reason in bad)
    images = "image" if num_bad == 1 else "images"
    return UserError(
        f"{source.name}: {num_bad:,} unusable {images}: "
        f"{named or 'listed by another host'}. Fix or remove them, or skip unusable "
        "images: --config.bad_images.skip_in_evaluation=true, or --skip_bad_images for "
        "mixer_jax.evaluate and mixer_jax.extract."
    )
