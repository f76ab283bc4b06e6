"""Scripts of launch/ as real processes, as a user runs them."""

import os
import subprocess
from pathlib import Path

from tests.helpers.messages import mentions

FOLDER = Path(__file__).parent
# Variables that describe a cluster: tests must not depend on where they run.
_CLUSTER_VARIABLES = (
    "SLURM_",
    "MIXER_",
    "JAX_COORDINATOR",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)


def script_env(**changes: str) -> dict[str, str]:
    """Returns this environment without variables of a cluster, and with changes."""
    env = {
        key: value for key, value in os.environ.items() if not key.startswith(_CLUSTER_VARIABLES)
    }
    # `make test PYTHON=python3.12` passes it on to the tests.
    env.pop("PYTHON", None)
    return env | changes


def run(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a script until it exits, with changes of the environment."""
    return subprocess.run(
        ["bash", f"launch/{script}", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=script_env(**env),
        stdin=subprocess.DEVNULL,
    )


def start(script: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
    """Starts a script as a terminal does: in its own process group."""
    return subprocess.Popen(
        ["bash", f"launch/{script}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=script_env(**env),
        start_new_session=True,
    )


def write_program(path: Path, text: str) -> str:
    """Writes an executable bash script and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def is_alive(pid: int) -> bool:
    """Returns whether a process is running; a zombie is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def assert_usage_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Fails unless a script rejects its arguments in one line that mentions all words."""
    assert result.returncode == 2, result
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert mentions(line, *words)
