"""What a step moves to and from a TPU's memory, part by part, by the TPU's compiler, without a TPU.

Bytes say where time goes that the chip does not spend on products, before there is a chip to
measure on. They are those of the compiled program, not of a model of it.
"""

import argparse
import importlib.metadata
import os
import re
import sys
from pathlib import Path

from mixer_jax.benchmarks.asked import add_work, read_ours
from mixer_jax.benchmarks.contestants import REFERENCE, Contestant, Setting, check_device
from mixer_jax.benchmarks.outputs import add_outputs, check_outputs, write_outputs
from mixer_jax.benchmarks.traffic_rows import as_json, floors, print_steps
from mixer_jax.cli import common
from mixer_jax.errors import RunError, UserError
from mixer_jax.models.mixer_config import VARIANTS, check_image_size
from mixer_jax.planning.topology import ENVIRONMENT, parse_topology, tpu_devices

DESCRIPTION = (
    "Compile a Mixer's step for a TPU that is not here, and tell what it moves to and from memory."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what this mode takes to the command line."""
    add_work(parser)
    parser.add_argument(
        "--topology", default="v6e:2x2", metavar="CHIP:SIZE", help="of TPUs; default: v6e:2x2"
    )
    parser.add_argument(
        "--batch_size", type=int, default=128, help="images a device and step; default: 128"
    )
    parser.add_argument(
        "--step", default="train", choices=["train", "infer"], help="which step; default: train"
    )
    parser.add_argument("--peers", default=REFERENCE, choices=[REFERENCE, "none"])
    parser.add_argument(
        "--quick", action="store_true", help="compile for less long, to worse programs"
    )
    parser.add_argument("--dump", type=Path, metavar="FOLDER", help="write the programs there")
    add_outputs(parser, picture=False)


def run(known: argparse.Namespace) -> None:
    """Compiles as the command line says and prints the result.

    Raises:
        UserError: an argument is out of range, or there is no compiler.
        RunFailedError: a program cannot be written.
    """
    topology = parse_topology(known.topology)
    if not topology.chip.is_tpu:
        raise UserError(
            f"--topology={known.topology}: programs can be compiled here for TPUs only; for GPUs "
            "see python -m mixer_jax.plan, or measure on one with --mode=train"
        )
    common.check_positive(known, "batch_size", "num_classes")
    check_image_size(known.image_size, known.image_size, VARIANTS[known.variant].patch_size)
    contestants = [Contestant(REFERENCE, REFERENCE)] if known.peers == REFERENCE else []
    contestants += read_ours(known, known.step)
    check_outputs(known)
    if known.dump:
        _make_folder(known.dump)

    # From here on the heavy libraries are needed.
    os.environ.update(ENVIRONMENT)
    common.configure_jax(compilation_cache="")
    device = tpu_devices(topology)[0]
    check_device(contestants, device.platform)
    from mixer_jax.benchmarks.compiled_steps import compile_step, read_step
    from mixer_jax.planning.aot_compile import Compiled

    dtype = "bfloat16" if known.dtype == "auto" else known.dtype
    sizes = (known.image_size, known.num_classes, dtype, known.batch_size)
    setting = Setting(known.step, known.variant, *sizes)
    steps = []
    for contestant in contestants:
        print(f"compiling {contestant.name}", file=sys.stderr, flush=True)
        compiled = compile_step(contestant, setting, device, quick=known.quick)
        if known.dump and isinstance(compiled, Compiled):
            _write(known.dump, contestant.name, compiled.text)
        steps.append(read_step(contestant.name, compiled, setting, topology))
    steps += floors(setting, topology)
    report = {
        **setting._asdict(),
        "topology": topology.name,
        "jax": importlib.metadata.version("jax"),
        "libtpu": importlib.metadata.version("libtpu"),
        "quick": known.quick,
        "steps": as_json(steps),
    }
    write_outputs(known, report)
    if not known.json:
        what = "training step" if known.step == "train" else "inference"
        print(
            f"{what} of Mixer-{known.variant}, {known.image_size} px, {known.num_classes:,} "
            f"classes, {known.batch_size} images a device, {dtype}\n"
            f"compiled for a device of {topology.name}, not run; jax {report['jax']}, "
            f"libtpu {report['libtpu']}\n"
        )
        print_steps(report["steps"])


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--dump={folder} cannot be made ({error.strerror})") from error


def _write(folder: Path, name: str, text: str) -> None:
    path = folder / f"{re.sub('[^a-z0-9]+', '_', name)}.hlo"
    try:
        path.write_text(text)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror})") from error
