"""Tests of launch/tpu_vm.sh: recovery from preemptions, crashes and lost connections.

A fake gcloud, fake_gcloud.sh, replaces the cloud; the script is real.
"""

import collections
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers import launch_scripts
from tests.helpers.messages import mentions

pytestmark = pytest.mark.slow

LOCATION = ("--name=mixer", "--zone=us-west4-a")
MACHINES = (*LOCATION, "--type=v5litepod-64")
RUN_ARGUMENTS = ("--", "--config=configs/mixer_b16_i1k.py", "--workdir=gs://BUCKET/run")


class FakeCloud:
    """Cloud of fake_gcloud.sh, with a run whose results are scripted.

    Args:
        folder: Temporary folder for its state.
        run_results: Results of the run, one per query of tpu_vm.sh. See fake_gcloud.sh.
    """

    def __init__(self, folder: Path, run_results: list[str]):
        self.folder = folder
        folder.joinpath("bin").mkdir()
        shutil.copy("tests/launch/fake_gcloud.sh", folder / "bin" / "gcloud")
        (folder / "bin" / "gcloud").chmod(0o755)
        self.write("run", "".join(f"{line}\n" for line in run_results))

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    @property
    def env(self) -> dict[str, str]:
        path = f"{self.folder}/bin:{launch_scripts.script_env()['PATH']}"
        return {"PATH": path, "CLOUD": str(self.folder), "MIXER_POLL_SECONDS": "0"}

    def train(self, *options: str) -> subprocess.CompletedProcess[str]:
        result = launch_scripts.run("tpu_vm.sh", *MACHINES, *options, *RUN_ARGUMENTS, **self.env)
        # All scripted results were queried.
        assert (self.folder / "run").read_text() == "", result
        return result

    def actions(self) -> list[str]:
        """Returns short names of the commands that changed something, in order."""
        names = {
            "resources create": "create",
            "resources delete": "delete",
            "setup_host.sh": "setup",
            "on_host.sh start": "start",
            "on_host.sh follow": "follow",
            "on_host.sh stop": "stop",
            "tail -n 20": "tails",
        }
        calls = (self.folder / "calls").read_text().splitlines()
        return [short for call in calls for long, short in names.items() if long in call]

    def has_machines(self) -> bool:
        return (self.folder / "request").exists()


ONE_RUN = ["create", "setup", "start", "follow"]


def test_tpu_vm_follows_the_run_and_deletes_the_machines(tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, ["none", "rc=0"])
    result = cloud.train()
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["step 1/2  loss 2.3"]
    assert cloud.actions() == [*ONE_RUN, "delete"]
    assert not cloud.has_machines()


def test_tpu_vm_requests_new_machines_after_preemptions(tmp_path: Path) -> None:
    # The first preempts worker 0. The next two preempt another host, whose loss ends the run on
    # worker 0 with 1 or SIGABRT before the cloud reports it. The last stops the run by SIGTERM.
    preemptions = ["preempt", "later rc=1", "later rc=134", "preempt rc=143"]
    results = [line for preemption in preemptions for line in ("none", preemption)]
    cloud = FakeCloud(tmp_path, [*results, "none", "rc=0"])
    result = cloud.train("--spot")
    assert result.returncode == 0, result.stderr
    assert cloud.actions() == [*ONE_RUN, "delete"] * 5
    # Each loss is logged, with the same message.
    assert 4 in collections.Counter(result.stderr.splitlines()).values()


def test_tpu_vm_gives_up_after_max_restarts_preemptions(tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, ["none", "preempt"] * 2)
    result = cloud.train("--max_restarts=1")
    assert result.returncode == 1
    assert cloud.actions() == [*ONE_RUN, "delete", *ONE_RUN, "tails", "delete"]
    assert not cloud.has_machines()


@pytest.mark.parametrize("code", [1, 2])
def test_tpu_vm_does_not_retry_errors_of_the_run(code: int, tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, ["none", f"rc={code}"])
    result = cloud.train()
    assert result.returncode == code
    assert cloud.actions() == [*ONE_RUN, "tails", "delete"]
    assert mentions(result.stderr, f"code {code}")


def test_tpu_vm_retries_crashes_three_times_on_the_same_machines(tmp_path: Path) -> None:
    cloud = FakeCloud(
        tmp_path, ["none", "rc=139", "rc=139", "none", "none", "rc=134", "rc=134", "rc=134"]
    )
    result = cloud.train()
    assert result.returncode == 134, result.stderr
    assert cloud.actions() == ["create", *["setup", "start", "follow"] * 4, "tails", "delete"]


def test_tpu_vm_resets_the_crash_count_after_a_long_run(tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, ["none", "rc=139", *["none", "rc=139"] * 3, "none", "rc=0"])
    cloud.write("clock", "1000\n")
    launch_scripts.write_program(tmp_path / "bin" / "date", 'cat "$CLOUD/clock"')
    result = cloud.train()
    assert result.returncode == 0, result.stderr
    assert cloud.actions() == ["create", *["setup", "start", "follow"] * 5, "delete"]


def test_tpu_vm_restarts_a_run_stopped_by_sigterm_without_limit(tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, ["none", "rc=143", *["rc=143", "rc=143"] * 3, "rc=143", "rc=0"])
    result = cloud.train()
    assert result.returncode == 0, result.stderr
    assert cloud.actions() == ["create", *["setup", "start", "follow"] * 5, "delete"]
    assert sum(mentions(line, "SIGTERM") for line in result.stderr.splitlines()) == 4


