"""Scripts of launch/, run as a user runs them."""

import os
import subprocess
from pathlib import Path

from tests.helpers.messages import mentions

FOLDER = Path(__file__).parent
# Everything that says where something runs: tests are not to depend on where they do.
_LEFT_OUT = ("SLURM_", "MIXER_", "JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def environment(**changes: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_LEFT_OUT)}
    # `make test PYTHON=python3.12` hands it on to the tests.
    kept.pop("PYTHON", None)
    return kept | changes


def run(script: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end, with so many changes of the environment."""
    return subprocess.run(
        ["bash", f"launch/{script}", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
    )


def start(script: str, *arguments: str, **changes: str) -> subprocess.Popen[str]:
    """Starts a script as a terminal does: in a group of its own."""
    return subprocess.Popen(
        ["bash", f"launch/{script}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environment(**changes),
        start_new_session=True,
    )


def program(path: Path, text: str) -> str:
    """Writes a bash script that can be called; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def is_there(pid: int) -> bool:
    """Returns whether a process goes on; one that nobody has taken notice of yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def refuses(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Holds that a script refused its arguments in one line that mentions all these words."""
    assert result.returncode == 2, result
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert mentions(line, *words)
