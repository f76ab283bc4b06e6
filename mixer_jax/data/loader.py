"""From a source to global arrays on the devices, batch by batch.

Images are prepared by `reading`, in pieces of a batch, side by side in threads or in processes.
"""

import collections
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import cv2
import grain
import jax
import numpy as np
from absl import flags

from mixer_jax.data.chunks import CHUNK_SIZE, Chunks, ProcessAssembler, ThreadAssembler
from mixer_jax.data.readers import BadImage, EvalReader, LoadedBatch, Reader, TrainReader
from mixer_jax.data.source import Source

Batch = dict[str, jax.Array]
# Called with the number of a step, beginning with 1, and what it met that could not be used.
BadImageCallback = Callable[[int, list[BadImage]], None]

# Threads of one process get in each other's way when they are more: about a tenth of the work
# needs the interpreter, which serves one of them at a time.
_CORES_A_PROCESS = 8
# Processes hand their pieces over in shared memory; of each there are so many at most.
_PIECES_IN_TRANSIT = 4
_SHARED_MEMORY = Path("/dev/shm")


def train_batches(
    source: Source,
    *,
    seed: int,
    first_step: int,
    num_steps: int,
    batch_size: int,
    image_size: int,
    preprocess: dict[str, Any],
    num_threads: int,
    num_workers: int,
    prefetch_batches: int,
    sharding: jax.sharding.Sharding,
    report: BadImageCallback,
) -> Generator[Batch, None, None]:
    """Yields the training batches of steps `first_step` to `num_steps` − 1.

    Every epoch is a new permutation of the whole source; batches run on across epochs. In place of
    an image that cannot be used comes another one, the same whenever and wherever it is read.

    Args:
        source: what to train on.
        seed: order and augmentation follow from it.
        first_step: where to begin; costs the same wherever it is.
        num_steps: where to stop.
        batch_size: images a step, over all hosts.
        image_size: side of the images, pixels.
        preprocess: keyword arguments of `train_image`.
        num_threads: threads per process that prepare images; 0: one per core.
        num_workers: worker processes; 1: no others than this one; 0: inferred from
            the machine, one for every 8 cores, if its shared memory has room for what they make.
        prefetch_batches: batches kept ready on this host.
        sharding: of the batch axis; each host prepares only the rows its devices hold.
        report: is told of every image that could not be used, when its batch is handed out.

    Yields:
        `image` uint8 (batch_size, image_size, image_size, 3) and `label` int32 (batch_size,).

    Raises:
        RunFailedError: nearly no image can be used.
    """
    reader = TrainReader(source, seed, image_size, preprocess)
    steps = range(first_step, num_steps)
    pieces = Chunks(steps, _local_rows(sharding, batch_size), batch_size)
    processes, threads = _workers(num_workers, num_threads, CHUNK_SIZE * image_size**2 * 3)
    prepared = _prepare(reader, pieces, threads, processes, prefetch_batches)
    return _to_devices(prepared, pieces, sharding, report)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    eval_crop: str,
    exif_orientation: bool,
    threads: int,
    prefetch_batches: int,
    sharding: jax.sharding.Sharding,
    report: BadImageCallback,
) -> Generator[Batch, None, None]:
    """Yields every example of the source once, in order; the last batch is padded.

    Images that cannot be used are masked like padding and reported.

    Args:
        source: what to evaluate on.
        batch_size: images a step over all hosts; must divide by the devices of `sharding`.
        image_size: height and width of the images, pixels.
        eval_crop: as `eval_image` takes it.
        exif_orientation: likewise.
        threads: as for `train_batches`; one process is enough for an evaluation.
        prefetch_batches: as for `train_batches`.
        sharding: as for `train_batches`.
        report: as for `train_batches`; of the rows that this host prepares.

    Yields:
        `image`, `label` and `mask` as `EvalReader` makes them, of batch_size rows.
    """
    reader = EvalReader(source, image_size, eval_crop, exif_orientation)
    steps = range(math.ceil(len(source) / batch_size))
    pieces = Chunks(steps, _local_rows(sharding, batch_size), batch_size)
    threads = threads or available_cpus()
    prepared = _prepare(reader, pieces, threads, 1, prefetch_batches)
    return _to_devices(prepared, pieces, sharding, report)


def _local_rows(sharding: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """Returns the rows of the global batch that this host's devices hold, each once, in order."""
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = [np.arange(batch_size)[index] for index in indices]
    return np.unique(np.concatenate(rows))


def available_cpus() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _workers(processes: int, threads: int, piece_bytes: int) -> tuple[int, int]:
    """Returns how many processes prepare images, and how many threads in each of them."""
    cores = available_cpus()
    if not processes:
        processes = math.ceil(cores / _CORES_A_PROCESS)
        # Containers often have 64 MB of shared memory; who exceeds it is killed without a word.
        needed = processes * _PIECES_IN_TRANSIT * piece_bytes
        if _SHARED_MEMORY.exists() and shutil.disk_usage(_SHARED_MEMORY).free < 2 * needed:
            processes = 1
    return processes, threads or math.ceil(cores / processes)


def _start_worker(number: int, count: int) -> None:
    """Sets up a process that prepares images, and ends with the one that started it."""
    del number, count
    cv2.setNumThreads(0)
    # Signals for all of a run's processes are answered by the main one, which ends the others.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _prepare(
    reader: Reader, pieces: Chunks, threads: int, processes: int, prefetch_batches: int
) -> Generator[LoadedBatch, None, None]:
    """Prepares the pieces in threads or processes; yields this host's part of every batch."""
    # Parallelism comes from preparing images side by side; OpenCV's own threads would only add to
    # them. It and the JPEG decoder let go of the interpreter's lock.
    cv2.setNumThreads(0)
    ahead = math.ceil(max(prefetch_batches * pieces.per_step / processes, threads))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    kind = ThreadAssembler if processes == 1 else ProcessAssembler
    batches = kind(reader, pieces.num_rows)
    prepared = grain.MapDataset.source(pieces).map(batches.prepare).to_iter_dataset(options)
    if processes > 1:
        # Grain reads absl's flags, which only absl's own command line would have parsed. It is done
        # here and not in the doors, so that notebooks can use processes too.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(num_workers=processes, per_worker_buffer_size=2)
        prepared = prepared.mp_prefetch(workers, worker_init_fn=_start_worker)
    iterator = iter(prepared)
    try:
        for step in pieces.steps:
            yield batches.collect(step, [next(iterator) for _ in range(pieces.per_step)])
    finally:
        iterator.close()


def _to_devices(
    prepared: Generator[LoadedBatch, None, None],
    pieces: Chunks,
    sharding: jax.sharding.Sharding,
    report: BadImageCallback,
) -> Generator[Batch, None, None]:
    """Makes global arrays of the hosts' parts, one batch ahead of the consumer."""

    def put(rows: np.ndarray) -> jax.Array:
        global_shape = (pieces.batch_size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, global_shape)

    def hand_out() -> Batch:
        step, bad, batch = ahead.popleft()
        if bad:
            report(step + 1, bad)
        return batch

    ahead: collections.deque[tuple[int, list[BadImage], Batch]] = collections.deque()
    try:
        for step, (arrays, bad) in zip(pieces.steps, prepared, strict=True):
            ahead.append((step, bad, {name: put(rows) for name, rows in arrays.items()}))
            if len(ahead) > 1:
                yield hand_out()
        while ahead:
            yield hand_out()
    finally:
        prepared.close()
