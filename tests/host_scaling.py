"""Scaling of start-up and checkpoints with hosts, which are simulated by processes.

    python -m tests.host_scaling [--hosts=1,2,4,8,16] [--steps=50]

Trains a small model on digits, with one device per host. For each number of hosts it prints the
time from the start of the processes to the first step, the median time of a save until the
checkpoint is complete, and the number of files of a checkpoint. It fails unless the parameters of
all hosts are equal, bit by bit, at every save. The processes share the cores of this machine, so
hosts with cores of their own are faster.
"""

import argparse
import contextlib
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mixer_jax.checkpoints.manager import CheckpointManager
from mixer_jax.data.registry import open_dataset
from mixer_jax.distributed.multihost import initialize_distributed
from mixer_jax.training.loop import train_and_evaluate
from tests.helpers.processes import host_env, kill_at_end, last_step
from tests.helpers.tiny_run import NO_REGULARIZATION, small_config

_NUM_SAVES = 5
_TIMEOUT_SECONDS = 3600


class HostScaling(NamedTuple):
    """Measurements of one run.

    Attributes:
        num_hosts: Number of processes.
        start_seconds: Time until the first step is logged.
        total_seconds: Time until all processes have ended.
        save_seconds: Median time of a save, on the slowest host.
        num_files: Files of the last checkpoint.
    """

    num_hosts: int
    start_seconds: float
    total_seconds: float
    save_seconds: float
    num_files: int


def measure(num_hosts: int, num_steps: int, data_dir: str, workdir: Path) -> HostScaling:
    """Measures one run of `num_steps` steps on `num_hosts` processes.

    Raises:
        RuntimeError: A process failed, or the hosts' parameters differ.
    """
    command = [
        sys.executable,
        "-m",
        "tests.host_scaling",
        "--child",
        data_dir,
        str(workdir),
        str(num_steps),
    ]
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        processes = []
        for env in host_env(num_hosts, num_devices=1):
            process = subprocess.Popen(
                command,
                env=os.environ | env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            processes.append(stack.enter_context(kill_at_end(process)))
        while last_step(workdir) < 1 and all(process.poll() is None for process in processes):
            time.sleep(0.02)
        start_seconds = time.monotonic() - start
        outputs = [process.communicate(timeout=_TIMEOUT_SECONDS) for process in processes]
    total_seconds = time.monotonic() - start
    for process, (_, err) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"a process failed with exit code {process.returncode}: {err}")
    # Gloo prints to standard output too.
    hosts = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    digests = {tuple(host["digests"]) for host in hosts}
    if len(digests) > 1 or len(set(hosts[0]["digests"])) < _NUM_SAVES:
        raise RuntimeError(f"parameters must be equal on all hosts and change, got {digests}")
    by_save = zip(*(host["seconds"] for host in hosts), strict=True)
    files = (workdir / "checkpoints" / str(num_steps)).rglob("*")
    return HostScaling(
        num_hosts,
        start_seconds,
        total_seconds,
        statistics.median(map(max, by_save)),
        sum(path.is_file() for path in files),
    )


def _train(data_dir: str, workdir: str, num_steps: int) -> None:
    """Trains as one host; prints the digests of its parameters and the times of its saves."""
    initialize_distributed("auto" if int(os.environ["JAX_NUM_PROCESSES"]) > 1 else "no")
    digests: list[str] = []
    seconds: list[float] = []
    save = CheckpointManager.save

    def timed_save(self: CheckpointManager, step: int, items: Any, metadata: Any) -> None:
        digest = hashlib.blake2b(digest_size=8)
        for leaf in jax.tree.leaves(items["params"]):
            digest.update(np.asarray(leaf.addressable_data(0)).tobytes())
        digests.append(digest.hexdigest())
        start = time.monotonic()
        save(self, step, items, metadata)
        self.wait()
        seconds.append(time.monotonic() - start)

    CheckpointManager.save = timed_save  # type: ignore[method-assign]
    settings = NO_REGULARIZATION | {
        "num_steps": num_steps,
        "batch_size": 128,
        "checkpoint__every_steps": num_steps // _NUM_SAVES,
        "evals__test__every_steps": num_steps,
    }
    train_and_evaluate(small_config(data_dir, **settings), workdir)
    print(json.dumps({"digests": digests, "seconds": seconds}))


def main(argv: Sequence[str]) -> None:
    """Measures each number of hosts and prints a row of a Markdown table for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hosts", default="1,2,4,8,16", help="default: 1,2,4,8,16")
    parser.add_argument("--steps", type=int, default=50, help="default: 50")
    args = parser.parse_args(argv)
    # Runs the handlers that end the processes of the hosts.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    print("| hosts | first step, s | whole run, s | save, s | files of a checkpoint |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        open_dataset("digits", "train", folder)
        for number in map(int, args.hosts.split(",")):
            row = measure(number, args.steps, folder, Path(folder, f"run{number}"))
            print(
                f"| {row.num_hosts} | {row.start_seconds:.1f} | {row.total_seconds:.1f} | "
                f"{row.save_seconds:.2f} | {row.num_files} |",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _train(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main(sys.argv[1:])
