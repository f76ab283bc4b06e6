"""Tests of the README: every command in it runs, every file it names exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_run import PLAIN, as_arguments

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line for language, block in BLOCKS if not language for line in block.splitlines()]
DOORS = [line for line in LINES if line.startswith("python -m mixer_jax.")]


def test_the_readme_has_commands() -> None:
    assert len(DOORS) >= 10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder for all the README's runs, which build on each other."""
    return tmp_path_factory.mktemp("readme")


def small(command: list[str], place: Path, data_dir: str) -> list[str]:
    """The same command, with its folders moved to `place` and its sizes made small."""
    command = [re.sub(r"=(runs|gs://BUCKET)/", f"={place}/", part) for part in command]
    if "mixer_jax.evaluate" in command:
        return [*command, f"--data_dir={data_dir}"]
    if "mixer_jax.prepare" in command:
        return [*command, f"--data_dir={place}/data"]
    if "mixer_jax.visualize" in command:
        command = [part.replace("--out=", f"--out={place}/") for part in command]
        return [*command, f"--config.dataset.data_dir={data_dir}"]
    if "--mode=input" in command:
        sizes = ["--image_size=32", "--rounds=1", "--images_per_round=128", "--no_peers"]
        return [*command, *sizes]
    if "mixer_jax.benchmark" in command:
        return [*command, "--variant=S/32", "--image_size=64", "--unroll=1", "--rounds=1"]
    # The recipe's parts are tested elsewhere; here the commands are.
    sizes = as_arguments(data_dir, num_steps=4, optimizer__warmup_steps=1, **PLAIN)
    if any("digits" in part for part in command):
        small_sizes = sizes
    else:
        synthetic = ["--config.dataset.name=synthetic", "--config.model.variant=custom"]
        small_sizes = [size for size in sizes if "evals" not in size] + synthetic
    named = [part.partition("=")[2] for part in command if part.startswith("--config=")]
    workdir = f"--workdir={place}/{Path(named[0]).stem}"
    has_workdir = any(part.startswith("--workdir") for part in command)
    return [*command, *([] if has_workdir else [workdir]), *small_sizes]


def test_every_command_runs_after_the_one_above_it(place: Path, digits_dir: str) -> None:
    for line in DOORS:
        command = small(shlex.split(line, comments=True), place, digits_dir)
        interpreter = [sys.executable, "-W", "error"]
        if line == DOORS[0]:
            command.append("--config.tensorboard=true")
        done = subprocess.run(
            [*interpreter, *command[1:]], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert done.stdout, line
        if "mixer_jax.benchmark" in command and "--mode=input" not in command:
            title, heads, row = done.stdout.splitlines()
            assert title.startswith("training step of Mixer-S/32, 64 px")
            assert heads.split()[:2] == ["unroll", "remat"]
            assert (row.split()[:2], row.split()[-1]) == (["1", "none"], "1.00")


def test_make_targets_exist() -> None:
    targets = [line.split()[1] for line in LINES if re.match(r"make [a-z]", line)]
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], capture_output=True, check=True)


def test_the_python_example_runs() -> None:
    (code,) = [block for language, block in BLOCKS if language == "python"]
    code = code.replace('"B/16"', '"S/32"').replace("images)[", "images)[")
    names: dict[str, object] = {}
    exec(code, names)
    assert getattr(names["logits"], "shape", None) == (2, 10)


def test_files_and_links_exist(root: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    configs = re.findall(r"configs/\w+\.py", README)
    tree = next(block for _, block in BLOCKS if block.startswith("mixer_jax/\n"))
    files = [f"mixer_jax/{name}" for name in re.findall(r"^  (\S+)", tree, re.MULTILINE)]
    for name in [*links, *configs, *files]:
        assert (root / name).exists(), name


def test_the_tree_is_complete(root: Path) -> None:
    tree = next(block for _, block in BLOCKS if block.startswith("mixer_jax/\n"))
    named = {
        f"mixer_jax/{name.rstrip('/')}" for name in re.findall(r"^  (\S+)", tree, re.MULTILINE)
    }
    for path in (root / "mixer_jax").rglob("*.py"):
        relative = path.relative_to(root)
        parents = {str(parent) for parent in relative.parents}
        assert path.name == "__init__.py" or str(relative) in named or named & parents, relative
