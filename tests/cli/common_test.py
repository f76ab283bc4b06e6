"""Tests of what commands share: exit codes, standard streams, arguments, start-up."""

import argparse
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixer_jax import main, plan, visualize
from mixer_jax.checkpoints.resolve import list_steps
from mixer_jax.cli import common
from mixer_jax.errors import UserError
from tests.helpers.messages import mentions, raises
from tests.helpers.tiny_run import NO_REGULARIZATION, to_flags

LONG = "print('x' * 100_000)"
SHORT = "print('x')"
FLUSHED = "print('x', flush=True)"

# Runs commands in one process and prints the heavy modules that they import.
IMPORTS_OF_COMMANDS = """
import contextlib, importlib, io, sys
for command in sys.argv[1:]:
    name, *argv = command.split()
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            importlib.import_module(f"mixer_jax.{name}").main(argv)
        except (SystemExit, ValueError):
            pass
    heavy = {"jax", "flax", "orbax", "grain", "tensorflow", "cv2"} & sys.modules.keys()
    if heavy:
        print(command, *sorted(heavy))
        break
"""


def run(code: str, redirections: str, *, needs_output: bool = True) -> tuple[int, str]:
    """Runs a command with this code in a shell; returns its exit code and standard error."""
    program = (
        "import sys\n"
        "from mixer_jax.cli.common import run_cli\n"
        "def main(argv):\n"
        f"    {code}\n"
        "    print('continued', file=sys.stderr)\n"
        "    return 0\n"
        f"run_cli(main, needs_output={needs_output})"
    )
    # $gone is a pipe whose reader exits before anything is written.
    line = f'exec {{gone}}> >(exit); wait $!; "$0" -W error -c "$1" {redirections}'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable, program],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("code", [LONG, SHORT, FLUSHED, "sys.exit(print('x'))"])
def test_run_cli_ends_silently_if_nobody_reads_its_output(code: str) -> None:
    exit_code, stderr = run(code, ">&$gone")
    assert exit_code == 141
    assert stderr == ("continued\n" if code == SHORT else "")


@pytest.mark.parametrize("code", [LONG, SHORT, FLUSHED])
def test_run_cli_reports_a_full_disk_in_one_line(code: str) -> None:
    exit_code, stderr = run(code, ">/dev/full")
    assert exit_code == 1
    (line,) = stderr.removeprefix("continued\n").splitlines()
    assert mentions(line, "No space left on device")


@pytest.mark.parametrize("redirections", [">&$gone", ">/dev/full", ">&-"])
@pytest.mark.parametrize("code", [LONG, SHORT, FLUSHED])
def test_run_cli_continues_without_output_that_is_not_needed(code: str, redirections: str) -> None:
    assert run(code, redirections, needs_output=False) == (0, "continued\n")


@pytest.mark.parametrize("redirections", ["2>&$gone", "2>/dev/full", "2>&-", "<&- 2>&-"])
def test_run_cli_continues_without_standard_error(redirections: str) -> None:
    assert run("print(repr(sys.stdin.read()) if sys.stdin else 'none')", redirections)[0] == 0


