"""Arguments, exit codes and standard streams that all commands share."""

import argparse
import codecs
import gc
import io
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mixer_jax.checkpoints.best import BEST, Step
from mixer_jax.config.schema import FIELDS
from mixer_jax.distributed.hardware import silence_libtpu
from mixer_jax.errors import (
    RunError,
    UserError,
    describe_file_failure,
    describe_full_memory,
    describe_lost_host,
    exit_code,
)
from mixer_jax.files import atomic_write

if TYPE_CHECKING:
    from mixer_jax.checkpoints.model_info import ModelInfo
    from mixer_jax.data.source import Source

CHECKPOINT_HELP = (
    "a workdir or RUN/checkpoints/STEP, Google's .npz, timm's .safetensors, .pth or .ckpt, or "
    "hf:OWNER/NAME"
)
DATASET_HELP = "TFDS name, folder:PATH, manifest:FILE, hf:NAME or wds:PATH"
_EXIT_SIGPIPE = 128 + signal.SIGPIPE
# Number of new objects after which Python first searches for reference cycles. A prediction has
# 240,000 at its end, and training 390,000 at its first step.
_FIRST_COLLECTION = 500_000
# Messages of argparse and their replacements, the first that matches.
_ARGPARSE_MESSAGES = {
    r"argument (?P<name>\S+): invalid choice: (?P<value>.*) \(choose from (?P<choices>.*)\)": (
        "{name} must be one of {choices}, got '{value}'."
    ),
    r"argument (?P<name>\S+): invalid int value: (?P<value>.*)": (
        "{name} must be an integer, got '{value}'."
    ),
    r"argument (?P<name>\S+): expected (one|at least one) argument": "{name} must have a value.",
    r"argument (?P<name>\S+): ignored explicit argument (?P<value>.*)": (
        "{name} must not have a value, got '{value}'."
    ),
    r"argument (?P<name>\S+): (?P<rule>must .*)": "{name} {rule}",
    r"the following arguments are required: (?P<name>[^,]*)": "{name} is required. See --help.",
    r"the following arguments are required: (?P<names>.*)": "{names} are required. See --help.",
    r"unrecognized arguments: (?P<names>.*)": "unknown argument {names}. See --help.",
}


def run_cli(main: Callable[[Sequence[str]], int], *, needs_output: bool = True) -> NoReturn:
    """Runs a command and exits with the code that it returns.

    Usage errors exit with 2, and failures of runs, disks, memory and other hosts with 1, after one
    line on standard error. Commands that Ctrl-C, SIGTERM or SIGHUP stopped and that can resume exit
    with 130, 143 and 129.

    Args:
        main: Function from the arguments to the exit code.
        needs_output: Whether to exit when standard output fails: with 1, or, if nobody reads it any
            more (`| head`), silently with 141. Otherwise the command continues silently.
    """
    _delay_garbage_collection()
    wrap_stdio(needs_output)
    # Read when TensorFlow is imported, as TFDS and paths such as gs:// do if it is installed.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    # OpenCV's messages about damaged images do not name the file; ours do.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    # Notebooks set one that other programs may not have; figures are only written to files.
    os.environ["MPLBACKEND"] = "agg"
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
    except Exception as error:
        # Disks, file servers, the memory and other hosts may fail wherever a command uses them.
        description = (
            describe_file_failure(error) or describe_full_memory(error) or describe_lost_host(error)
        )
        if not description:
            raise
        print(f"error: {description}", file=sys.stderr)
        code = exit_code(error)
    # Excludes all objects from the searches for reference cycles at exit.
    gc.freeze()
    sys.exit(code)


def _delay_garbage_collection() -> None:
    """Delays Python's search for reference cycles until a command has started.

    Start-up creates objects that are kept: 600 searches find nothing to free, and take a sixth of
    the CPU time to the first step. After the first search, Python searches at its usual intervals.
    """
    thresholds = gc.get_threshold()

    def restore(phase: str, info: dict[str, int]) -> None:
        if gc.get_threshold()[0] == _FIRST_COLLECTION:
            gc.set_threshold(*thresholds)

    # Stays in the list: if it removed itself while it is called, Python would skip the next one.
    gc.callbacks.append(restore)
    gc.set_threshold(_FIRST_COLLECTION, *thresholds[1:])


def configure_jax(compilation_cache: str, *, cpu_only: bool = False) -> None:
    """Silences libraries, and enables JAX's compilation cache in a folder or at a URL.

    Args:
        compilation_cache: Folder or URL; the cache is not enabled if it is empty.
        cpu_only: Whether to leave accelerators alone, which may be busy with a run.
    """
    from absl import logging

    # Commands have done so already, but programs that call functions of this package have not.
    silence_libtpu()
    # orbax logs errors, with stack traces, before it raises them.
    logging.set_verbosity(logging.FATAL)
    if cpu_only:
        # Read when JAX is imported, which not every command does.
        os.environ["JAX_PLATFORMS"] = "cpu"
        if sys.modules.get("jax"):
            import jax

            jax.config.update("jax_platforms", "cpu")
    if compilation_cache:
        import jax

        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def wrap_stdio(needs_output: bool) -> None:
    """Makes the standard streams UTF-8, opens those that are closed, and handles failed writes.

    The process exits when standard output fails if `needs_output`, see `run_cli`. It never exits
    when standard error fails.
    """
    sys.stdin = sys.stdin or _open_devnull("r")
    sys.stdout = _OutputStream(sys.stdout or _open_devnull("w"), needs_output)
    sys.stderr = _OutputStream(sys.stderr or _open_devnull("w"), False)


