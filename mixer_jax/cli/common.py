"""What the doors share: their arguments, and how a program ends."""

import argparse
import codecs
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import logging

from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.cli.streams import wrap_stdio
from mixer_jax.config.schema import FIELDS
from mixer_jax.distributed.tpu_env import silence_libtpu
from mixer_jax.errors import RunError, UserError, exit_code

CHECKPOINT_HELP = (
    "a run's folder or RUN/checkpoints/STEP, Google's .npz, timm's .safetensors or .pth, or "
    "hf:OWNER/NAME"
)


class ArgumentParser(argparse.ArgumentParser):
    """Tells a mistake in one line, as everything behind it does; takes no abbreviations."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; see --help")


def run_cli(main: Callable[[Sequence[str]], int], *, needs_output: bool = True) -> NoReturn:
    """Runs a door and exits with what it returns: 0 if all went well.

    130 and 143 are for work that Ctrl-C or SIGTERM stopped, and that can go on. A user's mistake
    exits with 2, a run that failed with 1, both after one line on standard error.

    Args:
        main: from the arguments of the command line to the exit code.
        needs_output: whether the door's work is in vain once standard output fails: it then ends
            with 1, or, where nobody reads it any more (`| head`), quietly with 141. Otherwise it
            goes on without a word.
    """
    wrap_stdio(needs_output)
    # Read when TensorFlow is imported, which TFDS, clu and paths like gs:// do by themselves.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    # OpenCV's complaints of a damaged image do not name it; ours do.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    silence_libtpu()
    try:
        try:
            code = main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = exit_code(error)
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        code = exit_code(error)
    sys.exit(code)


def add_checkpoint_args(parser: ArgumentParser) -> None:
    """Adds what the doors that use weights have in common: which, and how they are used."""
    parser.add_argument("--checkpoint", required=True, metavar="WEIGHTS", help=CHECKPOINT_HELP)
    add_checkpoint_override_args(parser)
    parser.add_argument(
        "--dtype",
        choices=[choice for choice in FIELDS["model.dtype"].choices if choice != "auto"],
        default="",
        help="of the computation; default: as the weights say, or bfloat16 on accelerators, "
        "float32 on CPU",
    )


def add_checkpoint_override_args(parser: ArgumentParser) -> None:
    """Adds how weights are loaded, wherever their name stands on the command line."""
    parser.add_argument("--step", type=int, help="which checkpoint of a run; default: the newest")
    parser.add_argument(
        "--image_size",
        type=parse_image_size,
        metavar="SIDE or HEIGHTxWIDTH",
        help="pixels; default: what the weights are for",
    )
    parser.add_argument(
        "--gelu", choices=FIELDS["model.gelu"].choices, default="", help="default: as they tell"
    )
    parser.add_argument(
        "--eval_crop",
        choices=FIELDS["preprocess.eval_crop"].choices,
        default="",
        help="how images are cropped; default: as the weights tell",
    )


def parse_image_size(text: str) -> tuple[int, int]:
    """Returns height and width of "448" or "384x512".

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; pass a side or HEIGHTxWIDTH, pixels"
        )
    return int(sides[0]), int(sides[-1])


def warn_if_resized(about: ModelInfo) -> None:
    """Says on standard error if weights were changed to fit an image size."""
    if about.resize_note:
        print(f"{about.name}: weights {about.resize_note}", file=sys.stderr)


def read_class_names(path: str | None) -> list[str]:
    """Returns the names of classes that --labels names a file of; none without it.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or has an empty line.
    """
    if not path:
        return []
    labels = _read_lines(path, "--labels")
    if not labels or not all(labels):
        raise UserError(f"--labels={path} has an empty line, or none; give one name a line")
    return labels


def read_path_list(path: str, flag: str) -> list[str]:
    """Returns the names of files that a text file, or standard input, holds, one a line.

    Raises:
        UserError: it cannot be read.
    """
    names = map(str.strip, os.fsdecode(_read_bytes(path, flag)).split("\n"))
    return [name for name in names if name]


def _read_lines(path: str, flag: str) -> list[str]:
    """Returns the lines of a text file, or of standard input, without space around them."""
    encoded = _read_bytes(path, flag)
    try:
        text = encoded.decode()
    except UnicodeDecodeError as error:
        number = encoded.count(b"\n", 0, error.start) + 1
        raise UserError(f"{flag}={path} line {number:,} is not UTF-8; save it as such") from None
    return [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []


def _read_bytes(path: str, flag: str) -> bytes:
    """Returns a text file, or standard input, without the mark that Windows begins one with."""
    try:
        # Unlike pathlib's, this leaves the home of an unknown user as it is.
        file = Path(os.path.expanduser(path))
        encoded = sys.stdin.buffer.read() if path == "-" else file.read_bytes()
    except OSError as error:
        raise UserError(f"{flag}={path} cannot be read: {error.strerror}") from error
    return encoded.removeprefix(codecs.BOM_UTF8)


def check_positive(known: argparse.Namespace, *names: str) -> None:
    """Raises UserError if one of these arguments is under 1."""
    for name in names:
        value = getattr(known, name)
        if value < 1:
            raise UserError(f"--{name}={value} is out of range; pass 1 or more")


def configure_jax(compilation_cache: str) -> None:
    """Makes the libraries quiet and lets JAX keep what it compiles.

    Args:
        compilation_cache: folder or URL of compiled programs; empty: none is kept.
    """
    logging.set_verbosity(logging.ERROR)
    if compilation_cache:
        import jax

        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
