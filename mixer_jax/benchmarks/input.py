"""`--mode=input`: speed and memory of the input pipeline, with tf.data. Does not import JAX."""

import argparse
import itertools
import math
import statistics
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from mixer_jax.benchmarks.report import Column, print_table
from mixer_jax.cli import common
from mixer_jax.errors import UserError

DESCRIPTION = (
    "Measure the input pipeline on this machine, with JPEG decoding alone and tf.data; or, with "
    "--formats, compare the formats of datasets."
)

# Files that are generated without --images.
_NUM_FILES, _NUM_FORMAT_FILES = 64, 512
# Name, default, smallest value and help of each number.
_NUMBERS = [
    ("image_size", 224, 1, "in pixels; default: 224"),
    ("batch_size", 128, 1, "images per batch; default: 128"),
    ("num_threads", 0, 0, "threads per pipeline; default: one per core"),
    ("num_workers", 0, 0, "processes of mixer_jax; default: as in training, 1 with --num_threads"),
    ("rounds", 7, 1, "timed rounds; default: 7"),
    ("images_per_round", 0, 0, "images timed per round; default: about 512 per thread"),
    ("memory_images", 0, 0, "images to watch the memory for; default: 0, off"),
]
_COLUMNS = [
    Column("images/s", "images_per_second", ".0f"),
    Column("images/s/core", "images_per_second_per_core", ".0f"),
    Column("ms/image/core", "milliseconds"),
    Column("relative time", "relative_time"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this mode."""
    parser.add_argument("--images", metavar="FOLDER", help="JPEG files; default: generated")
    for name, default, _, text in _NUMBERS:
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument(
        "--formats",
        action="store_true",
        help="read the JPEG files as a folder, in array_record, by a manifest, as a dataset of "
        "Hugging Face and as WebDataset shards, which are written to a temporary folder, and by "
        "the libraries webdataset and datasets",
    )
    parser.add_argument(
        "--no_baselines",
        action="store_true",
        help="skip tf.data, which needs TensorFlow, or the other libraries",
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the pipelines.

    Raises:
        UserError: An argument is out of range, or --images has no JPEG files.
    """
    _check_args(args)
    common.configure_jax(compilation_cache="")
    import jax

    from mixer_jax.benchmarks import pipelines
    from mixer_jax.data.loader import available_cpus

    # Images stay on the host.
    jax.config.update("jax_platforms", "cpu")
    folder, num_cores = args.images, available_cpus()
    num_threads = args.num_threads or num_cores
    num_files = _NUM_FORMAT_FILES if args.formats else _NUM_FILES
    files = pipelines.read_jpegs(folder) if folder else pipelines.sample_jpegs(num_files)
    images_per_round = math.ceil(512 * num_threads / args.batch_size) * args.batch_size
    config = pipelines.PipelineConfig(
        files=files,
        image_size=args.image_size,
        batch_size=args.batch_size,
        num_threads=num_threads,
        our_num_threads=args.num_threads,
        our_num_workers=args.num_workers,
        images_per_round=args.images_per_round or images_per_round,
    )
    # Before TensorFlow is imported, which takes memory of its own.
    memory = None
    if args.memory_images:
        memory = pipelines.measure_memory_growth(config, args.memory_images)
    versions = {"jax": jax.__version__}
    if args.formats:
        from mixer_jax.benchmarks.formats import measure_formats

        with tempfile.TemporaryDirectory() as temporary:
            measurements = measure_formats(
                config, Path(temporary), args.rounds, baselines=not args.no_baselines
            )
    else:
        tf_data = None if args.no_baselines else _import_tf_data()
        measurements = pipelines.measure_pipelines(config, args.rounds, tf_data)
        versions |= {"tensorflow": tf_data.VERSION} if tf_data else {}
    return {
        "files": len(files),
        "median_kilobytes": round(statistics.median(len(file) for file in files) / 1000, 1),
        "image_size": config.image_size,
        "batch_size": config.batch_size,
        "num_threads": config.num_threads,
        "cores": num_cores,
        "images_per_round": config.images_per_round,
        "rounds": args.rounds,
        **versions,
        "measurements": [measurement._asdict() for measurement in measurements],
        "memory": memory,
    }


def print_report(report: dict[str, Any]) -> None:
    """Prints a table for each task, and one of the memory."""
    environment = {
        name.replace("_", " "): value
        for name, value in report.items()
        if name not in ("measurements", "memory")
    }
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    for task, group in itertools.groupby(report["measurements"], key=lambda row: row["task"]):
        print()
        print_table(list(group), _COLUMNS, title=task)
    if memory := report["memory"]:
        readings = zip(memory["images"], memory["mebibytes"], strict=True)
        rows = [{"name": f"after {count} images", "memory": size} for count, size in readings]
        print()
        print_table(rows, [Column("MiB", "memory", ".0f")], title="resident memory of mixer_jax")
        print(f"growth from first to last: {memory['growth_percent']:+.1f} %")


def _check_args(args: argparse.Namespace) -> None:
    for name, _, least, _ in _NUMBERS:
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    if args.images_per_round % args.batch_size:
        raise UserError(
            f"--images_per_round must be a multiple of --batch_size ({args.batch_size}), "
            f"got {args.images_per_round}."
        )
    if args.num_workers and args.num_threads % args.num_workers:
        raise UserError(
            f"--num_threads must be a multiple of --num_workers ({args.num_workers}), "
            f"got {args.num_threads}."
        )
    if args.images and not Path(args.images).is_dir():
        raise UserError(f"--images must be a folder with JPEG files, got {args.images}.")
    if 0 < args.memory_images < 10 * args.batch_size:
        raise UserError(
            f"--memory_images must be at least ten batches ({10 * args.batch_size}), "
            f"got {args.memory_images}."
        )
    if args.memory_images and not Path("/proc/self/status").exists():
        raise UserError("--memory_images needs Linux. Leave it out.")


def _import_tf_data() -> ModuleType | None:
    try:
        from mixer_jax.benchmarks import tf_data
    except ModuleNotFoundError as error:
        if error.name != "tensorflow":
            raise
        print("TensorFlow is not installed: tf.data is skipped", file=sys.stderr)
        return None
    tf_data.hide_gpus()
    return tf_data
