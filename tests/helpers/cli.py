"""A door of the package as a real process, as a user starts it."""

import subprocess
import sys


def run_cli(
    door: str, *arguments: str, code: int = 0, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs a door with arguments, and checks its exit code; a warning is an error.

    Args:
        door: its name.
        *arguments: of the command line.
        code: that it must exit with.
        before: Python to run in the process first; empty: the door is started as a user does.
    """
    program = ["-m", f"mixer_jax.{door}"]
    if before:
        program = [
            "-c",
            f"{before}\nimport runpy; runpy.run_module('mixer_jax.{door}', "
            "run_name='__main__', alter_sys=True)",
        ]
    command = [sys.executable, "-W", "error", *program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == code, done.stderr
    return done
