"""Batches in pieces: what one thread prepares at a time, and how batches come of it."""

import abc
import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mixer_jax.data.readers import BadImage, LoadedBatch, Reader

# Images that one thread prepares at a time: enough that handing them over costs next to nothing.
CHUNK_SIZE = 16


class Chunk(NamedTuple):
    """Part of a batch that one thread prepares.

    Attributes:
        step: of the batch.
        rows: of this host's part of the batch.
        positions: in the stream of examples, (n,).
    """

    step: int
    rows: slice
    positions: np.ndarray


class Chunks(Sequence[Chunk]):
    """What this host prepares, in order, a piece at a time."""

    def __init__(self, steps: range, rows: np.ndarray, batch_size: int):
        self.steps, self.batch_size, self.num_rows = steps, batch_size, len(rows)
        self._rows = rows.astype(np.int64)
        self.per_step = math.ceil(len(rows) / CHUNK_SIZE)

    def __len__(self) -> int:
        return len(self.steps) * self.per_step

    def __getitem__(self, index: Any) -> Any:
        number, piece = divmod(index, self.per_step)
        step, rows = self.steps[number], slice(CHUNK_SIZE * piece, CHUNK_SIZE * (piece + 1))
        return Chunk(step, rows, step * self.batch_size + self._rows[rows])


class BatchAssembler(abc.ABC):
    """How the pieces of this host's part of a batch come together."""

    def __init__(self, reader: Reader, num_rows: int):
        self._reader, self._num_rows = reader, num_rows

    @abc.abstractmethod
    def prepare(self, piece: Chunk) -> Any:
        """Prepares a piece, in a thread or a process of many; returns what `collect` needs."""

    @abc.abstractmethod
    def collect(self, step: int, parts: Sequence[Any]) -> LoadedBatch:
        """Returns the batch of a step, of which `parts` are all pieces."""


class ThreadAssembler(BatchAssembler):
    """The threads of one process put their pieces where they belong."""

    def __init__(self, reader: Reader, num_rows: int):
        super().__init__(reader, num_rows)
        self._open: dict[int, dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()

    def prepare(self, piece: Chunk) -> list[BadImage]:
        """As `BatchAssembler`."""
        with self._lock:
            if piece.step not in self._open:
                self._open[piece.step] = self._reader.allocate(self._num_rows)
            batch = self._open[piece.step]
        rows = {name: array[piece.rows] for name, array in batch.items()}
        return self._reader.fill(piece.positions, rows)

    def collect(self, step: int, parts: Sequence[list[BadImage]]) -> LoadedBatch:
        """As `BatchAssembler`."""
        return LoadedBatch(self._open.pop(step), [bad for part in parts for bad in part])


class ProcessAssembler(BatchAssembler):
    """Other processes hand their pieces over in shared memory."""

    def prepare(self, piece: Chunk) -> LoadedBatch:
        """As `BatchAssembler`."""
        return self._reader(piece.positions)

    def collect(self, step: int, parts: Sequence[LoadedBatch]) -> LoadedBatch:
        """As `BatchAssembler`."""
        del step
        # The memory of the pieces is given back when they are gone.
        arrays = self._reader.allocate(self._num_rows)
        for name, array in arrays.items():
            np.concatenate([part.arrays[name] for part in parts], out=array)
        return LoadedBatch(arrays, [bad for part in parts for bad in part.bad])
