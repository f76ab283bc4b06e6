"""Tests of launch/setup_host.sh: what it would do, where, and what it refuses."""

import shlex
from pathlib import Path

import pytest

from tests.helpers import launch_scripts
from tests.helpers.messages import mentions


def dry(folder: Path, *arguments: str, with_uv: bool) -> list[list[str]]:
    """Returns the commands of a dry run on a host that has uv or not."""
    path = "/usr/bin:/bin"
    if with_uv:
        launch_scripts.program(folder / "bin" / "uv", "exit 99")
        path = f"{folder}/bin:{path}"
    arguments = (*arguments, f"--venv={folder}/env", "--dry_run")
    result = launch_scripts.run("setup_host.sh", *arguments, PATH=path)
    assert result.returncode == 0, result
    assert not Path(folder, "env").exists()
    return [shlex.split(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    ("accelerator", "extra"),
    [("tpu", ["jax[tpu]"]), ("cuda12", ["jax[cuda12]"]), ("none", [])],
)
def test_the_packages_fit_the_accelerator(
    accelerator: str, extra: list[str], tmp_path: Path
) -> None:
    python = f"{tmp_path}/env/bin/python"
    venv, install, show = dry(tmp_path, f"--accelerator={accelerator}", with_uv=True)
    assert venv == ["uv", "venv", "--quiet", "--python", ">=3.11,<3.14", f"{tmp_path}/env"]
    into = ["uv", "pip", "install", "--quiet", "--python", python]
    assert install == [*into, "--requirement", "requirements.txt", *extra]
    assert show[0] == python
    compile(show[2], "shown", "exec")
    # On one of many TPU hosts asking for the devices would wait for all of them.
    assert ("jax.devices()" in show[2]) == (accelerator != "tpu")


def test_uv_comes_with_it_where_it_is_missing(tmp_path: Path) -> None:
    commands = dry(tmp_path, "--accelerator=none", with_uv=False)
    # Where Python has no venv, as on Ubuntu, two commands of apt come before.
    make, install, *_ = (line for line in commands if line[0] != "sudo")
    assert make[-3:] == ["-m", "venv", f"{tmp_path}/env-uv"]
    assert install[0] == f"{tmp_path}/env-uv/bin/python"
    assert install[-1].startswith("uv==")


def test_the_second_time_nothing_is_installed(tmp_path: Path) -> None:
    said = "jax.devices()"
    launch_scripts.program(
        tmp_path / "env" / "bin" / "python", f'[[ "$*" == *"{said}"* ]] && echo seen'
    )
    requirements = launch_scripts.run("setup_host.sh", f"--venv={tmp_path}/none", "--dry_run")
    assert requirements.returncode == 0
    calls = tmp_path / "calls"
    launch_scripts.program(tmp_path / "bin" / "uv", f'echo "$1" >>{calls}')
    arguments = ("--accelerator=none", f"--venv={tmp_path}/env")
    for is_there in (False, True):
        result = launch_scripts.run(
            "setup_host.sh", *arguments, PATH=f"{tmp_path}/bin:/usr/bin:/bin"
        )
        assert result.returncode == 0
        *notes, last = result.stdout.splitlines()
        assert last == "seen"
        # That everything is there already.
        assert [mentions(note, f"{tmp_path}/env") for note in notes] == [True] * is_there
    assert calls.read_text() == "pip\n"
    # Another accelerator needs other packages.
    arguments = ("--accelerator=cuda12", f"--venv={tmp_path}/env")
    launch_scripts.run("setup_host.sh", *arguments, PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    assert calls.read_text() == "pip\npip\n"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--accelerator=gpu", ("--accelerator", "gpu", "tpu", "cuda12", "none")),
        ("--venv=", ("--venv",)),
        ("tpu", ("tpu",)),
    ],
)
def test_wrong_arguments_of_setup(argument: str, words: tuple[str, ...]) -> None:
    launch_scripts.refuses(launch_scripts.run("setup_host.sh", argument), *words)
