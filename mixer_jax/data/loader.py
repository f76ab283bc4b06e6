"""Input pipeline: global batches on the devices, loaded by threads or worker processes.

Each host loads only the rows of a batch that its devices hold, in chunks of a few images. Threads
write their chunks directly into the batch; worker processes send them through shared memory.
"""

import abc
import collections
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import grain
import jax
import numpy as np
from absl import flags

from mixer_jax.data.permutation import PixelPermutation
from mixer_jax.data.preprocess import CROP_FRACTION
from mixer_jax.data.readers import BadImage, EvalReader, LoadedBatch, Reader, TrainReader
from mixer_jax.data.source import Source
from mixer_jax.errors import RunError

Batch = dict[str, jax.Array]
# Called with the number of a step, counted from 1, and its bad images.
BadImageCallback = Callable[[int, list[BadImage]], None]

# Images per chunk: enough that the cost of passing a chunk on is negligible.
CHUNK_SIZE = 16
# More threads per process compete for the GIL, which about a tenth of the work needs.
_CORES_PER_WORKER = 8
# Maximum number of chunks of each worker in shared memory.
_SHARED_CHUNKS_PER_WORKER = 4
# Only its free space is read; the names of files in it are chosen by Python.
_SHARED_MEMORY = Path("/dev/shm")  # nosec B108
# Message of Grain.
_WORKER_KILLED = re.compile(r"terminated unexpectedly with exit code (-?\d+)")
# Option of the Python processes that are started from here.
_TRACKER_WARNINGS = "ignore:resource_tracker:UserWarning"


def train_batches(
    source: Source,
    *,
    seed: int,
    start_step: int,
    num_steps: int,
    batch_size: int,
    image_size: int,
    preprocess: dict[str, Any],
    num_threads: int,
    num_workers: int,
    prefetch_batches: int,
    sharding: jax.sharding.Sharding,
    on_bad_images: BadImageCallback,
) -> Generator[Batch, None, None]:
    """Yields the training batches of steps `start_step` to `num_steps` − 1.

    Every epoch is a new permutation of the source; batches may span epochs. A bad image is replaced
    by another one, which depends only on the seed and the position.

    Args:
        source: Source of the examples.
        seed: Seed of order and augmentation.
        start_step: First step; any step starts equally fast.
        num_steps: Number of steps of the whole run.
        batch_size: Images per step, over all hosts.
        image_size: Side of the images, in pixels.
        preprocess: Keyword arguments of `train_image`.
        num_threads: Threads per process that load images; 0: one per CPU core.
        num_workers: Processes that load images; 1: only this process; 0: one per 8 CPU cores if
            there is enough shared memory, else 1.
        prefetch_batches: Number of batches loaded ahead on this host.
        sharding: Sharding of the batch axis.
        on_bad_images: Callback for the bad images of a batch, called when the batch is yielded.

    Yields:
        `image` and `label`, as described in `TrainReader`, with batch_size rows.

    Raises:
        RunError: A hundred images in a row cannot be used, or a worker process was killed.
    """
    reader = TrainReader(source, seed, image_size, preprocess)
    steps = range(start_step, num_steps)
    chunks = Chunks(steps, _local_rows(sharding, batch_size), batch_size)
    chunk_bytes = CHUNK_SIZE * image_size**2 * 3
    num_workers, num_threads = _resolve_parallelism(num_workers, num_threads, chunk_bytes)
    loaded = _load_batches(reader, chunks, num_threads, num_workers, prefetch_batches)
    return _put_on_devices(loaded, chunks, sharding, on_bad_images)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    eval_crop: str,
    eval_crop_fraction: float = CROP_FRACTION,
    exif_orientation: bool,
    permutation: PixelPermutation | None = None,
    count_unlabeled: bool = False,
    num_threads: int,
    prefetch_batches: int,
    sharding: jax.sharding.Sharding,
    on_bad_images: BadImageCallback,
) -> Generator[Batch, None, None]:
    """Yields every example of a source once, in order; the last batch is padded.

    Bad images are masked like padding and reported.

    Args:
        source: Source of the examples.
        batch_size: Images per step, over all hosts; must be divisible by the number of devices.
        image_size: Height and width of the images, in pixels.
        eval_crop: Evaluation crop; see `eval_image`.
        eval_crop_fraction: Its side, as a fraction of the resized image's.
        exif_orientation: Whether to apply the EXIF orientation.
        permutation: Permutation of the pixels.
        count_unlabeled: Whether images without labels count: they have none of the classes.
        num_threads: Threads that load images; 0: one per CPU core. Worker processes are not used.
        prefetch_batches: Number of batches loaded ahead on this host.
        sharding: Sharding of the batch axis.
        on_bad_images: Callback for the bad images among this host's rows of a batch.

    Yields:
        `image`, `label` and `mask`, as described in `EvalReader`, with batch_size rows.
    """
    reader = EvalReader(
        source,
        image_size,
        eval_crop,
        exif_orientation,
        eval_crop_fraction,
        permutation,
        count_unlabeled,
    )
    steps = range(math.ceil(len(source) / batch_size))
    chunks = Chunks(steps, _local_rows(sharding, batch_size), batch_size)
    loaded = _load_batches(reader, chunks, num_threads or available_cpus(), 1, prefetch_batches)
    return _put_on_devices(loaded, chunks, sharding, on_bad_images)


