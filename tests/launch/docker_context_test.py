"""Tests of launch/gke/Dockerfile and .dockerignore: what the image has, and what it has not."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.helpers import launch_scripts

DOCKERFILE = Path("launch/gke/Dockerfile")
# What must not leave the machine, or has no business in an image.
KEPT_OUT = (
    ".git/config",
    ".venv/bin/python",
    ".dockerignore",
    ".env",
    "key.json",
    "runs/digits/checkpoints/1/x",
    "tests/conftest.py",
    "tests/helpers/launch_scripts.py",
    "launch/tpu_vm.sh",
    "launch/gke/v6e.yaml",
    "mixer_jax/__pycache__/main.cpython-311.pyc",
    "mixer_jax/data/__pycache__/folder.cpython-312.pyc",
    "mixer_jax/.env",
    "configs/.netrc",
    "mixer_jax.egg-info/PKG-INFO",
    "README.md",
    "docs/guide.md",
)


def _pattern(rule: str) -> re.Pattern[str]:
    """Returns what a line of .dockerignore matches: a path, or a folder above it."""
    parts = re.split(r"(\*\*/|\*)", rule)
    text = "".join(
        {"**/": "(?:.*/)?", "*": "[^/]*"}.get(part) or re.escape(part) for part in parts if part
    )
    return re.compile(f"{text}(?:/.*)?$")


def in_context(paths: Iterable[str]) -> list[str]:
    """Returns the paths that docker build is given: for each the last rule that matches holds."""
    lines = Path(".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    patterns = [(not rule.startswith("!"), _pattern(rule.removeprefix("!"))) for rule in rules]
    kept = []
    for path in paths:
        ignored = False
        for ignores, pattern in patterns:
            if pattern.match(path):
                ignored = ignores
        if not ignored:
            kept.append(path)
    return kept


def files_of_checkout() -> list[str]:
    found = []
    for folder, folders, files in os.walk("."):
        folders[:] = [name for name in folders if name not in (".git", ".venv", "runs")]
        found += [os.path.normpath(os.path.join(folder, name)) for name in files]
    return found


def test_the_context_is_code_and_configs_alone() -> None:
    context = in_context(files_of_checkout())
    assert {path.partition("/")[0] for path in context} == {
        "configs",
        "mixer_jax",
        "requirements.txt",
    }
    odd = [path for path in context if not path.endswith((".py", ".txt"))]
    # Data that belong to the package would be named here; compiled or hidden files would be a leak.
    assert [path for path in odd if not path.startswith("mixer_jax/")] == []
    assert not any("/." in path or "__pycache__" in path for path in context)
    assert in_context(KEPT_OUT) == []


def test_everything_that_is_copied_is_in_the_context_and_runs(tmp_path: Path) -> None:
    context = in_context(files_of_checkout())
    copies = re.findall(r"^COPY (\S+) (\S+)$", DOCKERFILE.read_text(), flags=re.MULTILINE)
    assert len(copies) == 3
    for source, _ in copies:
        files = [path for path in context if path == source or path.startswith(f"{source}/")]
        assert files, source
        for path in files:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / path)
    program, *entry = re.findall(r'"([^"]+)"', DOCKERFILE.read_text().rpartition("ENTRYPOINT")[2])
    assert program == "python"
    command = [sys.executable, *entry, "--config=configs/mixer_l16_i21k.py"]
    command.append("--config.num_steps=many")
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    # It came as far as reading the config, which needs the package and the configs.
    launch_scripts.refuses(result, "num_steps", "many")


def test_the_image_does_not_run_as_root() -> None:
    lines = DOCKERFILE.read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000"]
    assert lines.index("USER 1000") < next(
        i for i, line in enumerate(lines) if line.startswith("ENTRYPOINT")
    )
