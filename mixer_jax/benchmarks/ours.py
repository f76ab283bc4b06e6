"""Our input pipeline as it is measured: the paper's augmentation of files that are in memory."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from mixer_jax.data.loader import CHUNK_SIZE, Batch, train_batches
from mixer_jax.data.source import Example, Source
from mixer_jax.distributed.sharding import batch_sharding, make_mesh

# RandAugment of the paper's ImageNet-1k recipe.
LAYERS, MAGNITUDE = 2, 15.0
MIN_AREA = 0.05

# Images of ImageNet-1k. A shuffled order costs more the shorter it is: 0.01 ms an image of this
# many, and 0.5 ms of 64.
_LENGTH = 1_281_167


class Setting(NamedTuple):
    """What all pipelines have in common.

    Attributes:
        files: encoded images.
        image_size: pixels.
        batch_size: images.
        threads: of a pipeline.
        our_num_threads: likewise, but 0 leaves it to our pipeline.
        our_processes: that our threads are shared among; 0 likewise.
        timed_images: in a round.
    """

    files: Sequence[bytes]
    image_size: int
    batch_size: int
    threads: int
    our_num_threads: int
    our_processes: int
    timed_images: int

    @property
    def margin(self) -> int:
        """Batches that may be under way at any time, in all threads together, and one more."""
        return math.ceil(CHUNK_SIZE * self.threads / self.batch_size) + 1

    @property
    def num_batches(self) -> int:
        """Length of a stream: a margin that warms up twice, the timed part, and a margin after."""
        return self.timed_images // self.batch_size + 3 * self.margin


class _Repeated(Sequence[Example]):
    """As many examples as ImageNet-1k has, of a few files."""

    def __init__(self, files: Sequence[bytes]):
        self._files = files

    def __len__(self) -> int:
        return _LENGTH

    def __getitem__(self, index: Any) -> Any:
        file = self._files[index % len(self._files)]
        return Example(image=file, labels=(0,), name=str(index))


def our_batches(setting: Setting, num_batches: int, *, randaugment: bool) -> Iterator[Batch]:
    """Yields batches of our training pipeline, on the host.

    Args:
        setting: of the pipeline.
        num_batches: to yield.
        randaugment: whether it augments.
    """
    threads, processes = setting.our_num_threads, setting.our_processes
    if threads:
        processes = processes or 1
        threads //= processes
    return train_batches(
        Source("benchmark", _Repeated(setting.files), ("",)),
        seed=0,
        start_step=0,
        num_steps=num_batches,
        batch_size=setting.batch_size,
        image_size=setting.image_size,
        preprocess=preprocess(randaugment=randaugment),
        num_threads=threads,
        num_workers=processes,
        prefetch_batches=2,
        sharding=batch_sharding(make_mesh(1, 1, jax.devices()[:1])),
        on_bad_images=lambda step, bad: None,
    )


def preprocess(*, randaugment: bool) -> dict[str, Any]:
    """Returns the keyword arguments of `train_image`, with or without RandAugment."""
    return {
        "train_crop": "inception",
        "min_area": MIN_AREA,
        "max_shift": 0,
        "flip": True,
        "randaugment_layers": LAYERS if randaugment else 0,
        "randaugment_magnitude": MAGNITUDE,
    }
