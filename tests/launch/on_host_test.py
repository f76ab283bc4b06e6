"""Tests of launch/on_host.sh with a fake training process."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers import launch_scripts

pytestmark = pytest.mark.slow

# Stands in for Python: prints its arguments and ends as the first one says.
FAKE_PYTHON = """
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
def env(tmp_path: Path) -> dict[str, str]:
    """Returns the environment variables of `on_host.sh` with a fake Python."""
    python = launch_scripts.write_program(tmp_path / "python", FAKE_PYTHON)
    return {"PYTHON": python, "MIXER_RUN": str(tmp_path / "run"), "MIXER_GRACE": "1"}


def on_host(step: str, *arguments: str, **env: str) -> str:
    result = launch_scripts.run("on_host.sh", step, *arguments, **env)
    assert result.returncode == 0, result
    return result.stdout


def test_start_runs_detached_until_stop(env: dict[str, str]) -> None:
    assert on_host("result", **env) == "none\n"
    assert on_host("follow", **env) == ""
    on_host("stop", **env)
    on_host("start", "wait", "--x=it's", **env)
    assert on_host("result", **env) == "running\n"
    follower = launch_scripts.start("on_host.sh", "follow", **env)
    on_host("stop", **env)
    out, _ = follower.communicate(timeout=20)
    assert out == "arguments: wait --x=it's\nready\nstopped at step 12 of 60\n"
    assert on_host("result", **env) == "rc=143 (stop requested)\n"
    assert on_host("follow", "1", **env) == "stopped at step 12 of 60\n"

    on_host("start", "2", **env)
    assert on_host("follow", **env) == "arguments: 2\n"
    assert on_host("result", **env) == "rc=2\n"


def test_start_ends_a_run_that_is_still_there(env: dict[str, str]) -> None:
    assert on_host("start", "hang", **env) == ""
    old = [int(Path(env["MIXER_RUN"], name).read_text()) for name in ("group", "pid")]
    assert all(map(launch_scripts.is_alive, old))
    # It prints that it ends the other run.
    assert on_host("start", "finish", **env) != ""
    assert not any(map(launch_scripts.is_alive, old))
    on_host("follow", **env)
    assert on_host("result", **env) == "rc=0\n"


def test_result_of_a_killed_run_is_none(env: dict[str, str]) -> None:
    on_host("start", "hang", **env)
    os.killpg(int(Path(env["MIXER_RUN"], "group").read_text()), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while on_host("result", **env) != "none\n":
        assert time.monotonic() < deadline


@pytest.mark.parametrize("step", ["", "begin", "--help"])
def test_unknown_step_is_rejected(step: str, env: dict[str, str]) -> None:
    steps = ("start", "follow", "result", "stop")
    result = launch_scripts.run("on_host.sh", step, **env)
    launch_scripts.assert_usage_error(result, f"'{step}'", *steps)
