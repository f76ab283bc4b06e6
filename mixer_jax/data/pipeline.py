"""From a source to global arrays on the devices, batch by batch.

The data position is the step: which examples make batch n, and how each is augmented, depends only
on (seed, n). A run that is resumed, on as many hosts or on others, sees what it would have seen.
"""

import collections
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import grain
import jax
import numpy as np

from mixer_jax.data.preprocess import eval_image, train_image
from mixer_jax.data.sources import Source

Batch = dict[str, jax.Array]


def train_batches(
    source: Source,
    *,
    seed: int,
    first_step: int,
    num_steps: int,
    batch_size: int,
    image_size: int,
    preprocess: dict[str, Any],
    threads: int,
    prefetch_batches: int,
    sharding: jax.sharding.Sharding,
) -> Iterator[Batch]:
    """Yields the training batches of steps `first_step` to `num_steps` − 1.

    Every epoch is a new permutation of the whole source; batches run on across epochs.

    Args:
        source: what to train on.
        seed: order and augmentation follow from it.
        first_step: where to begin; costs the same wherever it is.
        num_steps: where to stop.
        batch_size: images a step, over all hosts.
        image_size: side of the images, pixels.
        preprocess: keyword arguments of `train_image`.
        threads: that prepare images; 0 is one a core, and never more than 64.
        prefetch_batches: batches kept ready on this host.
        sharding: of the batch axis; each host prepares only the rows its devices hold.

    Yields:
        `image` uint8 (batch_size, image_size, image_size, 3) and `label` int32 (batch_size,).
    """

    def prepare(example: Any, rng: np.random.Generator) -> dict[str, Any]:
        image = train_image(example["image"], rng, image_size=image_size, **preprocess)
        return {"image": image, "label": np.int32(example["label"])}

    stream = grain.MapDataset.source(source.examples).seed(seed).shuffle().repeat()
    stream = stream.random_map(prepare)
    rows = _local_rows(sharding, batch_size)
    steps = range(first_step, num_steps)
    positions = _Positions(steps, rows, batch_size)
    batches = _read(lambda p: stream[p], positions, len(rows), threads, prefetch_batches)
    return _to_devices(batches, sharding, batch_size)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    eval_crop: str,
    threads: int,
    prefetch_batches: int,
    sharding: jax.sharding.Sharding,
) -> Iterator[Batch]:
    """Yields every example of the source once, in order; the last batch is padded.

    Args:
        source: what to evaluate on.
        batch_size: images a step over all hosts; must divide by the devices of `sharding`.
        image_size: side of the images, pixels.
        eval_crop: as `eval_image` takes it.
        threads: as for `train_batches`.
        prefetch_batches: as for `train_batches`.
        sharding: as for `train_batches`.

    Yields:
        `image`, `label` as `train_batches`, and `mask` bool (batch_size,), false for padding.
    """
    blank = {
        "image": np.zeros((image_size, image_size, 3), np.uint8),
        "label": np.int32(0),
        "mask": np.bool_(False),
    }

    def prepare(position: int) -> dict[str, Any]:
        if position >= len(source):
            return blank
        example = source.examples[position]
        image = eval_image(example["image"], image_size=image_size, eval_crop=eval_crop)
        return {"image": image, "label": np.int32(example["label"]), "mask": np.bool_(True)}

    rows = _local_rows(sharding, batch_size)
    steps = range(math.ceil(len(source) / batch_size))
    positions = _Positions(steps, rows, batch_size)
    batches = _read(prepare, positions, len(rows), threads, prefetch_batches)
    return _to_devices(batches, sharding, batch_size)


class _Positions(Sequence[int]):
    """Positions in the endless stream of examples that this host reads, in order."""

    def __init__(self, steps: range, rows: np.ndarray, batch_size: int):
        self._steps, self._rows, self._batch_size = steps, rows, batch_size

    def __len__(self) -> int:
        return len(self._steps) * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        step, row = divmod(index, len(self._rows))
        return self._steps[step] * self._batch_size + int(self._rows[row])


def _local_rows(sharding: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """Returns the rows of the global batch that this host's devices hold, each once, in order."""
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = [np.arange(batch_size)[index] for index in indices]
    return np.unique(np.concatenate(rows))


def _read(
    prepare: Callable[[int], dict[str, Any]],
    positions: Sequence[int],
    batch_size: int,
    threads: int,
    prefetch_batches: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Prepares the examples at `positions` in threads and stacks them, in order."""
    # Parallelism comes from preparing images side by side: OpenCV's own threads would only add to
    # them, and it lets go of the interpreter's lock, so that processes are not needed.
    cv2.setNumThreads(0)
    options = grain.ReadOptions(
        num_threads=threads or min(os.cpu_count() or 1, 64),
        prefetch_buffer_size=prefetch_batches * batch_size,
    )
    examples = grain.MapDataset.source(positions).map(prepare).to_iter_dataset(options)
    return iter(examples.batch(batch_size, drop_remainder=True))


def _to_devices(
    batches: Iterator[dict[str, np.ndarray]], sharding: jax.sharding.Sharding, batch_size: int
) -> Iterator[Batch]:
    """Turns host batches into global arrays, one batch ahead of the consumer."""

    def put(array: np.ndarray) -> jax.Array:
        global_shape = (batch_size, *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, array, global_shape)

    ahead: collections.deque[Batch] = collections.deque()
    for batch in batches:
        ahead.append({name: put(array) for name, array in batch.items()})
        if len(ahead) > 1:
            yield ahead.popleft()
    yield from ahead
