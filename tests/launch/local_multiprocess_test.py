"""Tests of launch/local_multiprocess.sh: a real run of two processes, and how they end."""

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

# Stands for a process that trains: says where it is and waits; each is told how to end.
PLAYED = (
    f"""
[[ "$1" == -c ]] && exec {sys.executable} "$@"
"""
    + """
echo "at $JAX_PROCESS_ID of $JAX_NUM_PROCESSES, $JAX_NUM_CPU_DEVICES devices, port" \
  "${JAX_COORDINATOR_ADDRESS##*:}, on $JAX_PLATFORMS"
# A child of its own, as processes that prepare images are.
sleep 61 &
echo "$$ $!" >"$PLACE/pids.$JAX_PROCESS_ID"
trap 'echo asked; exit 143' TERM
trap 'echo interrupted; exit 130' INT
case "$4 $JAX_PROCESS_ID" in
  "fail 1") exit 3 ;;
  "hang 1") exit 3 ;;
  "hang 0") trap '' TERM ;;
esac
while :; do sleep 0.05; done
"""
)


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    python = launch_scripts.program(place / "python", PLAYED)
    env = {"PYTHON": python, "PLACE": str(place), "TMPDIR": str(place)}
    return launch_scripts.start("local_multiprocess.sh", *arguments, **env)


def nothing_is_left(place: Path) -> None:
    """Holds that no process of the run goes on, and no file."""
    pids = [int(pid) for file in place.glob("pids.*") for pid in file.read_text().split()]
    assert len(pids) == 4
    deadline = time.monotonic() + 10
    while any(map(launch_scripts.is_there, pids)) or list(place.glob("tmp.*")):
        assert time.monotonic() < deadline, "something is left"
        time.sleep(0.05)


def wait_for_both(process: subprocess.Popen[str], place: Path) -> None:
    wait_until(lambda: len(list(place.glob("pids.*"))) == 2, process)
    time.sleep(0.1)  # For the trap that follows.


def test_two_processes_train_to_the_end(digits_dir: str, tmp_path: Path) -> None:
    changes = {**NO_REGULARIZATION, "evals__test__every_steps": 0, "checkpoint__every_steps": 0}
    arguments = to_flags(digits_dir, **changes, num_steps=2)
    run = ("2", "--config=configs/digits.py", f"--workdir={tmp_path}/run", *arguments)
    result = launch_scripts.run("local_multiprocess.sh", *run, PYTHON=sys.executable)
    assert result.returncode == 0, result
    said = [line for line in result.stdout.splitlines() if line.startswith("[0] ")]
    assert any(mentions(line, "2", "cpu", "mesh") for line in said)
    assert list_steps(str(tmp_path / "run")) == [2]


def test_each_process_is_told_its_place_and_its_lines_are_marked(tmp_path: Path) -> None:
    process = start(tmp_path, "2", "--devices=3", "wait")
    wait_for_both(process, tmp_path)
    process.terminate()
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (143, "")
    lines = sorted(out.splitlines())
    ports = {line.split("port ")[1].split(",")[0] for line in lines if "port" in line}
    (port,) = ports
    assert lines == sorted(
        f"[{number}] {what}"
        for number in range(2)
        for what in ("asked", f"at {number} of 2, 3 devices, port {port}, on cpu")
    )
    nothing_is_left(tmp_path)


@pytest.mark.parametrize("whole_group", [False, True])
def test_ctrl_c_reaches_all(whole_group: bool, tmp_path: Path) -> None:
    process = start(tmp_path, "2", "wait")
    wait_for_both(process, tmp_path)
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out.count("interrupted") == 2
    nothing_is_left(tmp_path)


@pytest.mark.parametrize("how", ["fail", "hang"])
def test_one_that_fails_takes_the_others_down(how: str, tmp_path: Path) -> None:
    process = start(tmp_path, "2", "--grace=1", how)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 3, err
    assert ("[0] asked" in out) == (how == "fail")
    assert any(mentions(line, "process 1", "3") for line in err.splitlines())
    nothing_is_left(tmp_path)


def test_nothing_is_left_of_a_script_that_was_killed(tmp_path: Path) -> None:
    process = start(tmp_path, "2", "wait")
    wait_for_both(process, tmp_path)
    process.kill()
    process.communicate(timeout=20)
    nothing_is_left(tmp_path)


def test_the_code_of_a_wrong_run_is_passed_on() -> None:
    arguments = ("2", "--config=configs/digits.py", "--config.num_steps=many")
    result = launch_scripts.run("local_multiprocess.sh", *arguments, PYTHON=sys.executable)
    assert result.returncode == 2
    said = [line for line in result.stdout.splitlines() if line.startswith("[1] ")]
    assert any(mentions(line, "num_steps", "many") for line in said)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("processes",)),
        (("--config=x",), ("--config=x", "processes")),
        (("0", "--config=x"), ("0", "processes")),
        (("2", "--devices=a", "--config=x"), ("--devices",)),
        (("2", "--grace=", "--config=x"), ("--grace",)),
        (("2",), ("--config",)),
    ],
)
def test_wrong_numbers_are_refused(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    launch_scripts.refuses(launch_scripts.run("local_multiprocess.sh", *arguments), *words)


def test_a_python_without_the_packages_is_told_once(tmp_path: Path) -> None:
    python = launch_scripts.program(tmp_path / "python", f'exec {sys.executable} -S "$@"')
    arguments = ("2", "--config=configs/digits.py")
    result = launch_scripts.run("local_multiprocess.sh", *arguments, PYTHON=python)
    launch_scripts.refuses(result, "requirements.txt", "make demo")
