"""Tests of launch/tpu_vm.sh: what it does when machines come and go.

The cloud is played by fake_gcloud.sh; everything on this side of it is real.
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

WHERE = ("--name=mixer", "--zone=us-west4-a")
MACHINES = (*WHERE, "--type=v5litepod-64")
RUN = ("--", "--config=configs/mixer_b16_i1k.py", "--workdir=gs://BUCKET/run")


class Cloud:
    """What fake_gcloud.sh plays, with a run that goes as it is told."""

    def __init__(self, folder: Path, run: list[str]):
        self.folder = folder
        folder.joinpath("bin").mkdir()
        shutil.copy(launch_scripts.FOLDER / "fake_gcloud.sh", folder / "bin" / "gcloud")
        (folder / "bin" / "gcloud").chmod(0o755)
        self.write("run", "\n".join(run) + "\n")

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.folder}/bin:{launch_scripts.environment()['PATH']}"
        return {"PATH": path, "CLOUD": str(self.folder), "MIXER_POLL_SECONDS": "0"}

    def train(self, *more: str) -> subprocess.CompletedProcess[str]:
        result = launch_scripts.run("tpu_vm.sh", *MACHINES, *more, *RUN, **self.environment)
        # Every answer that was prepared was asked for.
        assert (self.folder / "run").read_text() == "", result
        return result

    def did(self) -> list[str]:
        """Returns what changed something, in words."""
        words = {
            "resources create": "create",
            "resources delete": "delete",
            "setup_host.sh": "setup",
            "on_host.sh start": "start",
            "on_host.sh follow": "follow",
            "on_host.sh stop": "stop",
            "tail -n 20": "tails",
        }
        calls = (self.folder / "calls").read_text().splitlines()
        return [short for call in calls for long, short in words.items() if long in call]

    def is_there(self) -> bool:
        return (self.folder / "request").exists()


ONCE = ["create", "setup", "start", "follow"]


def test_a_run_is_followed_to_its_end_and_the_machines_deleted(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["none", "rc=0"])
    result = cloud.train()
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["step 1/2  loss 2.3"]
    assert cloud.did() == [*ONCE, "delete"]
    assert not cloud.is_there()


def test_after_preemptions_it_goes_on_with_new_machines(tmp_path: Path) -> None:
    # The first takes the host that is asked; the second another one, at whose loss the run ends
    # with 1 before the cloud says why; the third stops the run by SIGTERM.
    story = ["none", "preempt", "none", "later rc=1", "none", "preempt rc=143", "none", "rc=0"]
    cloud = Cloud(tmp_path, story)
    result = cloud.train("--spot")
    assert result.returncode == 0, result.stderr
    assert cloud.did() == [*ONCE, "delete"] * 4
    # Each loss is told, in the same words.
    assert 3 in collections.Counter(result.stderr.splitlines()).values()


def test_it_gives_up_after_so_many_preemptions(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["none", "preempt"] * 2)
    result = cloud.train("--max_restarts=1")
    assert result.returncode == 1
    assert cloud.did() == [*ONCE, "delete", *ONCE, "tails", "delete"]
    assert not cloud.is_there()


@pytest.mark.parametrize("code", [1, 2])
def test_what_is_wrong_with_the_run_itself_is_not_tried_again(code: int, tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["none", f"rc={code}"])
    result = cloud.train()
    assert result.returncode == code
    assert cloud.did() == [*ONCE, "tails", "delete"]
    assert mentions(result.stderr, f"code {code}")


def test_a_crash_is_tried_again_on_the_same_machines_a_few_times(tmp_path: Path) -> None:
    cloud = Cloud(
        tmp_path, ["none", "rc=139", "rc=139", "none", "none", "rc=134", "rc=134", "rc=134"]
    )
    result = cloud.train()
    assert result.returncode == 134, result.stderr
    assert cloud.did() == ["create", *["setup", "start", "follow"] * 4, "tails", "delete"]


def test_crashes_do_not_add_up_over_runs_that_last(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["none", "rc=139", *["none", "rc=139"] * 3, "none", "rc=0"])
    cloud.write("clock", "1000\n")
    launch_scripts.program(tmp_path / "bin" / "date", 'cat "$CLOUD/clock"')
    result = cloud.train()
    assert result.returncode == 0, result.stderr
    assert cloud.did() == ["create", *["setup", "start", "follow"] * 5, "delete"]


def test_a_run_that_was_stopped_by_its_host_goes_on_however_often(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["none", "rc=143", *["rc=143", "rc=143"] * 3, "rc=143", "rc=0"])
    result = cloud.train()
    assert result.returncode == 0, result.stderr
    assert cloud.did() == ["create", *["setup", "start", "follow"] * 5, "delete"]
    assert sum(mentions(line, "SIGTERM") for line in result.stderr.splitlines()) == 4


def test_a_lost_connection_is_taken_up_again(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["none", "running", "", "running", "rc=0"])
    result = cloud.train("--keep")
    assert result.returncode == 0
    assert cloud.did() == [*ONCE, "follow", "follow", "follow"]
    assert "launch/tpu_vm.sh delete --name=mixer --zone=us-west4-a" in result.stderr
    assert cloud.is_there()


def test_the_same_command_follows_what_is_going_on(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["running", "rc=0"])
    cloud.write("request", "ACTIVE\n")
    cloud.write("node", "READY\n")
    assert cloud.train().returncode == 0
    assert cloud.did() == ["follow", "delete"]


@pytest.mark.parametrize("code", [143, 1])
def test_a_stop_by_hand_is_no_preemption_and_leaves_the_machines(code: int, tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["none", f"rc={code} by hand"])
    result = cloud.train()
    assert result.returncode == code, result.stderr
    assert cloud.did() == [*ONCE, "tails"]
    assert cloud.is_there()


def test_a_run_that_finished_before_it_was_stopped_has_finished(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["none", "rc=0 by hand"])
    result = cloud.train()
    assert result.returncode == 0, result.stderr
    assert cloud.did() == [*ONCE, "delete"]


@pytest.mark.parametrize(
    ("step", "questions"), [((), 20), (("create",), 20), (("wait",), 20), (("status",), 1)]
)
def test_a_gcloud_that_never_answers_is_told_of_and_given_up(
    step: tuple[str, ...], questions: int, tmp_path: Path
) -> None:
    cloud = Cloud(tmp_path, [])
    why = "ERROR: (gcloud.compute) You do not currently have an active account selected."
    cloud.write("denied", f"Chatter.\n{why}\nPlease run:\n\n  $ gcloud auth login\n")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    more = {**cloud.environment, "TMPDIR": str(temporary)}
    result = launch_scripts.run("tpu_vm.sh", *step, *MACHINES, "--slices=1", *RUN, **more)
    assert result.returncode == 1
    said = result.stderr.splitlines()
    assert mentions(said[0], "gcloud", f"{why} Please run: $ gcloud auth login")
    assert len(said[1:]) == questions // 20
    assert all(mentions(line, "20") for line in said[1:])
    assert len((tmp_path / "calls").read_text().splitlines()) == questions
    assert list(temporary.iterdir()) == []


def test_what_does_not_answer_for_a_while_is_waited_for(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["running", "rc=0"])
    cloud.write("request", "ACTIVE\n")
    cloud.write("node", "READY\n")
    cloud.write("fails", "describe")
    result = cloud.train()
    assert result.returncode == 0
    said = result.stderr.splitlines()
    assert any(mentions(line, "gcloud", "it does not work") for line in said)


def test_steps_alone_ask_for_the_number_of_slices(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["running"])
    cloud.write("slices", "2\n")
    result = launch_scripts.run("tpu_vm.sh", "run", *WHERE, *RUN, **cloud.environment)
    assert result.returncode == 1
    command = "launch/tpu_vm.sh stop --name=mixer --zone=us-west4-a --slices=2"
    assert result.stderr.rstrip().endswith(command)
    stopped = launch_scripts.run("tpu_vm.sh", "stop", *WHERE, **cloud.environment)
    assert stopped.returncode == 0, stopped.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert {call.split()[4] for call in calls if "on_host.sh stop" in call} == {
        "mixer-0",
        "mixer-1",
    }
    # An answer that does not come is no single slice.
    cloud.write("denied", "ERROR: PERMISSION_DENIED\n")
    result = launch_scripts.run("tpu_vm.sh", "stop", *WHERE, **cloud.environment)
    assert (result.returncode, cloud.did()) == (1, ["stop", "stop"])


def test_machines_that_never_come_are_no_preemption(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, [])
    cloud.write("run", "")
    cloud.write("created", "FAILED\n")
    result = cloud.train()
    assert result.returncode == 1
    assert mentions(result.stderr, "no quota")
    assert cloud.did() == ["create", "delete"]


def test_machines_that_cannot_be_asked_for_end_it_only_at_first(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, [])
    cloud.write("run", "")
    cloud.write("fails", "resources create")
    result = cloud.train()
    assert (result.returncode, cloud.did()) == (1, ["create"])
    assert "it does not work" in result.stderr

    folder = tmp_path / "again"
    folder.mkdir()
    cloud = Cloud(folder, ["none", "preempt", "none", "rc=0"])
    cloud.write("fails_later", "resources create")
    assert cloud.train().returncode == 0
    assert cloud.did() == [*ONCE, "delete", "create", "delete", *ONCE, "delete"]


def test_a_setup_that_fails_is_tried_again(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["none", "none", "rc=0"])
    cloud.write("fails", "setup_host.sh")
    assert cloud.train().returncode == 0
    assert cloud.did() == ["create", "setup", "setup", "start", "follow", "delete"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_says_how_to_delete(number: int, code: int, tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["none"])
    cloud.write("endless", "")
    process = launch_scripts.start("tpu_vm.sh", *MACHINES, *RUN, **cloud.environment)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("step 1")
    process.send_signal(number)
    begun = time.monotonic()
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - begun < 10
    assert process.returncode == code
    assert "launch/tpu_vm.sh delete --name=mixer --zone=us-west4-a" in err
    assert cloud.is_there()
