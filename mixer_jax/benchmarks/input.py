"""The input pipeline: images a second and memory, beside bare JPEG decoding and tf.data."""

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mixer_jax.cli import common
from mixer_jax.errors import UserError

if TYPE_CHECKING:
    from mixer_jax.benchmarks.memory import Memory
    from mixer_jax.benchmarks.pipelines import Measurement

DESCRIPTION = "Measure the input pipeline on this machine, beside JPEG decoding and tf.data."

# Made here, where the user has none.
_FILES = 64
_LEAST = {
    "image_size": 1,
    "batch_size": 1,
    "threads": 0,
    "processes": 0,
    "rounds": 1,
    "images_per_round": 0,
    "memory_images": 0,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what this mode takes to the command line."""
    number = functools.partial(parser.add_argument, type=int)
    parser.add_argument("--images", metavar="FOLDER", help="JPEG files to use; default: made here")
    number("--image_size", default=224, help="pixels; default: 224")
    number("--batch_size", default=128, help="images a batch; default: 128")
    number("--threads", default=0, help="of each competitor; default: one a core")
    number("--processes", default=0, help="of ours; default: as trained, or 1 with --threads")
    number("--rounds", default=7, help="timed rounds; default: 7")
    number("--images_per_round", default=0, help="timed in each; default: about 512 a thread")
    number("--memory_images", default=0, help="to watch the memory for; default: 0, not at all")
    parser.add_argument("--no_peers", action="store_true", help="leave tf.data out")


def run(known: argparse.Namespace) -> None:
    """Measures as the command line says and prints the result.

    Raises:
        UserError: an argument is out of range, or --images has no JPEG files.
    """
    _check(known)
    common.configure_jax(compilation_cache="")
    import jax

    from mixer_jax.benchmarks import memory, ours, photographs, pipelines
    from mixer_jax.data.loader import available_cpus

    # The images stay on the host, whatever else this machine has.
    jax.config.update("jax_platforms", "cpu")
    folder = known.images
    files = photographs.read_folder(folder) if folder else photographs.sample_photographs(_FILES)
    cores = available_cpus()
    setting = ours.Setting(
        files=files,
        image_size=known.image_size,
        batch_size=known.batch_size,
        threads=known.threads or cores,
        our_num_threads=known.threads,
        our_processes=known.processes,
        timed_images=known.images_per_round
        or math.ceil(512 * (known.threads or cores) / known.batch_size) * known.batch_size,
    )
    # Memory first, while no peer is loaded.
    watched = memory.watch(setting, known.memory_images) if known.memory_images else None
    peers = None if known.no_peers else _import_peers()
    measurements = pipelines.measure(setting, known.rounds, peers)

    versions = {"jax": jax.__version__}
    if peers is not None:
        versions["tensorflow"] = peers.VERSION
    facts = {
        "files": len(files),
        "median_kilobytes": round(statistics.median(len(file) for file in files) / 1000, 1),
        "image_size": setting.image_size,
        "batch_size": setting.batch_size,
        "threads": setting.threads,
        "cores": cores,
        "images_per_round": setting.timed_images,
        "rounds": known.rounds,
        **versions,
    }
    if known.json:
        rows = [m._asdict() for m in measurements]
        print(json.dumps({**facts, "measurements": rows, "memory": watched and watched._asdict()}))
        return
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))
    _print_rates(measurements)
    if watched:
        _print_memory(watched)


def _check(known: argparse.Namespace) -> None:
    for name, least in _LEAST.items():
        value = getattr(known, name)
        if value < least:
            raise UserError(f"--{name}={value} is out of range; pass {least} or more")
    if known.images_per_round % known.batch_size:
        raise UserError(
            f"--images_per_round={known.images_per_round} is no multiple of "
            f"--batch_size={known.batch_size}; pass one"
        )
    if known.processes and known.threads % known.processes:
        raise UserError(
            f"--threads={known.threads} cannot be shared among --processes={known.processes}; "
            "pass a multiple of it"
        )
    if known.images and not Path(known.images).is_dir():
        raise UserError(f"--images={known.images} is no folder; name one with JPEG files")
    if 0 < known.memory_images < 10 * known.batch_size:
        raise UserError(
            f"--memory_images={known.memory_images} is too few to read the memory ten times; "
            f"pass {10 * known.batch_size} or more"
        )
    if known.memory_images and not Path("/proc/self/status").exists():
        raise UserError("--memory_images needs Linux; leave it out")


def _import_peers() -> ModuleType | None:
    try:
        from mixer_jax.benchmarks import tf_data
    except ModuleNotFoundError as error:
        if error.name != "tensorflow":
            raise
        print("TensorFlow is not installed: tf.data is left out", file=sys.stderr)
        return None
    tf_data.keep_off_accelerators()
    return tf_data


def _print_rates(measurements: Sequence["Measurement"]) -> None:
    print(f"{'':40}  images/s  images/s/core  ms/image/core  ours to this")
    for task, rows in itertools.groupby(measurements, key=lambda m: m.task):
        print(task)
        for m in rows:
            print(
                f"  {m.name:38}  {m.images_per_second:8.0f}  {m.images_per_second_per_core:13.0f}  "
                f"{m.milliseconds:13.2f}  {m.ratio:13.2f}"
            )


def _print_memory(memory: "Memory") -> None:
    print(f"{'resident memory of mixer_jax':40}  MiB")
    for count, resident in zip(memory.images, memory.mebibytes, strict=True):
        print(f"  {f'after {count} images':38}  {resident:.0f}")
    print(f"  {'growth, first to last':38}  {memory.growth_percent:+.1f} %")
