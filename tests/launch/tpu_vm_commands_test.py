"""Tests of launch/tpu_vm.sh: its commands in a dry run, invalid arguments."""

import re
import shlex

import pytest

from tests.helpers import launch_scripts

LOCATION = ("--name=mixer", "--zone=us-west4-a")
MACHINES = (*LOCATION, "--type=v5litepod-64")
RUN_ARGUMENTS = ("--", "--config=configs/mixer_b16_i1k.py", "--workdir=gs://BUCKET/run")


def dry_run(*arguments: str) -> list[list[str]]:
    """Returns the arguments of every command that a dry run prints."""
    result = launch_scripts.run("tpu_vm.sh", *arguments, "--dry_run", *RUN_ARGUMENTS)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def gcloud_tpus(*words: str) -> list[str]:
    return ["gcloud", "compute", "tpus", *words]


def ssh(command: str, worker: str = "all", node: str = "mixer") -> list[str]:
    options = ("--zone=us-west4-a", "--quiet", f"--worker={worker}")
    return gcloud_tpus("tpu-vm", "ssh", node, *options, f"--command={command}")


START = f"bash mixer_jax/launch/on_host.sh start {' '.join(RUN_ARGUMENTS[1:])}"
DELETE = gcloud_tpus(
    "queued-resources", "delete", "mixer", "--zone=us-west4-a", "--force", "--quiet"
)


def test_dry_run_prints_every_command_in_order() -> None:
    state = gcloud_tpus("queued-resources", "describe", "mixer", "--zone=us-west4-a")
    state.append("--format=value(state.state)")
    create = gcloud_tpus("queued-resources", "create", "mixer", "--zone=us-west4-a", "--quiet")
    create += ["--node-id=mixer", "--accelerator-type=v5litepod-64"]
    create += ["--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
    lines = dry_run(*MACHINES, "--spot", "--env", "NOTE=it's here")
    assert lines[:3] == [state, create, state]
    result, tar, scp, setup, rm, start, follow = lines[3:10]
    assert "--worker=0" in result
    assert result[-1].endswith("bash mixer_jax/launch/on_host.sh result; else echo none; fi")
    archive = tar[2]
    assert tar[:2] == ["tar", "-czf"]
    assert tar[-6:-3] == ["mixer_jax", "configs", "launch"]
    # Those that setup_host.sh installs.
    setup_host = launch_scripts.run("setup_host.sh", "--accelerator=tpu", "--dry_run")
    assert tar[-3:] == re.findall(r"--requirement=(\S+)", setup_host.stdout)
    all_workers = ("--zone=us-west4-a", "--quiet", "--worker=all")
    assert scp == gcloud_tpus("tpu-vm", "scp", archive, "mixer:mixer_jax.tgz", *all_workers)
    assert "tar -xzf mixer_jax.tgz -C mixer_jax" in setup[-1]
    assert setup[-1].endswith("bash mixer_jax/launch/setup_host.sh --accelerator=tpu")
    assert rm == ["rm", "-f", archive]
    # The command is quoted once more for the shell of the host.
    assert start[:-1] == ssh("")[:-1]
    remote = shlex.split(start[-1].removeprefix("--command="))
    assert remote == ["env", "NOTE=it's here", *START.split()]
    assert follow == ssh("bash mixer_jax/launch/on_host.sh follow +1", worker="0")
    assert lines[10:] == [result, DELETE]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("create", [None, "create mixer"]),
        ("wait", ["describe mixer"]),
        ("setup", ["nodeCount", "tar", "scp", "setup_host.sh", "rm -f"]),
        ("run", ["nodeCount", "result", "start --config"]),
        ("logs", ["nodeCount", "follow +1"]),
        ("status", ["nodeCount", "(state.state)", "tpu-vm describe mixer", "result"]),
        ("stop", ["nodeCount", "on_host.sh stop"]),
        ("delete", ["queued-resources delete mixer"]),
    ],
)
def test_step_prints_only_its_commands(step: str, expected: list[str | None]) -> None:
    result = launch_scripts.run("tpu_vm.sh", step, *MACHINES, "--dry_run", *RUN_ARGUMENTS)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if re.match("gcloud|tar|rm", line)]
    assert len(lines) == len(expected)
    for line, word in zip(lines, expected, strict=True):
        assert word is None or word in line


@pytest.mark.parametrize(
    ("tpu_type", "version"),
    [
        ("v3-32", "tpu-ubuntu2204-base"),
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_software_version_follows_the_type(tpu_type: str, version: str) -> None:
    create = dry_run("create", *LOCATION, f"--type={tpu_type}")[1]
    assert f"--accelerator-type={tpu_type}" in create
    assert f"--runtime-version={version}" in create
    assert "--spot" not in create
    custom = dry_run(
        "create", *LOCATION, f"--type={tpu_type}", "--version=mine", "--create_flag=--reserved"
    )
    assert custom[1][-2:] == ["--runtime-version=mine", "--reserved"]


def test_slices_become_nodes_of_one_request() -> None:
    lines = dry_run(*MACHINES, "--slices=2", "--project=mine")
    assert all("--project=mine" in line for line in lines if line[0] == "gcloud")
    assert {"--node-count=2", "--node-prefix=mixer"} < set(lines[1])
    starts = [line for line in lines if "on_host.sh start" in line[-1]]
    assert [line[5] for line in starts] == ["mixer-0", "mixer-1"]
    (follow,) = (line for line in lines if "follow" in line[-1])
    assert "mixer-0" in follow


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*LOCATION, "--type=tpu7x-64"), ("tpu7x", "launch/gke/tpu7x.yaml")),
        ((*LOCATION, "--type=v5e-64"), ("v5litepod-64",)),
        ((*LOCATION, "--type=h100"), ("--type", "h100")),
        ((*LOCATION, "--type=v4-"), ("--type", "v4-")),
        (LOCATION, ("--type",)),
        ((*LOCATION, "--type=v3-32", "--slices=2"), ("--slices", "2", "v4")),
        ((*MACHINES, "--slices=0"), ("--slices", "0")),
        (("--name=Mixer", "--zone=us-west4-a"), ("--name", "Mixer")),
        (("--name=mixer", "--zone=us-west4"), ("--zone", "us-west4", "us-west4-a")),
        (("--name=mixer",), ("--zone",)),
        ((*MACHINES, "--spott"), ("--spott",)),
        (("start", *MACHINES), ("start", "create")),
        ((*MACHINES, "--env", "1=2"), ("--env", "1=2")),
        ((*MACHINES, "--config=configs/digits.py"), ("--config",)),
        ((*MACHINES, "--max_restarts=-1"), ("--max_restarts", "-1")),
    ],
)
def test_invalid_arguments_are_rejected(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    result = launch_scripts.run("tpu_vm.sh", *arguments, *RUN_ARGUMENTS)
    launch_scripts.assert_usage_error(result, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("--config",)),
        (RUN_ARGUMENTS[1:2], ("--workdir", "gs://")),
        ((RUN_ARGUMENTS[1], "--workdir=/tmp/run"), ("--workdir", "/tmp/run", "gs://")),
        ((RUN_ARGUMENTS[1], "--workdir", "runs/x"), ("--workdir", "runs/x")),
    ],
)
def test_run_without_a_gcs_workdir_is_rejected(
    arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    result = launch_scripts.run("tpu_vm.sh", *MACHINES, "--", *arguments)
    launch_scripts.assert_usage_error(result, *words)
