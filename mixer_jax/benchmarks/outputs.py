"""What is told meanwhile, and where results go beside the screen: a JSON file, a picture."""

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from mixer_jax.errors import RunError, UserError


def say(text: str) -> None:
    """Tells a person who waits how far the work is."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def add_outputs(parser: argparse.ArgumentParser, *, picture: bool) -> None:
    """Adds where results go to the command line.

    Args:
        parser: of the mode.
        picture: whether it can draw them.
    """
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the JSON there too")
    if picture:
        parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw them")


def check_outputs(known: argparse.Namespace) -> None:
    """Raises UserError if results could not be written; asked before the work is done."""
    for name in ("out", "picture"):
        path = getattr(known, name, None)
        if path is None:
            continue
        if path.is_dir():
            raise UserError(f"--{name}={path} is a folder; name a file in it")
        _check_folder(name, path, path.parent)
    if getattr(known, "picture", None):
        if known.picture.suffix != ".png":
            raise UserError(f"--picture={known.picture} is no kind of picture made here; use .png")
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("--picture needs matplotlib, which is not installed; leave it out")
    if getattr(known, "profile", None):
        folder = Path(known.profile)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--profile={folder} cannot be made ({error.strerror})") from error
        _check_folder("profile", folder, folder)


def _check_folder(name: str, path: Path, folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"--{name}={path}: there is no folder {folder}; make it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--{name}={path}: folder {folder} cannot be written ({error.strerror}); name another"
        ) from error


def write_outputs(known: argparse.Namespace, report: dict[str, Any]) -> None:
    """Writes the report as the command line says, and prints it where it asks for JSON.

    Raises:
        RunFailedError: a file cannot be written.
    """
    if known.json:
        print(json.dumps(report))
    if known.out:
        _write("out", known.out, (json.dumps(report, indent=2) + "\n").encode())
    if getattr(known, "picture", None):
        from mixer_jax.benchmarks.picture import draw

        _write("picture", known.picture, draw(report))


def _write(name: str, path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise RunError(f"--{name}={path} cannot be written ({error.strerror})") from error
