"""Whether the input pipeline's memory grows: what is resident, again and again, in a long run."""

import multiprocessing
import os
from pathlib import Path
from typing import NamedTuple

from mixer_jax.benchmarks.ours import Setting, our_batches

_READINGS = 10


class Memory(NamedTuple):
    """Memory over a run.

    Attributes:
        images: that had been prepared at each reading; the first tenth of all warms up.
        mebibytes: resident then, in this process and its workers.
        growth_percent: from the first reading to the last.
    """

    images: list[int]
    mebibytes: list[float]
    growth_percent: float


def watch(setting: Setting, num_images: int) -> Memory:
    """Returns how the memory of our training pipeline, with RandAugment, develops.

    Args:
        setting: of the pipeline.
        num_images: to prepare, rounded down to whole batches.
    """
    num_batches = num_images // setting.batch_size
    due = [num_batches * (reading + 1) // _READINGS for reading in range(_READINGS)]
    mebibytes = []
    for count, _ in enumerate(our_batches(setting, num_batches, randaugment=True), start=1):
        if count in due:
            mebibytes.append(_resident_bytes() / 2**20)
    growth = 100 * (mebibytes[-1] / mebibytes[0] - 1)
    return Memory([count * setting.batch_size for count in due], mebibytes, growth)


def _resident_bytes() -> int:
    workers = [child.pid for child in multiprocessing.active_children()]
    return sum(_resident_bytes_of(pid) for pid in [os.getpid(), *workers] if pid is not None)


def _resident_bytes_of(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # A worker that has just done its last piece.
    resident = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return 1024 * int(resident[0]) if resident else 0
