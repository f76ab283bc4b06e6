"""Doors one after the other in one real process, which pays for starting and importing once."""

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
    """What a door left.

    Attributes:
        code: its exit code.
        out: what it wrote to standard output.
        err: what it wrote to standard error.
    """

    code: int
    out: str
    err: str


def run_commands(commands: list[list[str]], folder: Path) -> list[CliResult]:
    """Runs commands `python -m mixer_jax.DOOR …` in a folder; a warning is an error.

    They stop after the first that fails.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.helpers.cli_session"],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    # Nothing goes past a door's own streams.
    assert done.stderr == ""
    return [CliResult(*told) for told in json.loads(done.stdout)]


def _run(command: list[str]) -> CliResult:
    python, option, module, *arguments = command
    assert (python, option) == ("python", "-m")
    own = sys.argv, sys.stdout, sys.stderr
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    sys.argv, sys.stdout, sys.stderr = [module, *arguments], out, err
    # As where it was not imported before.
    sys.modules.pop(module, None)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        raise AssertionError("a door ends with an exit code")
    except SystemExit as end:
        code = end.code
    finally:
        # Those of the door close ours when they go.
        theirs = sys.stdout, sys.stderr
        sys.argv, sys.stdout, sys.stderr = own
    for stream in theirs:
        stream.flush()
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    assert isinstance(code, int)
    return CliResult(code, *texts)


def _main() -> None:
    told: list[CliResult] = []
    for command in json.load(sys.stdin):
        told.append(_run(command))
        if told[-1].code:
            break
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    _main()
