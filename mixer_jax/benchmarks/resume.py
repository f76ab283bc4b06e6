"""`--mode=resume`: time and memory until a run on a large dataset has its first batch.

The dataset has as many examples and about as many files as ImageNet-21k. Its files are hard links
to one file of small images, so that it takes little space and time to write. Every round is a
process of its own, which resumes at a random step. Times and memory are above those of the process
when it has imported the libraries and started JAX.
"""

import argparse
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mixer_jax.benchmarks.report import Column, print_table
from mixer_jax.cli import common
from mixer_jax.errors import UserError

DESCRIPTION = (
    "Measure how long a run on a large dataset takes to open it, and to load the batch of a random "
    "step, and the memory that it takes."
)

_NAME = "large_dataset"
_EXAMPLES_PER_FILE = 6_000
_NUM_CLASSES = 1_000
# Side of the images in pixels, and how many differ.
_SIDE, _NUM_IMAGES = 96, 64
_IMAGE_SIZE = 224
_EPOCHS = 300
# More than are loaded ahead.
_NUM_BATCHES = 10
_LOOKUPS = 10_000
# Name in a row of what a process measures, and title.
_TASKS = {
    "open": "dataset is open",
    "first_batch": "first batch of a random step is loaded",
    "all_files": "every file has been read from",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this mode."""
    parser.add_argument(
        "--examples", type=int, default=14_197_122, help="default: as many as in ImageNet-21k"
    )
    parser.add_argument("--batch_size", type=int, default=128, help="default: 128")
    parser.add_argument("--rounds", type=int, default=5, help="processes; default: 5")
    parser.add_argument(
        "--folder", help="folder on the disk to measure; default: that of temporary files"
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the dataset and measures one process after the other.

    Raises:
        UserError: An argument is out of range, the folder cannot be written, or the system is not
            Linux.
    """
    common.check_positive(args, "examples", "batch_size", "rounds")
    if not Path("/proc/self/status").exists():
        raise UserError("--mode=resume needs Linux, where the memory of a process can be read.")
    if args.folder and not os.access(args.folder, os.W_OK | os.X_OK):
        raise UserError(
            f"--folder must be an existing folder that can be written, got {args.folder!r}."
        )
    num_files = math.ceil(args.examples / _EXAMPLES_PER_FILE)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        _write_dataset(Path(folder), num_files)
        num_examples = num_files * _EXAMPLES_PER_FILE
        last_step = _EPOCHS * num_examples // args.batch_size
        steps = rng.integers(last_step, size=args.rounds).tolist()
        rounds = [_run_process(folder, step, args.batch_size) for step in steps]
    return {
        "examples": num_examples,
        "files": num_files,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "steps": steps,
        "microseconds_per_lookup": _median(rounds, "microseconds_per_lookup"),
        "measurements": [
            {
                "name": title,
                "seconds": _median(rounds, f"{task}_seconds"),
                "cpu_seconds": _median(rounds, f"{task}_cpu_seconds"),
                "mebibytes": _median(rounds, f"{task}_mebibytes"),
            }
            for task, title in _TASKS.items()
        ],
    }


def print_report(report: dict[str, Any]) -> None:
    """Prints the table."""
    print(
        f"{report['examples']:,} examples in {report['files']:,} files, batch size "
        f"{report['batch_size']}, median of {report['rounds']} processes\n"
    )
    columns = [
        Column("time, s", "seconds"),
        Column("CPU time, s", "cpu_seconds"),
        Column("memory, MiB", "mebibytes", ".0f"),
    ]
    print_table(report["measurements"], columns)
    microseconds = report["microseconds_per_lookup"]
    print(f"\nindex of the example at a random position: {microseconds:.1f} µs")


def _median(rounds: list[dict[str, float]], key: str) -> float:
    return statistics.median(values[key] for values in rounds)


def _write_dataset(folder: Path, num_files: int) -> None:
    """Writes a dataset in array_record whose training split consists of links to one file."""
    from mixer_jax.benchmarks.formats import LabeledImage, write_shards
    from mixer_jax.data.conversion import convert_dataset
    from mixer_jax.data.names import WEB_DATASET

    rng = np.random.default_rng(0)
    # Smooth, as photographs are.
    blocks = rng.integers(0, 256, (_NUM_IMAGES, 8, 8, 3), np.uint8)
    files = [_encode(block) for block in blocks]
    images = [
        LabeledImage(files[index % _NUM_IMAGES], f"class {index % _NUM_CLASSES}")
        for index in range(_EXAMPLES_PER_FILE)
    ]
    write_shards({"train": images, "validation": images[:1]}, folder / "wds", len(images))
    builder = convert_dataset(f"{WEB_DATASET}{folder}/wds", _NAME, str(folder)).builder
    (file,) = builder.info.splits["train"].filepaths
    for index in range(num_files):
        name = f"{_NAME}-train.array_record-{index:05d}-of-{num_files:05d}"
        os.link(file, Path(builder.data_path, name))
    info_path = Path(builder.data_path, "dataset_info.json")
    info = json.loads(info_path.read_text())
    train = next(split for split in info["splits"] if split["name"] == "train")
    train["shardLengths"] *= num_files
    info_path.write_text(json.dumps(info))


def _encode(block: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(block).resize((_SIDE, _SIDE)).save(buffer, "jpeg")
    return buffer.getvalue()


def _run_process(folder: str, step: int, batch_size: int) -> dict[str, float]:
    command = [sys.executable, "-m", __name__, folder, str(step), str(batch_size)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(result.stdout))


def _measure_process(folder: str, step: int, batch_size: int) -> dict[str, float]:
    """Opens the dataset and loads the batch of one step, in a process that does nothing else."""
    common.configure_jax(compilation_cache="")
    import jax

    # Part of the process, not of opening the dataset.
    from array_record.python import array_record_data_source  # noqa: F401

    from mixer_jax.benchmarks.pipelines import PipelineConfig, our_batches, resident_bytes
    from mixer_jax.data.readers import shuffled_indices
    from mixer_jax.data.registry import open_dataset
    from mixer_jax.data.tfds import resolve_data_dir

    jax.config.update("jax_platforms", "cpu")
    jax.devices()
    # Imports TFDS.
    resolve_data_dir("")
    bare, wall, cpu = resident_bytes(), time.perf_counter(), time.process_time()
    values: dict[str, float] = {}

    def record(task: str) -> None:
        values[f"{task}_seconds"] = time.perf_counter() - wall
        values[f"{task}_cpu_seconds"] = time.process_time() - cpu
        values[f"{task}_mebibytes"] = (resident_bytes() - bare) / 2**20

    source = open_dataset(_NAME, "train", folder)
    record("open")
    config = PipelineConfig(
        files=(),
        image_size=_IMAGE_SIZE,
        batch_size=batch_size,
        num_threads=0,
        our_num_threads=0,
        our_num_workers=1,
        images_per_round=0,
    )
    batches = our_batches(
        config, _NUM_BATCHES, randaugment=False, examples=source.examples, first_step=step
    )
    next(batches)
    record("first_batch")
    batches.close()
    indices = shuffled_indices(source, seed=0)
    positions = np.random.default_rng(step).integers(_EPOCHS * len(source), size=_LOOKUPS).tolist()
    start = time.process_time()
    for position in positions:
        indices[position]
    values["microseconds_per_lookup"] = 1e6 * (time.process_time() - start) / _LOOKUPS
    for index in range(0, len(source), _EXAMPLES_PER_FILE):
        source.read_labels(index)
    record("all_files")
    return values


if __name__ == "__main__":
    print(json.dumps(_measure_process(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