def test_run_cli_collects_garbage_late_first_and_then_as_usual() -> None:
    program = (
        "import gc\n"
        "from mixer_jax.cli.common import run_cli\n"
        "usual = gc.get_threshold()\n"
        "class Cycle:\n"
        "    def __init__(self):\n"
        "        self.cycle = self\n"
        "def main(argv):\n"
        "    before = sum(stats['collections'] for stats in gc.get_stats())\n"
        "    objects = [Cycle() for _ in range(100_000)]\n"
        "    print(sum(stats['collections'] for stats in gc.get_stats()) - before)\n"
        "    del objects\n"
        "    for _ in range(1_000_000):\n"
        "        Cycle()\n"
        "    print(gc.get_threshold() == usual, len(gc.get_objects()) < 500_000)\n"
        "    return 0\n"
        "run_cli(main)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "True", "True"]
    assert not done.stderr


def test_run_cli_shows_the_traceback_of_a_bug() -> None:
    exit_code, stderr = run("raise BrokenPipeError", "")
    assert exit_code == 1
    assert stderr.endswith("\nBrokenPipeError\n")


@pytest.mark.parametrize(
    ("error", "exit_code", "parts"),
    [
        ("UserError('x must be 1')", 2, ["x must be 1"]),
        ("RunError('disk failed')", 1, ["disk failed"]),
        ("KeyboardInterrupt", 130, ["interrupted"]),
        ("MemoryError", 1, ["memory", "MemoryError"]),
        ("ValueError('cannot load') from OSError(12, 'no memory')", 1, ["memory", "cannot load"]),
        ('RuntimeError("can\'t start new thread")', 1, ["memory", "new thread"]),
        ("OSError(5, 'failed', '/disk/out.json')", 1, ["/disk/out.json", "Input/output error"]),
        ("OSError(30, 'failed')", 1, ["Read-only file system"]),
    ],
)
def test_run_cli_turns_errors_into_one_line_and_an_exit_code(
    error: str, exit_code: int, parts: list[str]
) -> None:
    code, stderr = run(f"from mixer_jax.errors import RunError, UserError; raise {error}", "")
    assert code == exit_code
    (line,) = stderr.splitlines()
    assert mentions(line, *parts)


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (
            "ValueError('UNKNOWN: Gloo AllGather failed: Connection reset by peer')",
            ["Gloo", "Connection reset by peer"],
        ),
        (
            "TimeoutError('failed') from RuntimeError('Barrier failed:\\nTask 1 timeout')",
            ["Task 1 timeout"],
        ),
    ],
)
def test_run_cli_reports_a_lost_host_in_one_line(error: str, parts: list[str]) -> None:
    code, stderr = run(
        f"import jax; jax.distributed.is_initialized = lambda: True; raise {error}", ""
    )
    assert code == 1
    (line,) = stderr.splitlines()
    assert mentions(line, "another host", *parts)


def test_run_cli_reports_no_lost_host_in_a_run_on_one() -> None:
    code, stderr = run("import jax; raise ValueError('NCCL: /data/igloo: barrier')", "")
    assert code == 1
    assert stderr.endswith("\nValueError: NCCL: /data/igloo: barrier\n")


def test_run_cli_writes_utf_8_in_any_locale() -> None:
    program = (
        "from mixer_jax.cli.common import run_cli\n"
        "run_cli(lambda argv: print('\\xd7 \\udcff') or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert done.stdout.decode() == "× \\udcff\n"


@pytest.mark.slow
def test_training_ends_normally_if_its_output_fails(digits_dir: str, tmp_path: Path) -> None:
    flags = to_flags(digits_dir, **NO_REGULARIZATION, num_steps=2, optimizer__warmup_steps=1)
    command = ["mixer_jax.main", "--config=configs/digits.py", f"--workdir={tmp_path}/run", *flags]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert 2 in list_steps(f"{tmp_path}/run")


def test_help_and_usage_errors_import_no_heavy_library() -> None:
    commands = [
        *(
            f"{path.stem} --help"
            for path in sorted(Path("mixer_jax").glob("*.py"))
            if is_command(path)
        ),
        "main --config=configs/digits.py --config.sed=1",
        "main --config=configs/digits.py --config.recipe.grad_accum_steps=3",
        "visualize data --config=configs/digits.py --out=a.gif",
        "evaluate --checkpoint=nowhere --batch_size=0",
        "transfer --checkpoint=nowhere --suite=none",
    ]
    assert len(commands) > 10
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS_OF_COMMANDS, *commands],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""


def is_command(path: Path) -> bool:
    return "def main(" in path.read_text() and path.stem != "__main__"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--name=a", "--number=x"], ["--number", "integer", "'x'"]),
        (["--name=a", "--num=1"], ["--num=1", "--help"]),
        (["--name=Q/16"], ["--name", "a, b/c", "'Q/16'"]),
        (["--name"], ["--name"]),
        (["--name=a", "--size=1x2x3"], ["--size", "SIDE", "'1x2x3'"]),
        (["--name=a", "--flag=1"], ["--flag", "'1'"]),
        ([], ["--name", "--help"]),
    ],
)
def test_argument_parser_raises_one_line_and_takes_no_abbreviations(
    argv: list[str], parts: list[str]
) -> None:
    parser = common.ArgumentParser(prog="test")
    parser.add_argument("--number", type=int)
    parser.add_argument("--name", required=True, choices=["a", "b/c"])
    parser.add_argument("--size", type=common.parse_image_size)
    parser.add_argument("--flag", action="store_true")
    with raises(UserError, *parts) as caught:
        parser.parse_args(argv)
    assert not mentions(str(caught.value), "argument") or "unknown argument" in str(caught.value)
    assert str(caught.value).endswith(".")


