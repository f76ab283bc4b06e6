"""Weights: time to load beside reading the file, memory to convert, time to a first prediction."""

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

from mixer_jax.cli.common import check_positive
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import VARIANTS, num_tokens, param_shapes

DESCRIPTION = "Measure loading and converting weights, and a prediction from a cold start."

_IMAGE_SIZE, _NUM_CLASSES = 224, 1000
_ENDINGS = {"google": ".npz", "timm": ".safetensors"}
# Prints the greatest memory that a conversion had, in bytes; its parent's is not counted.
_CONVERT = """
import contextlib, io, re, sys
from mixer_jax import convert
with contextlib.redirect_stdout(io.StringIO()):
    convert.main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
print(int(peak[1]) * 1024)
"""


class Measurement(NamedTuple):
    """One thing measured.

    Attributes:
        task: what.
        seconds: median over rounds.
        ratio: of loading: median of the time over that of reading the file, in the same round. Of
            converting: greatest memory over the size of the weights. Of a prediction: over the
            first, which compiles.
    """

    task: str
    seconds: float
    ratio: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what this mode takes to the command line."""
    parser.add_argument("--variant", default="L/16", choices=list(VARIANTS), help="default: L/16")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; default: 7")


def run(known: argparse.Namespace) -> None:
    """Measures as the command line says and prints the result.

    Raises:
        UserError: an argument is out of range, or the machine does not tell what memory is used.
    """
    check_positive(known, "rounds")
    if not Path("/proc/self/status").exists():
        raise UserError("--mode=weights needs Linux, which tells the memory that programs use")
    with tempfile.TemporaryDirectory() as folder:
        files = _write_files(known.variant, Path(folder))
        size = files["google"].stat().st_size
        rows = [
            *_load(files, known.rounds),
            *_convert(files, size),
            *_predict(files["google"], Path(folder), known.rounds),
        ]
    facts = {"variant": known.variant, "mebibytes": round(size / 2**20, 1), "rounds": known.rounds}
    if known.json:
        print(json.dumps({**facts, "measurements": [row._asdict() for row in rows]}))
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'':44}  seconds  ratio")
    for row in rows:
        print(f"{row.task:44}  {row.seconds:7.2f}  {row.ratio:5.2f}")


def _write_files(variant: str, folder: Path) -> dict[str, Path]:
    """Writes random weights in the layouts that are published."""
    import numpy as np

    from mixer_jax.checkpoints.formats.npz import write_npz
    from mixer_jax.checkpoints.formats.safetensors import write_safetensors
    from mixer_jax.checkpoints.layouts import GOOGLE, TIMM, layout_views

    widths, rng = VARIANTS[variant], np.random.default_rng(0)
    shapes = param_shapes(widths, num_tokens(widths, _IMAGE_SIZE), _NUM_CLASSES)
    flat = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    files = {layout: folder / f"weights{ending}" for layout, ending in _ENDINGS.items()}
    write_npz(str(files["google"]), layout_views(flat, GOOGLE), {})
    write_safetensors(str(files["timm"]), layout_views(flat, TIMM), {})
    return files


def _load(files: dict[str, Path], rounds: int) -> list[Measurement]:
    """Times reading a file's bytes, ours, and what NumPy's or safetensors' own reader takes."""
    import numpy as np
    import safetensors.numpy

    from mixer_jax.checkpoints.load import load_checkpoint

    def by_numpy(path: Path) -> Any:
        with np.load(path) as archive:
            return {name: archive[name] for name in archive.files}

    peers: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "google": ("numpy.load", by_numpy),
        "timm": ("safetensors.numpy.load_file", safetensors.numpy.load_file),
    }
    measurements = []
    for layout, path in files.items():
        peer, load_by_peer = peers[layout]
        tasks: dict[str, Callable[[Path], Any]] = {
            "read_bytes": Path.read_bytes,
            "load_weights": lambda path: load_checkpoint(str(path)),
            peer: load_by_peer,
        }
        times: dict[str, list[float]] = {name: [] for name in tasks}
        for _ in range(rounds):
            for name, task in tasks.items():
                start = time.perf_counter()
                loaded = task(path)
                times[name].append(time.perf_counter() - start)
                del loaded
        for name, seconds in times.items():
            ratios = [own / read for own, read in zip(seconds, times["read_bytes"], strict=True)]
            measurements.append(
                Measurement(
                    f"load {path.suffix}: {name}",
                    statistics.median(seconds),
                    statistics.median(ratios),
                )
            )
    return measurements


def _convert(files: dict[str, Path], size: int) -> list[Measurement]:
    """Converts each file into the other layout, in a process of its own."""
    measurements = []
    for source, to in (("google", "timm"), ("timm", "google")):
        target = files[source].with_name(f"converted{_ENDINGS[to]}")
        start = time.perf_counter()
        peak = int(_run("-c", _CONVERT, str(files[source]), str(target)))
        seconds = time.perf_counter() - start
        target.unlink()
        measurements.append(Measurement(f"convert {source} to {to}", seconds, peak / size))
    return measurements


def _predict(file: Path, folder: Path, rounds: int) -> list[Measurement]:
    """Classifies one photograph in processes of their own; the first finds nothing compiled."""
    from mixer_jax.benchmarks.photographs import sample_photographs

    photograph = folder / "photograph.jpg"
    photograph.write_bytes(sample_photographs(1)[0])
    arguments = ["-m", "mixer_jax.predict", f"--checkpoint={file}", str(photograph)]
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        _run(*arguments, home=folder)
        times.append(time.perf_counter() - start)
    first, later = times[0], statistics.median(times[1:])
    return [
        Measurement("predict one photograph, nothing compiled yet", first, 1.0),
        Measurement("predict one photograph, program in the cache", later, later / first),
    ]


def _run(*arguments: str, home: Path | None = None) -> str:
    environment = {**os.environ, **({"HOME": str(home)} if home else {})}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout
