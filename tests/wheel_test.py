"""Tests of the wheel: its contents, and a run from it alone, without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

import mixer_jax
from tests.helpers.messages import mentions
from tests.helpers.tiny_run import NO_REGULARIZATION, to_flags

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Wheel built from a copy of the checkout, because building writes into it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("mixer_jax", "configs"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = folder.iterdir()
    return wheel


def test_wheel_has_the_package_and_the_configs(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        (metadata,) = [name for name in file.namelist() if name.endswith("/METADATA")]
        lines = file.read(metadata).decode().splitlines()
    package = {path.relative_to(root) for path in (root / "mixer_jax").rglob("*.py")}
    configs = {Path("mixer_jax/configs", path.name) for path in (root / "configs").glob("*.py")}
    assert names == {str(path) for path in {*package, *configs, Path("mixer_jax/py.typed")}}
    assert f"Version: {mixer_jax.__version__}" in lines
    assert "License-Expression: Apache-2.0" in lines


def test_wheel_trains_predicts_and_evaluates_from_another_folder(
    wheel: Path, tmp_path: Path, digits_dir: str
) -> None:
    site, home, folder = (tmp_path / name for name in ("site", "home", "work"))
    home.mkdir()
    folder.mkdir()
    options = ["--quiet", "--no-deps", "--no-compile", f"--target={site}"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", str(site / "bin" / "mixer-jax"), *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(site), "HOME": str(home)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    sizes = to_flags(digits_dir, num_steps=4, optimizer__warmup_steps=1, **NO_REGULARIZATION)
    run("train", "--config=digits:low", *sizes)
    assert (folder / "runs" / "digits_low" / "checkpoints" / "4").is_dir()
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert cv2.imwrite(str(folder / "digit.png"), image)
    checkpoint = "--checkpoint=runs/digits_low"
    assert mentions(run("predict", checkpoint, "digit.png"), "digit.png")
    data = ["--dataset=digits/low", "--split=test", f"--data_dir={digits_dir}"]
    assert mentions(run("evaluate", checkpoint, *data), "top-1")
