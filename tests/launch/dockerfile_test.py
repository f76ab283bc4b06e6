"""Tests of launch/gke/Dockerfile and .dockerignore: the build context and the image."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pathspec

from tests.helpers import launch_scripts

DOCKERFILE = Path("launch/gke/Dockerfile")
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
    "README.md",
    "docs/guide.md",
)


def copy_instructions() -> dict[str, str]:
    """Returns the source of each COPY instruction with its destination."""
    text = DOCKERFILE.read_text()
    return dict(re.findall(r"^COPY (\S+) (\S+)$", text, flags=re.MULTILINE))


def source_files() -> set[str]:
    """Returns the files that COPY instructions name, without hidden and compiled ones."""
    files = set()
    for source in map(Path, copy_instructions()):
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
    assert {"mixer_jax/main.py", "configs/digits.py", "requirements.txt"} < sources
    assert "requirements-gcs.txt" in sources
    assert build_context([*sources, *EXCLUDED]) == sources


def test_image_entry_point_runs_with_the_copied_files(tmp_path: Path) -> None:
    for path in build_context([*source_files(), *EXCLUDED]):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path)
    python, *entry_point = re.findall(
        r'"([^"]+)"', DOCKERFILE.read_text().rpartition("ENTRYPOINT")[2]
    )
    assert python == "python"
    command = [sys.executable, *entry_point, "--config=configs/mixer_l16_i21k.py"]
    command.append("--config.num_steps=many")
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    # It rejects a value of the config, so it has imported the package and read the config file.
    launch_scripts.assert_usage_error(result, "num_steps", "many")


def test_image_does_not_run_as_root() -> None:
    lines = DOCKERFILE.read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000"]
    assert lines.index("USER 1000") < next(
        i for i, line in enumerate(lines) if line.startswith("ENTRYPOINT")
    )
