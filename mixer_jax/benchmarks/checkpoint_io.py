"""`--mode=weights`: time to load, memory to convert, time to a first prediction.

The ratio of each task is

- loading: time relative to reading the file in the same round, median over rounds;
- converting: peak memory relative to the size of the weights;
- predicting: time relative to the first prediction, which compiles.

Does not import JAX.
"""

import argparse
import importlib.resources
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mixer_jax.benchmarks.candidates import add_model_arg, parse_model
from mixer_jax.benchmarks.compare import median_ratio
from mixer_jax.benchmarks.report import Column, print_table
from mixer_jax.cli.common import check_positive
from mixer_jax.errors import UserError
from mixer_jax.models.registry import get_family, parse_model_name

DESCRIPTION = "Measure loading and converting weights, and a prediction from a cold start."

_IMAGE_SIZE, _NUM_CLASSES = 224, 1000
# Name, seconds and ratio of a task.
_Task = tuple[str, float, float]
# Prints the peak memory of a conversion in bytes, without that of its parent.
_CONVERT = """
import contextlib, io, re, sys
from mixer_jax import convert
with contextlib.redirect_stdout(io.StringIO()):
    convert.main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(int(peak[1]) * 1024)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this mode."""
    add_model_arg(parser, "L/16")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; default: 7")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all tasks.

    Raises:
        UserError: An argument is out of range, or the system is not Linux.
    """
    model = parse_model(args)
    check_positive(args, "rounds")
    if not Path("/proc/self/status").exists():
        raise UserError("--mode=weights needs Linux, whose /proc reports the memory of processes.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        google, timm = folder / "google.npz", folder / "timm.safetensors"
        _write_weights(model, google, timm)
        size = google.stat().st_size
        measurements = [
            *_measure_loading(google, timm, args.rounds),
            _measure_conversion("google to timm", google, folder / "converted.safetensors", size),
            _measure_conversion("timm to google", timm, folder / "converted.npz", size),
            *_measure_prediction(google, folder, args.rounds),
        ]
    return {
        "model": model,
        "mebibytes": round(size / 2**20, 1),
        "rounds": args.rounds,
        "measurements": [
            {"name": name, "seconds": seconds, "ratio": ratio}
            for name, seconds, ratio in measurements
        ],
    }


def print_report(report: dict[str, Any]) -> None:
    """Prints a table."""
    print(", ".join(f"{name} {report[name]}" for name in ("model", "mebibytes", "rounds")))
    print_table(report["measurements"], [Column("seconds", "seconds"), Column("ratio", "ratio")])


def random_params(model: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Creates float32 parameters of a model at 224 pixels, by path."""
    family_name, variant = parse_model_name(model)
    family = get_family(family_name)
    shapes = family.param_shapes(family.get_config(variant), _IMAGE_SIZE, _NUM_CLASSES)
    return {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}


def _write_weights(model: str, google: Path, timm: Path) -> None:
    """Writes random weights in each of the published layouts."""
    from mixer_jax.checkpoints.formats import write_npz, write_safetensors
    from mixer_jax.checkpoints.layouts import layout_tensors

    flat = random_params(model, np.random.default_rng(0))
    family = get_family(parse_model_name(model)[0])
    layouts = {layout.name.lower(): layout for layout in family.weight_layouts()}
    write_npz(str(google), layout_tensors(flat, layouts["google"]), {})
    write_safetensors(str(timm), layout_tensors(flat, layouts["timm"]), {})


def _measure_loading(google: Path, timm: Path, num_rounds: int) -> list[_Task]:
    """Times mixer_jax, the format's own reader, and reading the bytes of the file."""
    import safetensors.numpy

    from mixer_jax.checkpoints.load import load_checkpoint

    def load_npz(path: Path) -> Any:
        with np.load(path) as archive:
            return {name: archive[name] for name in archive.files}

    measurements = []
    for path, reader_name, reader in [
        (google, "numpy.load", load_npz),
        (timm, "safetensors.numpy.load_file", safetensors.numpy.load_file),
    ]:
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
            ratio = median_ratio(seconds, times["read_bytes"])
            measurements.append((f"load {path.suffix}: {name}", statistics.median(seconds), ratio))
    return measurements


def _measure_conversion(direction: str, source: Path, target: Path, size: int) -> _Task:
    """Converts a file to another layout in a new process."""
    start = time.perf_counter()
    peak = int(_run_python("-c", _CONVERT, str(source), str(target)))
    seconds = time.perf_counter() - start
    target.unlink()
    return f"convert {direction}", seconds, peak / size


def _measure_prediction(weights: Path, folder: Path, num_rounds: int) -> list[_Task]:
    """Classifies a photograph in new processes, the first of which finds an empty cache."""
    image = folder / "image.jpg"
    photographs = importlib.resources.files("sklearn.datasets.images")
    image.write_bytes(photographs.joinpath("china.jpg").read_bytes())
    times = []
    for _ in range(num_rounds + 1):
        start = time.perf_counter()
        _run_python("-m", "mixer_jax.predict", f"--checkpoint={weights}", str(image), home=folder)
        times.append(time.perf_counter() - start)
    first, later = times[0], statistics.median(times[1:])
    return [
        ("predict one image, empty cache", first, 1.0),
        ("predict one image, cached program", later, later / first),
    ]


def _run_python(*args: str, home: Path | None = None) -> str:
    """Runs Python and returns its output; `home` holds the cache of compiled programs."""
    environment = {**os.environ, **({"HOME": str(home)} if home else {})}
    command = [sys.executable, *args]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return result.stdout