def available_cpus() -> int:
    """Counts the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Chunk(NamedTuple):
    """Part of a batch that one thread loads.

    Attributes:
        step: Step of the batch.
        rows: Rows of the chunk, relative to this host's part of the batch.
        positions: Positions in the stream of examples, (n,).
    """

    step: int
    rows: slice
    positions: np.ndarray


class Chunks(Sequence[Chunk]):
    """Chunks of this host's part of every batch, in order."""

    def __init__(self, steps: range, local_rows: np.ndarray, batch_size: int):
        """Divides the batches.

        Args:
            steps: Steps to load.
            local_rows: Rows of the global batch that this host loads, (n,).
            batch_size: Images per step, over all hosts.
        """
        self.steps, self.batch_size, self.num_rows = steps, batch_size, len(local_rows)
        self._local_rows = local_rows.astype(np.int64)
        self.chunks_per_batch = math.ceil(len(local_rows) / CHUNK_SIZE)

    def __len__(self) -> int:
        return len(self.steps) * self.chunks_per_batch

    def __getitem__(self, index: Any) -> Any:
        batch_index, chunk_index = divmod(index, self.chunks_per_batch)
        step = self.steps[batch_index]
        rows = slice(CHUNK_SIZE * chunk_index, CHUNK_SIZE * (chunk_index + 1))
        return Chunk(step, rows, step * self.batch_size + self._local_rows[rows])


class BatchAssembler(abc.ABC):
    """Loads chunks in parallel and assembles them to this host's part of a batch."""

    def __init__(self, reader: Reader, num_rows: int):
        self._reader, self._num_rows = reader, num_rows

    @abc.abstractmethod
    def load_chunk(self, chunk: Chunk) -> Any:
        """Loads a chunk, in any thread or process; the result is passed to `assemble`."""

    @abc.abstractmethod
    def assemble(self, step: int, loaded_chunks: Sequence[Any]) -> LoadedBatch:
        """Assembles all chunks of one batch."""


