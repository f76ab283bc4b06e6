"""A command of the package as a real process, as a user starts it."""

import subprocess
import sys


def run_cli(
    command: str, *arguments: str, code: int = 0, preamble: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m mixer_jax.COMMAND` and checks its exit code; a warning is an error.

    Args:
        command: Name of the module.
        *arguments: Arguments of the command line.
        code: Expected exit code.
        preamble: Python code that runs in the process first.
    """
    program = ["-m", f"mixer_jax.{command}"]
    if preamble:
        program = [
            "-c",
            f"{preamble}\nimport runpy; runpy.run_module('mixer_jax.{command}', "
            "run_name='__main__', alter_sys=True)",
        ]
    result = subprocess.run(
        [sys.executable, "-W", "error", *program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == code, result.stderr
    return result
