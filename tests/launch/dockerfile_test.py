"""Tests of Dockerfile and .dockerignore: the build context and the image."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pathspec
import pytest

from tests.helpers import launch_scripts

DOCKERFILE = Path("Dockerfile")
# Files of a checkout that must not get into an image, for privacy or size.
EXCLUDED = (
    ".git/config",
    ".venv/bin/python",
    ".dockerignore",
    ".env",
    "key.json",
    "runs/digits/checkpoints/1/x",
    "tests/conftest.py",
    "tests/configs/digits.py",
    "launch/tpu_vm.sh",
    "mixer_jax/__pycache__/main.cpython-311.pyc",
    "mixer_jax/data/__pycache__/folder.cpython-312.pyc",
    "mixer_jax/.env",
    "configs/.netrc",
    "mixer_jax.egg-info/PKG-INFO",
    "requirements-test.txt",
    "docs/performance.md",
)


def instructions(name: str) -> list[str]:
    """Returns the arguments of every instruction of this name, without line breaks."""
    text = re.sub(r"^ *#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    text = text.replace("\\\n", " ")
    return re.findall(rf"^{name} (.*)$", text, flags=re.MULTILINE)


def source_files() -> set[str]:
    """Returns the files of the checkout that the image copies, without hidden and compiled ones."""
    files = set()
    for arguments in instructions("COPY"):
        for source in map(Path, arguments.split()[:-1]):
            for path in [source, *source.rglob("*")]:
                is_extra = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
                if path.is_file() and not is_extra:
                    files.add(str(path))
    return files


def build_context(paths: Iterable[str]) -> set[str]:
    """Returns the paths that .dockerignore leaves in the build context.

    Rules are those of .gitignore, except that Docker matches every pattern from the root.
    """
    lines = Path(".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    anchored = [re.sub(r"^(!?)", r"\1/", rule) for rule in rules]
    return set(pathspec.GitIgnoreSpec.from_lines(anchored).match_files(paths, negate=True))


def test_dockerignore_keeps_only_the_files_that_the_image_copies() -> None:
    sources = source_files()
    assert {"mixer_jax/main.py", "configs/digits.py", "requirements-cuda.txt"} < sources
    assert build_context([*sources, *EXCLUDED]) == sources


@pytest.mark.slow
def test_image_installs_a_program_from_the_copied_files(tmp_path: Path) -> None:
    source, wheels, site = tmp_path / "source", tmp_path / "wheel", tmp_path / "site"
    for path in build_context([*source_files(), *EXCLUDED]):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, source / path)
    build, _, install = (line for line in instructions("RUN") if line.startswith("pip "))
    pip = [sys.executable, "-m", *shlex.split(build.replace("/wheel", str(wheels)))]
    subprocess.run([*pip, "--no-build-isolation", "--quiet"], cwd=source, check=True)
    install = install.replace("/wheel/*.whl", str(*wheels.iterdir()))
    target = ["--quiet", f"--target={site}"]
    subprocess.run([sys.executable, "-m", *shlex.split(install), *target], check=True)

    (entry_point,) = instructions("ENTRYPOINT")
    (program,) = re.findall(r'"([^"]+)"', entry_point)
    command = [sys.executable, str(site / "bin" / program), "train"]
    result = subprocess.run(
        [*command, "--config=configs/mixer_l16_i21k.py", "--config.num_steps=many"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    # It rejects a value of the config, so it has imported the package and read the config file.
    launch_scripts.assert_usage_error(result, "num_steps", "many")


def test_image_has_requirements_for_every_device() -> None:
    (default,) = instructions("ARG")
    devices = {*re.findall(r"EXTRA=(\w+)", DOCKERFILE.read_text())}
    assert {default.removeprefix("EXTRA="), "cuda", "tpu"} == devices
    copied = {name for line in instructions("COPY") for name in line.split()[:-1]}
    assert {f"requirements-{device}.txt" for device in devices} < copied
    manifests = "".join(path.read_text() for path in Path("launch/gke").glob("*.yaml"))
    assert {*re.findall(r"EXTRA=(\w+)", manifests)} == {"cuda"}


@pytest.mark.parametrize("file", ["Dockerfile", "launch/README.md"])
def test_documented_command_leaves_no_files_of_the_group_root(file: str) -> None:
    (command,) = re.findall(r"docker run .*", Path(file).read_text())
    assert '--user="$(id --user):$(id --group)"' in command


def test_image_does_not_run_as_root() -> None:
    lines = DOCKERFILE.read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000"]
    assert lines.index("USER 1000") < next(
        i for i, line in enumerate(lines) if line.startswith("ENTRYPOINT")
    )