def _open_devnull(mode: str) -> Any:
    # Stays open until Python exits.
    return open(os.open(os.devnull, os.O_RDWR), mode, closefd=False)


class _OutputStream(io.TextIOWrapper):
    """UTF-8 stream that drops everything after a failed write, or exits."""

    def __init__(self, stream: Any, exits: bool):
        # Referenced, as its destructor would close the file.
        self._stream, self._exits = stream, exits
        super().__init__(
            stream.buffer,
            encoding="utf-8",
            errors="backslashreplace",
            line_buffering=bool(stream.line_buffering),
            write_through=getattr(stream, "write_through", False),
        )

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._handle(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._handle(error)

    def _handle(self, error: OSError) -> None:
        # Buffered output must not fail again, at the latest when Python exits.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, self.fileno())
        os.close(devnull)
        if self._exits and isinstance(error, BrokenPipeError):
            sys.exit(_EXIT_SIGPIPE)
        if self._exits:
            raise RunError(f"cannot write to standard output: {error.strerror}.") from error


class ArgumentParser(argparse.ArgumentParser):
    """Argument parser that raises `UserError` and takes no abbreviations."""

    def __init__(self, *, prog: str | None = None, **kwargs: Any):
        super().__init__(prog=prog and _called_as(prog), allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raises UserError, with argparse's commonest messages in the form of the others."""
        for pattern, template in _ARGPARSE_MESSAGES.items():
            if match := re.fullmatch(pattern, message, re.DOTALL):
                parts = match.groupdict()
                # Python versions differ in the quotes around choices.
                unquoted = {
                    name: parts[name].replace("'", "")
                    for name in ("value", "choices") & parts.keys()
                }
                raise UserError(template.format(**parts | unquoted))
        raise UserError(f"{message.rstrip('.')}. See --help.")


def _called_as(prog: str) -> str:
    """Returns the name of a program, "python -m mixer_jax.NAME", as its user started it."""
    # Without the arguments of the command: Python, its options and the console script.
    program = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    if not any(Path(part).stem == "mixer-jax" for part in program):
        return prog
    name = prog.removeprefix("python -m mixer_jax.")
    return prog if name == prog else f"mixer-jax {'train' if name == 'main' else name}"


def add_checkpoint_args(parser: ArgumentParser) -> None:
    """Adds the arguments of commands that load a checkpoint."""
    parser.add_argument("--checkpoint", required=True, metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    add_checkpoint_override_args(parser)
    parser.add_argument(
        "--dtype",
        choices=[choice for choice in FIELDS["model.dtype"].choices if choice != "auto"],
        default="",
        help="dtype of activations and matmuls; default: that of the checkpoint, or bfloat16 on "
        "accelerators, float32 on CPU",
    )


def add_step_arg(parser: ArgumentParser) -> None:
    """Adds --step, which selects one checkpoint of a run."""
    parser.add_argument(
        "--step",
        type=parse_step,
        metavar="STEP",
        help='checkpoint step in a workdir, or "best" by its checkpoint.best_metric; default: the '
        "newest",
    )


def add_checkpoint_override_args(parser: ArgumentParser) -> None:
    """Adds the arguments that select one step of a run and override a checkpoint's metadata."""
    add_step_arg(parser)
    parser.add_argument(
        "--image_size",
        type=parse_image_size,
        metavar="SIDE or HEIGHTxWIDTH",
        help="in pixels; default: that of the checkpoint",
    )
    parser.add_argument(
        "--gelu",
        choices=FIELDS["model.gelu"].choices,
        default="",
        help="default: that of the checkpoint",
    )
    parser.add_argument(
        "--eval_crop",
        choices=FIELDS["preprocess.eval_crop"].choices,
        default="",
        help="evaluation crop; default: that of the checkpoint",
    )
    parser.add_argument(
        "--eval_crop_fraction",
        type=float,
        metavar="FRACTION",
        help="side of the crop by that of the resized image; default: that of the checkpoint, or "
        "0.875 with --eval_crop",
    )


class _PlaceholderAction(argparse.Action):
    """Argument that --help lists for all configuration keys, and that is none itself."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        # Not at the top, since commands without a config do not need it.
        from mixer_jax.config.config import check_key_exists

        check_key_exists("KEY", [*FIELDS])


def add_override_arg(parser: ArgumentParser, help: str) -> None:
    """Adds --config.KEY to the help; the keys themselves are left to `parse_overrides`."""
    parser.add_argument(
        "--config.KEY",
        metavar="VALUE",
        dest=argparse.SUPPRESS,
        action=_PlaceholderAction,
        help=help,
    )


def add_workdir_arg(parser: ArgumentParser, default: str) -> None:
    """Adds --workdir; `default` describes the workdir without the argument."""

    def parse_workdir(text: str) -> str:
        if not text:
            raise argparse.ArgumentTypeError(f"must not be empty. Leave it out for {default}.")
        return text

    parser.add_argument(
        "--workdir", type=parse_workdir, help=f"folder or gs:// URL; default: {default}"
    )


def parse_step(text: str) -> Step:
    """Parses the step of a checkpoint.

    Raises:
        argparse.ArgumentTypeError: The text is neither an integer nor "best".
    """
    if text == BEST:
        return BEST
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer or {BEST}, got {text!r}.") from None


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parses seeds such as "0,1,2"; raises UserError unless they are different valid seeds."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,18}", part) for part in parts):
        raise UserError(
            f"--seeds must be integers from 0 to {FIELDS['seed'].max}, such as 0,1,2, got {text!r}."
        )
    seeds = tuple(map(int, parts))
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds must be different integers, got {text!r}. Name each seed once.")
    for seed in seeds:
        FIELDS["seed"].check("--seeds", seed)
    return seeds


def parse_image_size(text: str) -> tuple[int, int]:
    """Parses "448" or "384x512" as height and width.

    Raises:
        argparse.ArgumentTypeError: The text has another form.
    """
    sides = text.split("x")
    if len(sides) > 2 or not all(re.fullmatch("[0-9]{1,9}", side) and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"must be SIDE or HEIGHTxWIDTH in pixels, got {text!r}.")
    return int(sides[0]), int(sides[-1])


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError if one of these arguments is less than 1."""
    for name in names:
        value = getattr(args, name)
        if value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}.")


def check_out(out: Path, suffixes: Sequence[str]) -> None:
    """Raises UserError if the file of --out could not be written, before any work is done.

    Args:
        out: Path of the file.
        suffixes: Suffixes of which it must have one.
    """
    if out.suffix.lower() not in suffixes:
        raise UserError(f"--out must end in {' or '.join(suffixes)}, got {out}.")
    if out.is_dir():
        raise UserError(f"--out must be a file, got the folder {out}.")
    check_parent_writable(f"--out={out}", out.parent)


def check_parent_writable(argument: str, parent: Path) -> None:
    """Raises UserError if a folder, in which the path `argument` is to be written, cannot be."""
    if not parent.is_dir():
        raise UserError(f"{argument}: folder {parent} does not exist. Create it first.")
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise UserError(
            f"{argument}: folder {parent} cannot be written ({error.strerror})."
        ) from error


def write_out(out: Path, content: str | bytes) -> None:
    """Writes the file of --out as a whole; raises RunError if that fails, e.g. on a full disk."""
    try:
        atomic_write(out, content)
    except OSError as error:
        raise RunError(f"--out={out} cannot be written ({error.strerror}).") from error


def warn_if_resized(info: "ModelInfo") -> None:
    """Prints a line on standard error if a checkpoint was resized to another image size."""
    if info.resize_note:
        print(f"{info.name}: weights {info.resize_note}", file=sys.stderr)


def print_notes(source: "Source") -> None:
    """Prints what was skipped or chosen when a dataset was opened, on standard error."""
    for note in source.notes:
        print(note, file=sys.stderr)


def read_class_names(path: str | None) -> list[str]:
    """Reads class names from the file of --labels, one per line; "-" reads standard input.

    Raises:
        UserError: The file cannot be read, is not UTF-8, or has an empty line.
    """
    if not path:
        return []
    encoded = _read_bytes(path, "--labels")
    try:
        text = encoded.decode()
    except UnicodeDecodeError as error:
        line = encoded.count(b"\n", 0, error.start) + 1
        raise UserError(f"--labels={path} must be UTF-8, but line {line:,} is not.") from None
    names = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if not all(names):
        raise UserError(f"--labels={path} must have one name per line, got an empty line or file.")
    return names


def read_path_list(path: str, flag: str) -> list[str]:
    """Reads the file names listed in a file, skipping empty lines.

    "-" is standard input, and `flag` is named in errors.

    Raises:
        UserError: The file cannot be read.
    """
    names = map(str.strip, os.fsdecode(_read_bytes(path, flag)).split("\n"))
    return [name for name in names if name]


def _read_bytes(path: str, flag: str) -> bytes:
    """Reads a text file, or standard input, without the byte order mark that Windows adds."""
    try:
        # Unlike Path.expanduser, this leaves the home of an unknown user as it is.
        file = Path(os.path.expanduser(path))
        encoded = sys.stdin.buffer.read() if path == "-" else file.read_bytes()
    except OSError as error:
        raise UserError(f"{flag}={path} cannot be read: {error.strerror}.") from error
    return encoded.removeprefix(codecs.BOM_UTF8)
