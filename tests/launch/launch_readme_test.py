"""Tests of launch/README.md: what it names is there; its commands, and README's, are understood."""

import re
import shlex
from pathlib import Path

from tests.helpers import launch_scripts

TEXT = Path("launch/README.md").read_text()


def commands(script: str) -> list[list[str]]:
    """Returns the words after `launch/SCRIPT` in every command block that calls it."""
    text = TEXT + Path("README.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    found = [shlex.split(line) for line in lines if line.startswith(f"launch/{script} ")]
    assert found, script
    return [words[1:] for words in found]


def test_every_file_that_is_named_is_there() -> None:
    table = TEXT.partition("|---|---|")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([\w/]+\.?\w*)`", table))
    there = {
        str(path.relative_to("launch"))
        for path in Path("launch").rglob("*")
        if path.is_file() and path.name not in ("README.md", "tpu_arguments.sh", "tpu_commands.sh")
    }
    assert named == there
    for path in re.findall(r"(?:configs|launch)/[\w/]+\.\w+", TEXT):
        assert Path(path).exists(), path


def test_its_commands_are_understood() -> None:
    for arguments in commands("tpu_vm.sh"):
        position = arguments.index("--")
        dry = [*arguments[:position], "--dry_run", *arguments[position:]]
        result = launch_scripts.run("tpu_vm.sh", *dry)
        assert result.returncode == 0, result.stderr
        given = "TFDS_DATA_DIR=gs://BUCKET/tfds"
        assert (given in result.stdout) == (given in arguments)
        assert "--workdir=gs://BUCKET/" in result.stdout
    for arguments in commands("setup_host.sh"):
        assert launch_scripts.run("setup_host.sh", *arguments, "--dry_run").returncode == 0
    for arguments in commands("local_multiprocess.sh"):
        # Stands for the run: it has been understood if it comes to be started.
        python = "true"
        assert (
            launch_scripts.run("local_multiprocess.sh", *arguments, PYTHON=python).returncode == 0
        )


def test_its_codes_are_those_that_the_scripts_act_on() -> None:
    stopped = {
        line.partition("STOPPED=")[2].split()[0]
        for script in ("tpu_vm.sh", "slurm.sbatch")
        for line in Path("launch", script).read_text().splitlines()
        if "STOPPED=" in line
    }
    assert stopped == {"143"}
    assert "| 143 |" in TEXT
