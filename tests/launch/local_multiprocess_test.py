"""Tests of launch/local_multiprocess.sh: training by two processes, and how processes end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixer_jax.checkpoints.resolve import list_steps
from tests.helpers import launch_scripts
from tests.helpers.messages import mentions
from tests.helpers.processes import wait_until
from tests.helpers.tiny_run import NO_REGULARIZATION, to_flags

pytestmark = pytest.mark.slow

# Stands in for Python: prints its environment and waits; the first argument of the run says how
# the processes end.
FAKE_PYTHON = (
    f"""
[[ "$1" == -c ]] && exec {sys.executable} "$@"
"""
    + """
echo "process $JAX_PROCESS_ID of $JAX_NUM_PROCESSES, $JAX_NUM_CPU_DEVICES devices, port" \
  "${JAX_COORDINATOR_ADDRESS##*:}, on $JAX_PLATFORMS"
# A child process, like those that load images.
sleep 61 &
echo "$$ $!" >"$WORKSPACE/pids.$JAX_PROCESS_ID"
trap 'echo terminated; exit 143' TERM
trap 'echo interrupted; exit 130' INT
case "$4 $JAX_PROCESS_ID" in
  "fail 1") exit 3 ;;
  "hang 1") exit 3 ;;
  "hang 0") trap '' TERM ;;
esac
while :; do sleep 0.05; done
"""
)


def start_fake_run(workspace: Path, *arguments: str) -> subprocess.Popen[str]:
    python = launch_scripts.write_program(workspace / "python", FAKE_PYTHON)
    env = {"PYTHON": python, "WORKSPACE": str(workspace), "TMPDIR": str(workspace)}
    return launch_scripts.start("local_multiprocess.sh", *arguments, **env)


def assert_cleaned_up(workspace: Path) -> None:
    """Fails unless all processes of the run end and its temporary files are deleted."""
    pids = [int(pid) for file in workspace.glob("pids.*") for pid in file.read_text().split()]
    assert len(pids) == 4
    deadline = time.monotonic() + 10
    while any(map(launch_scripts.is_alive, pids)) or list(workspace.glob("tmp.*")):
        assert time.monotonic() < deadline, "processes or files remain"
        time.sleep(0.05)


def wait_for_both(process: subprocess.Popen[str], workspace: Path) -> None:
    wait_until(lambda: len(list(workspace.glob("pids.*"))) == 2, process)
    time.sleep(0.1)  # For the trap that follows.


def test_two_processes_train_and_save_a_checkpoint(digits_dir: str, tmp_path: Path) -> None:
    changes = {**NO_REGULARIZATION, "evals__test__every_steps": 0, "checkpoint__every_steps": 0}
    flags = to_flags(digits_dir, **changes, num_steps=2)
    arguments = ("2", "--config=configs/digits.py", f"--workdir={tmp_path}/run", *flags)
    result = launch_scripts.run("local_multiprocess.sh", *arguments, PYTHON=sys.executable)
    assert result.returncode == 0, result
    lines = [line for line in result.stdout.splitlines() if line.startswith("[0] ")]
    assert any(mentions(line, "2", "cpu", "mesh") for line in lines)
    assert list_steps(str(tmp_path / "run")) == [2]


def test_processes_get_their_environment_and_a_line_prefix(tmp_path: Path) -> None:
    process = start_fake_run(tmp_path, "2", "--devices=3", "wait")
    wait_for_both(process, tmp_path)
    process.terminate()
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (143, "")
    lines = sorted(out.splitlines())
    (port,) = {line.split("port ")[1].split(",")[0] for line in lines if "port" in line}
    assert lines == sorted(
        f"[{index}] {text}"
        for index in range(2)
        for text in ("terminated", f"process {index} of 2, 3 devices, port {port}, on cpu")
    )
    assert_cleaned_up(tmp_path)


@pytest.mark.parametrize("whole_group", [False, True])
def test_ctrl_c_reaches_each_process_once(whole_group: bool, tmp_path: Path) -> None:
    process = start_fake_run(tmp_path, "2", "wait")
    wait_for_both(process, tmp_path)
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out.count("interrupted") == 2
    assert_cleaned_up(tmp_path)


@pytest.mark.parametrize("scenario", ["fail", "hang"])
def test_failed_process_ends_the_others(scenario: str, tmp_path: Path) -> None:
    process = start_fake_run(tmp_path, "2", "--grace=1", scenario)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 3, err
    assert ("[0] terminated" in out) == (scenario == "fail")
    assert any(mentions(line, "process 1", "3") for line in err.splitlines())
    assert_cleaned_up(tmp_path)


def test_killed_script_leaves_no_processes(tmp_path: Path) -> None:
    process = start_fake_run(tmp_path, "2", "wait")
    wait_for_both(process, tmp_path)
    process.kill()
    process.communicate(timeout=20)
    assert_cleaned_up(tmp_path)


def test_usage_error_of_the_run_sets_the_exit_code() -> None:
    arguments = ("2", "--config=configs/digits.py", "--config.num_steps=many")
    result = launch_scripts.run("local_multiprocess.sh", *arguments, PYTHON=sys.executable)
    assert result.returncode == 2
    lines = [line for line in result.stdout.splitlines() if line.startswith("[1] ")]
    assert any(mentions(line, "num_steps", "many") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("processes",)),
        (("--config=x",), ("--config=x", "processes")),
        (("0", "--config=x"), ("0", "processes")),
        (("2", "--devices=a", "--config=x"), ("--devices", "a")),
        (("2", "--grace=", "--config=x"), ("--grace",)),
        (("2",), ("--config",)),
    ],
)
def test_invalid_arguments_are_rejected(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    result = launch_scripts.run("local_multiprocess.sh", *arguments)
    launch_scripts.assert_usage_error(result, *words)


def test_python_without_packages_is_rejected_once(tmp_path: Path) -> None:
    python = launch_scripts.write_program(tmp_path / "python", f'exec {sys.executable} -S "$@"')
    arguments = ("2", "--config=configs/digits.py")
    result = launch_scripts.run("local_multiprocess.sh", *arguments, PYTHON=python)
    launch_scripts.assert_usage_error(result, "requirements.txt", "make demo")
