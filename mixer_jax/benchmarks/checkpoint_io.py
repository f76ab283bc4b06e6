"""`--mode=weights`: time to load, memory to convert, time to a first prediction.

Does not import JAX.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mixer_jax.benchmarks.candidates import FAMILY
from mixer_jax.benchmarks.report import Column, print_table
from mixer_jax.cli.common import check_positive
from mixer_jax.errors import UserError

DESCRIPTION = "Measure loading and converting weights, and a prediction from a cold start."

_IMAGE_SIZE, _NUM_CLASSES = 224, 1000
_SUFFIXES = {"google": ".npz", "timm": ".safetensors"}
# Prints the peak memory of a conversion in bytes, without that of its parent.
_CONVERT = """
import contextlib, io, re, sys
from mixer_jax import convert
with contextlib.redirect_stdout(io.StringIO()):
    convert.main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(int(peak[1]) * 1024)
"""
_COLUMNS: list[Column] = [
    ("seconds", "seconds", "{:.2f}".format),
    ("ratio", "ratio", "{:.2f}".format),
]


class Measurement(NamedTuple):
    """One measured task.

    Attributes:
        name: Name of the task.
        seconds: Median over rounds.
        ratio: Time relative to reading the file in the same round, median over rounds, for loading;
            peak memory relative to the size of the weights for converting; time relative to the
            first prediction, which compiles, for predicting.
    """

    name: str
    seconds: float
    ratio: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this mode."""
    parser.add_argument(
        "--variant", default="L/16", choices=list(FAMILY.variants), help="default: L/16"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; default: 7")


def run(args: argparse.Namespace) -> None:
    """Measures all tasks and prints the result.

    Raises:
        UserError: An argument is out of range, or the system is not Linux.
    """
    check_positive(args, "rounds")
    if not Path("/proc/self/status").exists():
        raise UserError("--mode=weights needs Linux, whose /proc reports the memory of processes.")
    with tempfile.TemporaryDirectory() as folder:
        files = _write_files(args.variant, Path(folder))
        size = files["google"].stat().st_size
        measurements = [
            *_measure_loading(files, args.rounds),
            *_measure_conversion(files, size),
            *_measure_prediction(files["google"], Path(folder), args.rounds),
        ]
    rows = [measurement._asdict() for measurement in measurements]
    environment = {
        "variant": args.variant,
        "mebibytes": round(size / 2**20, 1),
        "rounds": args.rounds,
    }
    if args.json:
        print(json.dumps({**environment, "measurements": rows}))
        return
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    print_table(rows, _COLUMNS)


def _write_files(variant: str, folder: Path) -> dict[str, Path]:
    """Writes random weights in each of the published layouts."""
    import numpy as np

    from mixer_jax.checkpoints.formats import write_npz, write_safetensors
    from mixer_jax.checkpoints.layouts import layout_views

    config, rng = FAMILY.get_config(variant), np.random.default_rng(0)
    shapes = FAMILY.param_shapes(config, _IMAGE_SIZE, _NUM_CLASSES)
    layouts = {layout.name.lower(): layout for layout in FAMILY.weight_layouts()}
    flat = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    files = {layout: folder / f"weights{suffix}" for layout, suffix in _SUFFIXES.items()}
    write_npz(str(files["google"]), layout_views(flat, layouts["google"]), {})
    write_safetensors(str(files["timm"]), layout_views(flat, layouts["timm"]), {})
    return files


def _measure_loading(files: dict[str, Path], num_rounds: int) -> list[Measurement]:
    """Times mixer_jax, the format's own reader, and reading the bytes of the file."""
    import numpy as np
    import safetensors.numpy

    from mixer_jax.checkpoints.load import load_checkpoint

    def load_npz(path: Path) -> Any:
        with np.load(path) as archive:
            return {name: archive[name] for name in archive.files}

    readers: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "google": ("numpy.load", load_npz),
        "timm": ("safetensors.numpy.load_file", safetensors.numpy.load_file),
    }
    measurements = []
    for layout, path in files.items():
        reader_name, reader = readers[layout]
        tasks: dict[str, Callable[[Path], Any]] = {
            "read_bytes": Path.read_bytes,
            "load_checkpoint": lambda path: load_checkpoint(str(path)),
            reader_name: reader,
        }
        times: dict[str, list[float]] = {name: [] for name in tasks}
        for _ in range(num_rounds):
            for name, task in tasks.items():
                start = time.perf_counter()
                loaded = task(path)
                times[name].append(time.perf_counter() - start)
                del loaded
        for name, seconds in times.items():
            ratios = [a / b for a, b in zip(seconds, times["read_bytes"], strict=True)]
            task_name = f"load {path.suffix}: {name}"
            medians = statistics.median(seconds), statistics.median(ratios)
            measurements.append(Measurement(task_name, *medians))
    return measurements


def _measure_conversion(files: dict[str, Path], size: int) -> list[Measurement]:
    """Converts each file to the other layout, each in a new process."""
    measurements = []
    for source, target in (("google", "timm"), ("timm", "google")):
        converted = files[source].with_name(f"converted{_SUFFIXES[target]}")
        start = time.perf_counter()
        peak = int(_run_python("-c", _CONVERT, str(files[source]), str(converted)))
        seconds = time.perf_counter() - start
        converted.unlink()
        measurements.append(Measurement(f"convert {source} to {target}", seconds, peak / size))
    return measurements


def _measure_prediction(file: Path, folder: Path, num_rounds: int) -> list[Measurement]:
    """Classifies one image in new processes, the first of which finds an empty cache."""
    from mixer_jax.benchmarks.sample_jpegs import sample_jpegs

    image = folder / "image.jpg"
    image.write_bytes(sample_jpegs(1)[0])
    times = []
    for _ in range(num_rounds + 1):
        start = time.perf_counter()
        _run_python("-m", "mixer_jax.predict", f"--checkpoint={file}", str(image), home=folder)
        times.append(time.perf_counter() - start)
    first, later = times[0], statistics.median(times[1:])
    return [
        Measurement("predict one image, empty cache", first, 1.0),
        Measurement("predict one image, cached program", later, later / first),
    ]


def _run_python(*args: str, home: Path | None = None) -> str:
    """Runs Python and returns its output; `home` holds the cache of compiled programs."""
    environment = {**os.environ, **({"HOME": str(home)} if home else {})}
    command = [sys.executable, *args]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return result.stdout
