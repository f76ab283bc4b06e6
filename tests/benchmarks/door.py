"""The benchmark's door, as a real process."""

import subprocess
import sys


def run_door(*arguments: str, code: int = 0, before: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the door with arguments, and checks its exit code.

    Args:
        *arguments: of the command line.
        code: that it must exit with.
        before: Python to run in the process first; empty: the door is started as a user does.
    """
    program = ["-m", "mixer_jax.benchmark"]
    if before:
        program = [
            "-c",
            f"{before}\nimport runpy; runpy.run_module('mixer_jax.benchmark', "
            "run_name='__main__', alter_sys=True)",
        ]
    command = [sys.executable, "-W", "error", *program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done
