"""Tests of launch/README.md: its files exist, and scripts accept its commands."""

import re
import shlex
from pathlib import Path

from tests.helpers import launch_scripts

TEXT = Path("launch/README.md").read_text()


def script_commands(script: str) -> list[list[str]]:
    """Returns the arguments of every command in a code block that calls a script."""
    blocks = re.findall(r"^```\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    found = [shlex.split(line) for line in lines if line.startswith(f"launch/{script} ")]
    assert found, script
    return [words[1:] for words in found]


def test_readme_lists_every_file_of_launch() -> None:
    table = TEXT.partition("|---|---|")[2].partition("\n\n")[0]
    listed = set(re.findall(r"`([\w/]+\.?\w*)`", table))
    sourced = ("tpu_arguments.sh", "tpu_commands.sh")
    files = {
        str(path.relative_to("launch"))
        for path in Path("launch").rglob("*")
        if path.is_file() and path.name not in ("README.md", *sourced)
    }
    assert listed == files
    for path in re.findall(r"(?:configs|launch)/[\w/]+\.\w+", TEXT):
        assert Path(path).exists(), path


def test_scripts_accept_the_commands_of_the_readme() -> None:
    for arguments in script_commands("tpu_vm.sh"):
        position = arguments.index("--")
        dry_run = [*arguments[:position], "--dry_run", *arguments[position:]]
        result = launch_scripts.run("tpu_vm.sh", *dry_run)
        assert result.returncode == 0, result.stderr
        setting = "TFDS_DATA_DIR=gs://BUCKET/tfds"
        assert (setting in result.stdout) == (setting in arguments)
        assert "--workdir=gs://BUCKET/" in result.stdout
    for arguments in script_commands("setup_host.sh"):
        assert launch_scripts.run("setup_host.sh", *arguments, "--dry_run").returncode == 0
    for arguments in script_commands("local_multiprocess.sh"):
        # `true` stands in for Python: the arguments are accepted if it is started.
        result = launch_scripts.run("local_multiprocess.sh", *arguments, PYTHON="true")
        assert result.returncode == 0


def test_readme_lists_the_exit_code_that_scripts_restart_after() -> None:
    stopped = {
        line.partition("STOPPED=")[2].split()[0]
        for script in ("tpu_vm.sh", "slurm.sbatch")
        for line in Path("launch", script).read_text().splitlines()
        if "STOPPED=" in line
    }
    assert stopped == {"143"}
    assert "| 143 |" in TEXT
