"""Tests of launch/on_host.sh and launch/slurm.sbatch, with played runs."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers import launch_scripts
from tests.helpers.messages import mentions

# Stands for the Python that trains: says what it was given, and ends as the first argument says.
PLAYED = """
[[ "$1 $2 $3" == "-u -m mixer_jax.main" ]] || exit 99
echo "arguments: ${*:4}"
case "$4" in
  finish) printf 'checkpoint  /somewhere' ;;
  wait) trap 'echo "stopped at step 12 of 60"; exit 143' TERM
    echo ready
    while :; do sleep 0.05; done ;;
  hang) trap '' TERM INT
    while :; do sleep 0.05; done ;;
  *) exit "$4" ;;
esac
"""


@pytest.fixture
def played(tmp_path: Path) -> dict[str, str]:
    """The environment in which a run is played."""
    python = launch_scripts.program(tmp_path / "python", PLAYED)
    return {"PYTHON": python, "MIXER_RUN": str(tmp_path / "run"), "MIXER_GRACE": "1"}


def on_host(step: str, *arguments: str, **env: str) -> str:
    result = launch_scripts.run("on_host.sh", step, *arguments, **env)
    assert result.returncode == 0, result
    return result.stdout


def test_a_run_on_a_host_outlives_what_started_it(played: dict[str, str]) -> None:
    assert on_host("result", **played) == "none\n"
    assert on_host("follow", **played) == ""
    on_host("stop", **played)
    on_host("start", "wait", "--x=it's", **played)
    assert on_host("result", **played) == "running\n"
    follower = launch_scripts.start("on_host.sh", "follow", **played)
    on_host("stop", **played)
    out, _ = follower.communicate(timeout=20)
    assert out == "arguments: wait --x=it's\nready\nstopped at step 12 of 60\n"
    assert on_host("result", **played) == "rc=143 by hand\n"
    assert on_host("follow", "1", **played) == "stopped at step 12 of 60\n"

    on_host("start", "2", **played)
    assert on_host("follow", **played) == "arguments: 2\n"
    assert on_host("result", **played) == "rc=2\n"


def test_a_run_that_is_left_makes_room_for_the_next(played: dict[str, str]) -> None:
    assert on_host("start", "hang", **played) == ""
    left = [int(Path(played["MIXER_RUN"], name).read_text()) for name in ("group", "pid")]
    assert all(map(launch_scripts.is_there, left))
    # It says that it ends the other one.
    assert on_host("start", "finish", **played) != ""
    assert not any(map(launch_scripts.is_there, left))
    on_host("follow", **played)
    assert on_host("result", **played) == "rc=0\n"


def test_a_run_that_was_killed_is_none(played: dict[str, str]) -> None:
    on_host("start", "hang", **played)
    os.killpg(int(Path(played["MIXER_RUN"], "group").read_text()), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while on_host("result", **played) != "none\n":
        assert time.monotonic() < deadline


@pytest.mark.parametrize("step", ["", "begin", "--help"])
def test_steps_that_there_are_not(step: str, played: dict[str, str]) -> None:
    steps = ("start", "follow", "result", "stop")
    launch_scripts.refuses(launch_scripts.run("on_host.sh", step, **played), f"'{step}'", *steps)


def slurm(folder: Path, code: int, *arguments: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Runs the job's script with a played SLURM; returns what SLURM was asked."""
    asked = folder / "asked"
    asked.unlink(missing_ok=True)
    launch_scripts.program(folder / "bin" / "srun", f'echo "srun $*" >>{asked}; exit {code}')
    launch_scripts.program(folder / "bin" / "scontrol", f'echo "scontrol $*" >>{asked}')
    path = f"{folder}/bin:{os.environ['PATH']}"
    here = {"SLURM_SUBMIT_DIR": str(Path.cwd()), "SLURM_JOB_ID": "7", "PATH": path}
    result = launch_scripts.run("slurm.sbatch", *arguments, **here)
    return result, asked.read_text() if asked.exists() else ""


def test_a_slurm_job_goes_back_into_the_queue_until_it_is_done(tmp_path: Path) -> None:
    train = " .venv/bin/python -u -m mixer_jax.main --config=x"
    for code, expected in ((0, 0), (143, 0), (1, 1), (2, 2), (139, 139)):
        result, asked = slurm(tmp_path, code, "--config=x")
        assert result.returncode == expected
        srun, *more = asked.splitlines()
        assert srun.startswith("srun ")
        assert srun.endswith(train)
        assert more == (["scontrol requeue 7"] if code == 143 else [])


def test_a_slurm_job_of_nothing_is_refused(tmp_path: Path) -> None:
    launch_scripts.refuses(slurm(tmp_path, 0)[0], "--config")
    outside = launch_scripts.run("slurm.sbatch", "--config=x")
    assert outside.returncode != 0
    assert mentions(outside.stderr, "sbatch")


def test_a_slurm_job_is_warned_before_its_time_is_up() -> None:
    lines = Path("launch/slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    # To the processes of the run, not to the batch script (B:), which has nothing to save.
    assert "--signal=TERM@120" in options
    assert "--requeue" in options
    # sbatch reads no option after the first command.
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
