"""Tests of preparing images in several processes: nothing changes, and nothing is copied twice."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mixer_jax.data.loader import _workers
from mixer_jax.data.readers import BadImage, TrainReader
from mixer_jax.data.source import Example
from tests.helpers.batches import AUGMENTED, SIZE, RecordingSource, assert_identical, mesh_of, train


class Files(Sequence[Example]):
    """A hundred examples, some of them bad, small enough to be sent to another process."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: Any) -> Any:
        example = Example(
            image=RecordingSource()[index % 10]["image"], labels=(index,), name=f"{index}"
        )
        return example | {"image": b"broken"} if index % 10 == 7 else example


@pytest.mark.parametrize(("devices", "processes"), [(1, 1), (8, 1), (1, 2)])
def test_jax_uses_the_batches_on_the_cpu_without_copying_them(
    devices: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated: list[np.ndarray] = []

    def allocate(reader: TrainReader, count: int) -> dict[str, np.ndarray]:
        arrays = original(reader, count)
        allocated.append(arrays["image"])
        return arrays

    original = TrainReader.allocate
    monkeypatch.setattr(TrainReader, "allocate", allocate)
    batches = train(
        0, 2, batch_size=64, mesh=mesh_of(devices, 1), processes=processes, examples=Files()
    )
    for batch in batches:
        for shard in batch["image"].addressable_shards:
            address = shard.data.unsafe_buffer_pointer()
            starts = [array.ctypes.data for array in allocated]
            assert any(start <= address < start + 64 * SIZE * SIZE * 3 for start in starts)


def test_processes_do_not_matter() -> None:
    # 20 images are two pieces; 7 steps are 14 pieces, which three processes share unevenly.
    batches, reports = {}, {}
    for processes in (1, 3):
        reports[processes] = met = dict[int, list[BadImage]]()
        batches[processes] = train(
            3,
            10,
            batch_size=20,
            preprocess=AUGMENTED,
            examples=Files(),
            processes=processes,
            report=met.__setitem__,
        )
    assert_identical(batches[1], batches[3])
    assert reports[1] == reports[3]
    assert len(reports[1]) > 2


@pytest.mark.parametrize(
    ("cores", "processes", "threads", "expected"),
    [
        (2, 0, 0, (1, 2)),
        (8, 0, 0, (1, 8)),
        (96, 0, 0, (12, 8)),
        (96, 1, 0, (1, 96)),
        (96, 4, 3, (4, 3)),
        (2, 4, 0, (4, 1)),
    ],
)
def test_workers_follow_the_machine(
    cores: int,
    processes: int,
    threads: int,
    expected: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    free = SimpleNamespace(free=10**9)
    monkeypatch.setattr("mixer_jax.data.loader.shutil.disk_usage", lambda path: free)
    assert _workers(processes, threads, 2_400_000) == expected
    # Docker's default is no room for twelve processes, unless the user insists.
    free.free = 64 * 2**20
    monkeypatch.setattr("mixer_jax.data.loader._SHARED_MEMORY", Path("/"))
    alone = (1, threads or cores) if processes == 0 and cores == 96 else expected
    assert _workers(processes, threads, 2_400_000) == alone