class ThreadAssembler(BatchAssembler):
    """Assembler for threads, which write directly into the arrays of the batch."""

    def __init__(self, reader: Reader, num_rows: int):
        super().__init__(reader, num_rows)
        self._arrays_by_step: dict[int, dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()

    def load_chunk(self, chunk: Chunk) -> list[BadImage]:
        """Loads a chunk into its rows of the batch."""
        with self._lock:
            if chunk.step not in self._arrays_by_step:
                self._arrays_by_step[chunk.step] = self._reader.allocate(self._num_rows)
            arrays = self._arrays_by_step[chunk.step]
        rows = {name: array[chunk.rows] for name, array in arrays.items()}
        return self._reader.fill(chunk.positions, rows)

    def assemble(self, step: int, loaded_chunks: Sequence[list[BadImage]]) -> LoadedBatch:
        """Collects the bad images; the arrays are complete."""
        bad_images = [bad for chunk in loaded_chunks for bad in chunk]
        return LoadedBatch(self._arrays_by_step.pop(step), bad_images)


class ProcessAssembler(BatchAssembler):
    """Assembler for worker processes, which send their chunks through shared memory."""

    def load_chunk(self, chunk: Chunk) -> LoadedBatch:
        """Loads a chunk into new arrays."""
        return self._reader(chunk.positions)

    def assemble(self, step: int, loaded_chunks: Sequence[LoadedBatch]) -> LoadedBatch:
        """Concatenates the chunks; shared memory is freed together with them."""
        del step
        arrays = self._reader.allocate(self._num_rows)
        for name, array in arrays.items():
            np.concatenate([chunk.arrays[name] for chunk in loaded_chunks], out=array)
        return LoadedBatch(arrays, [bad for chunk in loaded_chunks for bad in chunk.bad_images])


def _local_rows(sharding: jax.sharding.Sharding, batch_size: int) -> np.ndarray:
    """Lists the rows of the global batch on this host's devices, each once, in ascending order."""
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = [np.arange(batch_size)[index] for index in indices]
    return np.unique(np.concatenate(rows))


def _resolve_parallelism(num_workers: int, num_threads: int, chunk_bytes: int) -> tuple[int, int]:
    """Resolves 0 (auto) for the number of workers and the number of threads per process."""
    cores = available_cpus()
    if not num_workers:
        num_workers = math.ceil(cores / _CORES_PER_WORKER)
        # Containers often have only 64 MB of shared memory, and processes that exceed it are
        # killed without a message.
        needed = num_workers * _SHARED_CHUNKS_PER_WORKER * chunk_bytes
        if _SHARED_MEMORY.exists() and shutil.disk_usage(_SHARED_MEMORY).free < 2 * needed:
            num_workers = 1
    return num_workers, num_threads or math.ceil(cores / num_workers)


def _load_batches(
    reader: Reader, chunks: Chunks, num_threads: int, num_workers: int, prefetch_batches: int
) -> Generator[LoadedBatch, None, None]:
    """Yields this host's part of every batch, loaded by threads or worker processes."""
    # Images are processed in parallel, with one thread for each: OpenCV's own threads would
    # compete with these. OpenCV and simplejpeg release the GIL.
    cv2.setNumThreads(0)
    prefetch_chunks = math.ceil(
        max(prefetch_batches * chunks.chunks_per_batch / num_workers, num_threads)
    )
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch_chunks)
    assembler_class = ThreadAssembler if num_workers == 1 else ProcessAssembler
    assembler = assembler_class(reader, chunks.num_rows)
    dataset = grain.MapDataset.source(chunks).map(assembler.load_chunk).to_iter_dataset(options)
    if num_workers > 1:
        # Grain reads absl flags, which have to be parsed. Done here rather than in the commands, so
        # that notebooks can use worker processes too.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        # Python's resource tracker, another process, frees the shared memory of workers that are
        # killed. Its warning about that would follow ours.
        if _TRACKER_WARNINGS not in sys.warnoptions:
            sys.warnoptions.append(_TRACKER_WARNINGS)
        workers = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(workers, worker_init_fn=_init_worker)
    iterator = iter(dataset)
    try:
        for step in chunks.steps:
            # If the iterator ended early, Python would turn its StopIteration into RuntimeError.
            loaded = [next(iterator) for _ in range(chunks.chunks_per_batch)]
            yield assembler.assemble(step, loaded)
    except RuntimeError as error:
        if killed := _WORKER_KILLED.search(str(error)):
            raise _worker_lost(int(killed[1])) from error
        raise
    finally:
        iterator.close()


def _worker_lost(exit_code: int) -> RunError:
    """Describes the end of a worker process by its exit code, which is negative for signals."""
    how = f"ended with exit code {exit_code}"
    if exit_code < 0:
        how = f"was killed by {signal.Signals(-exit_code).name}"
    cause = {
        -signal.SIGKILL: "The machine is probably out of memory",
        -signal.SIGBUS: f"{_SHARED_MEMORY} is probably full",
    }.get(exit_code, "Memory may be short")
    guard = ""
    if exit_code == 1:
        guard = ' A script must call mixer_jax.train below `if __name__ == "__main__":`.'
    return RunError(
        f"a process that loads images {how}. {cause}: set a lower config.loader.num_workers, "
        f"config.loader.num_threads or config.loader.prefetch_batches.{guard}"
    )


def _init_worker(worker_index: int, worker_count: int) -> None:
    """Configures a worker process, which exits together with its parent."""
    del worker_index, worker_count
    cv2.setNumThreads(0)
    # Signals to the whole process group are handled by the main process, which stops the workers.
    for stop_signal in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop_signal, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=[os.getppid()], daemon=True).start()


def _exit_with_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(1)
    os._exit(1)


def _put_on_devices(
    loaded: Generator[LoadedBatch, None, None],
    chunks: Chunks,
    sharding: jax.sharding.Sharding,
    on_bad_images: BadImageCallback,
) -> Generator[Batch, None, None]:
    """Yields global arrays, transferred one batch ahead of the consumer."""

    def put(rows: np.ndarray) -> jax.Array:
        global_shape = (chunks.batch_size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, global_shape)

    def pop_batch() -> Batch:
        step, bad_images, batch = transferred.popleft()
        if bad_images:
            on_bad_images(step + 1, bad_images)
        return batch

    transferred: collections.deque[tuple[int, list[BadImage], Batch]] = collections.deque()
    try:
        for step, (arrays, bad_images) in zip(chunks.steps, loaded, strict=True):
            transferred.append((step, bad_images, {n: put(rows) for n, rows in arrays.items()}))
            if len(transferred) > 1:
                yield pop_batch()
        while transferred:
            yield pop_batch()
    finally:
        loaded.close()
