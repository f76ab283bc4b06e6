"""`--mode=checkpoints`: time to save and restore a training state, with and without checksums.

Saves with and without checksums alternate. `blocked` is the time that a save keeps the training
loop from its next step, `written` that until the checkpoint is complete. The ratio is to the same
task without checksums, median over rounds. Files are in the page cache.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mixer_jax.benchmarks.candidates import add_model_arg, parse_model
from mixer_jax.benchmarks.checkpoint_io import print_report, random_params
from mixer_jax.benchmarks.compare import median_ratio
from mixer_jax.cli.common import check_positive
from mixer_jax.errors import UserError

__all__ = ["DESCRIPTION", "add_arguments", "measure", "print_report"]

DESCRIPTION = "Measure saving and restoring training states, with and without checksums."

_TASKS = ("save: blocked", "save: written", "restore")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this mode."""
    add_model_arg(parser, "L/16")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; default: 5")
    parser.add_argument(
        "--folder", help="folder on the disk to measure; default: that of temporary files"
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all tasks.

    Raises:
        UserError: An argument is out of range, the folder cannot be written, or JAX_PLATFORMS names
            absent devices.
    """
    from mixer_jax.distributed.multihost import check_devices

    model = parse_model(args)
    check_positive(args, "rounds")
    if args.folder and not os.access(args.folder, os.W_OK | os.X_OK):
        raise UserError(
            f"--folder must be an existing folder that can be written, got {args.folder!r}."
        )
    check_devices()
    items = _make_items(model)
    times: dict[tuple[str, bool], list[float]] = {
        (task, checksums): [] for task in _TASKS for checksums in (False, True)
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        # The first round warms up.
        for number in range(args.rounds + 1):
            # Each is first in every second round.
            for checksums in (False, True) if number % 2 else (True, False):
                seconds = _measure_once(Path(folder) / "run", items, checksums)
                if number:
                    for task, value in zip(_TASKS, seconds, strict=True):
                        times[task, checksums].append(value)
    return {
        "model": model,
        "mebibytes": round(_num_bytes(items) / 2**20, 1),
        "rounds": args.rounds,
        "measurements": [
            {
                "name": f"{task}, {'with' if checksums else 'without'} checksums",
                "seconds": statistics.median(values),
                "ratio": median_ratio(values, times[task, False]),
            }
            for (task, checksums), values in times.items()
        ],
    }


def _make_items(model: str) -> dict[str, Any]:
    """Creates random parameters and the two moments of Adam."""
    import jax

    from mixer_jax.checkpoints.weights import unflatten_params

    rng = np.random.default_rng(0)

    def make_tree() -> Any:
        return jax.device_put(unflatten_params(random_params(model, rng)))

    return {"params": make_tree(), "optimizer": {"mu": make_tree(), "nu": make_tree()}}


def _num_bytes(items: dict[str, Any]) -> int:
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(items))


def _measure_once(
    workdir: Path, items: dict[str, Any], checksums: bool
) -> tuple[float, float, float]:
    """Saves and restores once; returns the time of each task, in seconds."""
    import jax

    from mixer_jax.checkpoints.manager import CheckpointManager, abstract_state

    manager = CheckpointManager(str(workdir), max_to_keep=1, checksums=checksums)
    start = time.perf_counter()
    manager.save(0, items, {})
    blocked = time.perf_counter() - start
    manager.wait()
    written = time.perf_counter() - start
    shapes = abstract_state(items, jax.tree.map(lambda x: x.sharding, items))
    start = time.perf_counter()
    jax.block_until_ready(manager.restore(0, shapes))
    restored = time.perf_counter() - start
    manager.close()
    shutil.rmtree(workdir)
    return blocked, written, restored
