"""A pass of a compiled function over a split: every example once, in order, for any batch size."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh

from mixer_jax.data.loader import Batch, eval_batches
from mixer_jax.data.readers import BadImage
from mixer_jax.data.source import Source
from mixer_jax.distributed import multihost
from mixer_jax.distributed.sharding import batch_sharding
from mixer_jax.errors import UserError

# Images that an error names.
_MOST_NAMED = 5

Found = TypeVar("Found")


class EvalInputConfig(NamedTuple):
    """How the examples of a source are read and prepared.

    Attributes:
        batch_size: images at a time over all devices; rounded up to a multiple of their number.
        image_size: as `eval_batches` takes it, like those below.
        eval_crop: likewise.
        exif_orientation: likewise.
        skip_bad: whether images that cannot be used are left out, or an error.
        threads: likewise.
        prefetch_batches: likewise.
    """

    batch_size: int
    image_size: tuple[int, int]
    eval_crop: str
    exif_orientation: bool
    skip_bad: bool
    threads: int
    prefetch_batches: int


class DatasetPass(Generic[Found]):
    """What a compiled function finds in each batch of a source, one after the other, on the host.

    It is there to be iterated over once; nothing of a batch is kept.

    Attributes:
        num_bad: images that cannot be used, on all hosts; known after the last batch.
    """

    def __init__(
        self,
        function: Callable[[Any, Batch], Found],
        params: Any,
        source: Source,
        mesh: Mesh,
        reading: EvalInputConfig,
    ):
        """Takes what is passed over.

        Args:
            function: of parameters and a batch of `eval_batches`, compiled; what it returns lies
                whole on every device, so that every host can read all of it.
            params: of the model.
            source: of the examples.
            mesh: of devices.
            reading: how they are read.
        """
        self._function, self._params = function, params
        self._source, self._mesh, self._reading = source, mesh, reading
        self.num_bad = 0

    def __iter__(self) -> Iterator[Found]:
        """Yields what is found in each batch.

        Raises:
            UserError: at the end, images cannot be used, and `skip_bad` is false.
        """
        bad: list[BadImage] = []
        running: Found | None = None
        with contextlib.closing(self._batches(bad)) as batches:
            for batch in batches:
                # Sent off before the last one is read, so that the device need not wait.
                started = self._function(self._params, batch)
                if running is not None:
                    yield jax.device_get(running)
                running = started
        if running is not None:
            yield jax.device_get(running)
        # Not at once, when an image is met: the other hosts would wait for this one.
        self.num_bad = multihost.sum_across_hosts(len(bad))
        if self.num_bad and not self._reading.skip_bad:
            raise bad_images_error(self._source, bad, self.num_bad)

    def _batches(self, bad: list[BadImage]) -> Any:
        reading = self._reading
        return eval_batches(
            self._source,
            batch_size=math.ceil(reading.batch_size / self._mesh.size) * self._mesh.size,
            image_size=reading.image_size,
            eval_crop=reading.eval_crop,
            exif_orientation=reading.exif_orientation,
            num_threads=reading.threads,
            prefetch_batches=reading.prefetch_batches,
            sharding=batch_sharding(self._mesh),
            on_bad_images=lambda step, met: bad.extend(met),
        )


def bad_images_error(source: Source, bad: list[BadImage], num_bad: int) -> UserError:
    """Returns the error about images that cannot be used.

    Args:
        source: that they belong to.
        bad: those that this host met.
        num_bad: how many all hosts met.
    """
    images = "image" if num_bad == 1 else "images"
    return UserError(
        f"{source.name}: {num_bad:,} {images} cannot be used: {_name_some(bad)}; mend or "
        "remove them, or leave such images out: --config.bad_images.skip_in_evaluation=true, "
        "and of evaluate --skip_bad_images"
    )


def _name_some(bad: list[BadImage]) -> str:
    if not bad:
        return "another host names them"
    some = [f"{name} ({reason})" for name, reason in bad[:_MOST_NAMED]]
    return ", ".join(some) + (", …" if len(bad) > _MOST_NAMED else "")
