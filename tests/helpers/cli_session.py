"""Several commands in one real process, which starts and imports the libraries only once."""

import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent


class CliResult(NamedTuple):
    """Result of a command.

    Attributes:
        code: Exit code.
        out: Standard output.
        err: Standard error.
    """

    code: int
    out: str
    err: str


def run_commands(commands: list[list[str]], folder: Path) -> list[CliResult]:
    """Runs commands `python -m mixer_jax.COMMAND …` in a folder, up to the first that fails.

    A warning is an error.
    """
    process = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.helpers.cli_session"],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.returncode == 0, process.stderr
    # Commands write only to their own streams.
    assert process.stderr == ""
    return [CliResult(*result) for result in json.loads(process.stdout)]


def run_command(command: list[str]) -> CliResult:
    """Runs a command in this process, as `python -m` would, and captures its output."""
    python, option, module, *arguments = command
    assert (python, option) == ("python", "-m")
    original = sys.argv, sys.stdout, sys.stderr
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    sys.argv, sys.stdout, sys.stderr = [module, *arguments], out, err
    # As if the module had not been imported before.
    sys.modules.pop(module, None)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        raise AssertionError("a command must end with an exit code")
    except SystemExit as end:
        code = end.code
    finally:
        # The command may have wrapped our streams; its wrappers close them when they are deleted.
        wrappers = sys.stdout, sys.stderr
        sys.argv, sys.stdout, sys.stderr = original
    for stream in wrappers:
        stream.flush()
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    assert isinstance(code, int)
    return CliResult(code, *texts)


def _main() -> None:
    results: list[CliResult] = []
    for command in json.load(sys.stdin):
        results.append(run_command(command))
        if results[-1].code:
            break
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    _main()
