"""Tests of launch/setup_host.sh: its commands, repeated runs, invalid arguments."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import launch_scripts
from tests.helpers.messages import mentions


def dry_run(folder: Path, *arguments: str, with_uv: bool) -> list[list[str]]:
    """Returns the commands of a dry run on a host with or without uv."""
    path = "/usr/bin:/bin"
    if with_uv:
        launch_scripts.write_program(folder / "bin" / "uv", "exit 99")
        path = f"{folder}/bin:{path}"
    arguments = (*arguments, f"--venv={folder}/env", "--dry_run")
    result = launch_scripts.run("setup_host.sh", *arguments, PATH=path)
    assert result.returncode == 0, result
    assert not Path(folder, "env").exists()
    return [shlex.split(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    ("accelerator", "extra"),
    [("tpu", ["requirements-tpu.txt"]), ("cuda", ["requirements-cuda.txt"]), ("none", [])],
)
def test_setup_installs_the_packages_of_the_accelerator(
    accelerator: str, extra: list[str], tmp_path: Path
) -> None:
    """The image for it has the same packages; see dockerfile_test.py."""
    python = f"{tmp_path}/env/bin/python"
    venv, install, show = dry_run(tmp_path, f"--accelerator={accelerator}", with_uv=True)
    assert venv == ["uv", "venv", "--quiet", "--python", ">=3.11,<3.14", f"{tmp_path}/env"]
    uv_install = ["uv", "pip", "install", "--quiet", "--python", python]
    files = ["requirements.txt", "requirements-gcs.txt", *extra]
    assert install == [*uv_install, *(f"--requirement={file}" for file in files)]
    assert show[0] == python
    compile(show[2], "show", "exec")
    # On one of many TPU hosts, listing the devices would wait for all hosts.
    assert ("jax.devices()" in show[2]) == (accelerator != "tpu")


def test_setup_detects_the_accelerator(tmp_path: Path) -> None:
    assert dry_run(tmp_path, with_uv=True)[0][0] == "uv"


def test_setup_installs_uv_if_missing(tmp_path: Path) -> None:
    commands = dry_run(tmp_path, "--accelerator=none", with_uv=False)
    # If Python has no venv module, as on Ubuntu, two apt commands come first.
    venv, install, *_ = (line for line in commands if line[0] != "sudo")
    assert venv[-3:] == ["-m", "venv", f"{tmp_path}/env-uv"]
    assert install[0] == f"{tmp_path}/env-uv/bin/python"
    assert install[-1].startswith("uv==")


def test_setup_installs_only_once_per_accelerator(tmp_path: Path) -> None:
    launch_scripts.write_program(
        tmp_path / "env" / "bin" / "python", '[[ "$*" == *"jax.devices()"* ]] && echo devices'
    )
    calls = tmp_path / "calls"
    launch_scripts.write_program(tmp_path / "bin" / "uv", f'echo "$1" >>{calls}')
    arguments = ("--accelerator=none", f"--venv={tmp_path}/env")
    for is_installed in (False, True):
        result = launch_scripts.run(
            "setup_host.sh", *arguments, PATH=f"{tmp_path}/bin:/usr/bin:/bin"
        )
        assert result.returncode == 0
        *messages, last = result.stdout.splitlines()
        assert last == "devices"
        # It prints that the environment is up to date.
        assert [mentions(line, f"{tmp_path}/env") for line in messages] == [True] * is_installed
    assert calls.read_text() == "pip\n"
    # Another accelerator needs different packages.
    arguments = ("--accelerator=cuda", f"--venv={tmp_path}/env")
    launch_scripts.run("setup_host.sh", *arguments, PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    assert calls.read_text() == "pip\npip\n"


@pytest.mark.parametrize("accelerator", ["tpu", "cuda"])
def test_setup_installs_again_if_the_packages_of_the_accelerator_change(
    accelerator: str, tmp_path: Path
) -> None:
    checkout, calls = tmp_path / "checkout", tmp_path / "calls"
    (checkout / "launch").mkdir(parents=True)
    for file in ("launch/setup_host.sh", *map(str, Path().glob("requirements*.txt"))):
        shutil.copy(file, checkout / file)
    launch_scripts.write_program(tmp_path / "env" / "bin" / "python", "exit 0")
    launch_scripts.write_program(tmp_path / "bin" / "uv", f'echo "$1" >>{calls}')
    command = ["bash", "launch/setup_host.sh", f"--accelerator={accelerator}"]
    environment = launch_scripts.script_env(PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    requirements = checkout / f"requirements-{accelerator}.txt"
    for added, expected in (("", "pip\n"), ("", "pip\n"), ("another==1.0\n", "pip\npip\n")):
        requirements.write_text(requirements.read_text() + added)
        subprocess.run(
            [*command, f"--venv={tmp_path}/env"], cwd=checkout, env=environment, check=True
        )
        assert calls.read_text() == expected


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--accelerator=gpu", ("--accelerator", "gpu", "tpu", "cuda", "none")),
        ("--venv=", ("--venv",)),
        ("tpu", ("tpu",)),
    ],
)
def test_invalid_arguments_are_rejected(argument: str, words: tuple[str, ...]) -> None:
    result = launch_scripts.run("setup_host.sh", argument)
    launch_scripts.assert_usage_error(result, *words)