def test_add_workdir_arg_rejects_an_empty_workdir() -> None:
    parser = common.ArgumentParser(prog="test")
    common.add_workdir_arg(parser, "runs/NAME")
    assert parser.parse_args([]).workdir is None
    assert parser.parse_args(["--workdir=a"]).workdir == "a"
    with raises(UserError, "--workdir", "runs/NAME"):
        parser.parse_args(["--workdir="])


def test_add_checkpoint_args_leaves_the_metadata_of_the_checkpoint_by_default() -> None:
    parser = common.ArgumentParser(prog="test")
    common.add_checkpoint_args(parser)
    args = parser.parse_args(["--checkpoint=a"])
    assert vars(args) == {
        "checkpoint": "a",
        "step": None,
        "image_size": None,
        "gelu": "",
        "eval_crop": "",
        "eval_crop_fraction": None,
        "dtype": "",
    }
    with raises(UserError, "--dtype", "float32", "bfloat16"):
        parser.parse_args(["--checkpoint=a", "--dtype=auto"])


def test_parse_step_reads_an_integer_or_best() -> None:
    assert (common.parse_step("20"), common.parse_step("best")) == (20, "best")
    parser = common.ArgumentParser(prog="test")
    common.add_checkpoint_args(parser)
    with raises(UserError, "--step", "best", "'newest'"):
        parser.parse_args(["--checkpoint=a", "--step=newest"])


def test_parse_seeds_reads_different_integers() -> None:
    assert common.parse_seeds("0,7, 3") == (0, 7, 3)
    for text in ("", "0,0", "0,00", "a", "-1", "1.5", "0,", "4294967296"):
        with raises(UserError, "--seeds", text or "''"):
            common.parse_seeds(text)


def test_parse_image_size_reads_a_side_or_height_and_width() -> None:
    assert common.parse_image_size("448") == (448, 448)
    assert common.parse_image_size("384x512") == (384, 512)
    for text in ("", "0", "1x2x3", "-224", "224px"):
        with raises(argparse.ArgumentTypeError, repr(text)):
            common.parse_image_size(text)


def test_check_positive_names_the_argument() -> None:
    args = argparse.Namespace(batch_size=0, rounds=1)
    common.check_positive(args, "rounds")
    with raises(UserError, "--batch_size", "0"):
        common.check_positive(args, "rounds", "batch_size")


def test_read_class_names_reads_one_name_per_line(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_bytes(b"\xef\xbb\xbf cat\r\n\xc3\x84ffin \n")
    assert common.read_class_names(str(path)) == ["cat", "Äffin"]
    assert common.read_class_names(None) == []


@pytest.mark.parametrize(
    ("content", "parts"), [(b"", []), (b"a\n\nb\n", []), (b"a\nb\xff\n", ["UTF-8", "2"])]
)
def test_read_class_names_rejects_other_files(
    content: bytes, parts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "labels"
    path.write_bytes(content)
    with raises(UserError, "--labels", str(path), *parts):
        common.read_class_names(str(path))
    with raises(UserError, "--labels", f"{tmp_path}/missing"):
        common.read_class_names(f"{tmp_path}/missing")


def test_read_path_list_skips_empty_lines_and_reads_standard_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded = io.BytesIO(b"a.jpg\n\n b c.png\n\xff.jpg")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(encoded))
    assert common.read_path_list("-", "--files_from") == ["a.jpg", "b c.png", "\udcff.jpg"]


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        (main, []),
        (plan, ["--topology=v5e:1x1"]),
        (visualize, ["data", "--out=batch.png"]),
    ],
)
def test_commands_refuse_the_placeholder_of_their_help(
    command: Any, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for flag in (["--config.KEY=1"], ["--config.KEY", "1"]):
        with raises(UserError, "config.KEY", "key"):
            command.main([*argv, "--config=digits", *flag])
    assert list(tmp_path.iterdir()) == []
