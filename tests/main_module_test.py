"""Tests of `python -m mixer_jax`, which is also the program `mixer-jax`."""

import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import mixer_jax
from mixer_jax.__main__ import COMMANDS
from tests.helpers.messages import mentions


def run_program(*arguments: str, name: str = "mixer-jax") -> subprocess.CompletedProcess[str]:
    """Runs the package as its console script does, from a file of this name."""
    return subprocess.run(
        [sys.executable, "-W", "error", name, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def program(tmp_path: Path) -> str:
    """Console script as pip writes it."""
    path = tmp_path / "mixer-jax"
    checkout = str(Path(mixer_jax.__file__).parents[1])
    path.write_text(
        f"import sys\nsys.path.insert(0, {checkout!r})\n"
        "from mixer_jax.__main__ import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
    )
    return str(path)


def test_commands_are_all_commands_of_the_package() -> None:
    files = {path for path in Path("mixer_jax").glob("*.py") if path.stem != "__main__"}
    modules = {path.stem for path in files if "def main(" in path.read_text()}
    assert {module for _, module, _ in COMMANDS} == modules
    assert {name for name, module, _ in COMMANDS if name != module} == {"train"}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_program_lists_its_commands(program: str, arguments: list[str]) -> None:
    done = run_program(*arguments, name=program)
    assert (done.returncode, done.stderr) == (0, "")
    for name, _, description in COMMANDS:
        assert mentions(done.stdout, name, description)
    module = run_program("mixer_jax", *arguments, name="-m")
    assert module.stdout == done.stdout


def test_program_prints_versions_and_devices(program: str) -> None:
    done = run_program("--version", name=program)
    assert (done.returncode, done.stderr) == (0, "")
    first, *lines = done.stdout.splitlines()
    assert first == f"mixer-jax {mixer_jax.__version__}"
    versions = dict(line.split(" ", 1) for line in lines)
    assert versions["python"] == platform.python_version()
    assert {versions[name] == metadata.version(name) for name in ("jax", "flax")} == {True}
    assert "torch" not in versions or versions["torch"] == metadata.version("torch")
    assert re.fullmatch(r"\d+ \S.*", versions["devices"])


@pytest.mark.parametrize(
    ("variables", "part"),
    [({"SLURM_NTASKS": "2"}, "hosts"), ({"JAX_PLATFORMS": "cuda"}, "cuda")],
)
def test_versions_do_not_wait_for_other_hosts_or_absent_devices(
    program: str, variables: dict[str, str], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = run_program("--version", name=program)
    assert done.returncode == 0
    assert mentions(done.stdout.splitlines()[-1], "devices", part)


@pytest.mark.parametrize(("name", "module", "_"), COMMANDS)
def test_program_runs_the_module_of_a_command(program: str, name: str, module: str, _: str) -> None:
    # The benchmark lists the arguments of one mode.
    arguments = ["--help"] if name != "benchmark" else ["--mode=train", "--help"]
    expected = run_program(f"mixer_jax.{module}", *arguments, name="-m").stdout
    assert mentions(expected, f"python -m mixer_jax.{module}")
    through_package = run_program("mixer_jax", name, *arguments, name="-m").stdout
    assert through_package == expected
    usage = run_program(name, *arguments, name=program).stdout.splitlines()[0]
    assert usage.startswith(f"usage: mixer-jax {name} ")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ["trian", "train"]),
        (["main"], ["main", "train"]),
        (["train", "--config=digits", "--config.sed=1"], ["sed", "seed"]),
        (["evaluate"], ["--checkpoint"]),
    ],
)
def test_program_reports_usage_errors_in_one_line(
    program: str, arguments: list[str], parts: list[str]
) -> None:
    done = run_program(*arguments, name=program)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert mentions(line, *parts)