def test_tpu_vm_follows_again_after_a_lost_connection(tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, ["none", "running", "", "running", "rc=0"])
    result = cloud.train("--keep")
    assert result.returncode == 0
    assert cloud.actions() == [*ONE_RUN, "follow", "follow", "follow"]
    assert "launch/tpu_vm.sh delete --name=mixer --zone=us-west4-a" in result.stderr
    assert cloud.has_machines()


def test_tpu_vm_follows_a_run_in_progress(tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, ["running", "rc=0"])
    cloud.write("request", "ACTIVE\n")
    cloud.write("node", "READY\n")
    assert cloud.train().returncode == 0
    assert cloud.actions() == ["follow", "delete"]


@pytest.mark.parametrize("code", [143, 1])
def test_tpu_vm_keeps_the_machines_after_a_requested_stop(code: int, tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, ["none", f"rc={code} (stop requested)"])
    result = cloud.train()
    assert result.returncode == code, result.stderr
    assert cloud.actions() == [*ONE_RUN, "tails"]
    assert cloud.has_machines()


def test_tpu_vm_deletes_the_machines_if_the_run_finished_before_the_stop(tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, ["none", "rc=0 (stop requested)"])
    result = cloud.train()
    assert result.returncode == 0, result.stderr
    assert cloud.actions() == [*ONE_RUN, "delete"]


@pytest.mark.parametrize(
    ("step", "queries"), [((), 20), (("create",), 20), (("wait",), 20), (("status",), 1)]
)
def test_tpu_vm_reports_gcloud_errors_and_gives_up(
    step: tuple[str, ...], queries: int, tmp_path: Path
) -> None:
    cloud = FakeCloud(tmp_path, [])
    reason = "ERROR: (gcloud.compute) You do not currently have an active account selected."
    cloud.write(
        "denied", f"Updates are available.\n{reason}\nPlease run:\n\n  $ gcloud auth login\n"
    )
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    env = {**cloud.env, "TMPDIR": str(temporary)}
    result = launch_scripts.run("tpu_vm.sh", *step, *MACHINES, "--slices=1", *RUN_ARGUMENTS, **env)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert mentions(lines[0], "gcloud", f"{reason} Please run: $ gcloud auth login")
    assert len(lines[1:]) == queries // 20
    assert all(mentions(line, "20") for line in lines[1:])
    assert len((tmp_path / "calls").read_text().splitlines()) == queries
    assert list(temporary.iterdir()) == []


def test_tpu_vm_waits_while_gcloud_does_not_answer(tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, ["running", "rc=0"])
    cloud.write("request", "ACTIVE\n")
    cloud.write("node", "READY\n")
    cloud.write("fails", "describe")
    result = cloud.train()
    assert result.returncode == 0
    lines = result.stderr.splitlines()
    assert any(mentions(line, "gcloud", "fake failure") for line in lines)


def test_steps_query_the_number_of_slices(tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, ["running"])
    cloud.write("slices", "2\n")
    result = launch_scripts.run("tpu_vm.sh", "run", *LOCATION, *RUN_ARGUMENTS, **cloud.env)
    assert result.returncode == 1
    command = "launch/tpu_vm.sh stop --name=mixer --zone=us-west4-a --slices=2"
    assert result.stderr.rstrip().endswith(command)
    stopped = launch_scripts.run("tpu_vm.sh", "stop", *LOCATION, **cloud.env)
    assert stopped.returncode == 0, stopped.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert {call.split()[4] for call in calls if "on_host.sh stop" in call} == {
        "mixer-0",
        "mixer-1",
    }
    # Without an answer, it does not assume one slice.
    cloud.write("denied", "ERROR: PERMISSION_DENIED\n")
    result = launch_scripts.run("tpu_vm.sh", "stop", *LOCATION, **cloud.env)
    assert (result.returncode, cloud.actions()) == (1, ["stop", "stop"])


def test_tpu_vm_fails_if_the_machines_cannot_be_provided(tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, [])
    cloud.write("created", "FAILED\n")
    result = cloud.train()
    assert result.returncode == 1
    assert mentions(result.stderr, "no quota")
    assert cloud.actions() == ["create", "delete"]


def test_tpu_vm_fails_if_the_first_request_fails_and_retries_later_ones(tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, [])
    cloud.write("fails", "resources create")
    result = cloud.train()
    assert (result.returncode, cloud.actions()) == (1, ["create"])
    assert "fake failure" in result.stderr

    folder = tmp_path / "again"
    folder.mkdir()
    cloud = FakeCloud(folder, ["none", "preempt", "none", "rc=0"])
    cloud.write("fails_later", "resources create")
    assert cloud.train().returncode == 0
    assert cloud.actions() == [*ONE_RUN, "delete", "create", "delete", *ONE_RUN, "delete"]


def test_tpu_vm_retries_a_failed_setup(tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, ["none", "none", "rc=0"])
    cloud.write("fails", "setup_host.sh")
    assert cloud.train().returncode == 0
    assert cloud.actions() == ["create", "setup", "setup", "start", "follow", "delete"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_tpu_vm_prints_the_delete_command(
    signum: int, code: int, tmp_path: Path
) -> None:
    cloud = FakeCloud(tmp_path, ["none"])
    cloud.write("endless", "")
    process = launch_scripts.start("tpu_vm.sh", *MACHINES, *RUN_ARGUMENTS, **cloud.env)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("step 1")
    process.send_signal(signum)
    start_time = time.monotonic()
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - start_time < 10
    assert process.returncode == code
    assert "launch/tpu_vm.sh delete --name=mixer --zone=us-west4-a" in err
    assert cloud.has_machines()
