"""Tests of the source distribution and the wheel: contents, and a run from the wheel alone."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pathspec
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mixer_jax
from mixer_jax.training.metrics import read_metrics
from tests.helpers.messages import mentions
from tests.helpers.no_tensorflow import write_sitecustomize
from tests.helpers.tiny_run import NO_REGULARIZATION, to_flags

pytestmark = pytest.mark.slow


def checkout_files(root: Path) -> Iterator[Path]:
    """Yields the files of the checkout that .gitignore does not exclude."""
    ignored = pathspec.GitIgnoreSpec.from_lines((root / ".gitignore").read_text().splitlines())
    for parent, folders, names in os.walk(root):
        relative = Path(parent).relative_to(root)
        folders[:] = [
            name for name in folders if name != ".git" and not ignored.match_file(f"{name}/")
        ]
        paths = [relative / name for name in names if name != ".git"]
        yield from (path for path in paths if not ignored.match_file(path))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Source distribution, built from a copy of the checkout, because building writes into it."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for path in checkout_files(root):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, source / path)
    code = f"import setuptools.build_meta; setuptools.build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (sdist,) = folder.iterdir()
    return sdist


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel built from the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(sdist)], check=True)
    (wheel,) = folder.iterdir()
    return wheel


def test_source_distribution_has_the_whole_checkout(sdist: Path, root: Path) -> None:
    with tarfile.open(sdist) as archive:
        files = {
            Path(*Path(member.name).parts[1:]) for member in archive.getmembers() if member.isfile()
        }
    generated = {path for path in files if path.parts[0] == "mixer_jax.egg-info"}
    generated |= {Path("PKG-INFO"), Path("setup.cfg")}
    assert files - generated == set(checkout_files(root)) - generated
    examples = ("Makefile", "tests/wheel_test.py", "docs/index.md", ".github/workflows/test.yml")
    assert set(map(Path, examples)) < files


def test_wheel_has_the_package_and_the_configs(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        (metadata,) = [name for name in file.namelist() if name.endswith("/METADATA")]
        lines = file.read(metadata).decode().splitlines()
        (notice,) = [name for name in file.namelist() if name.endswith("/licenses/NOTICE")]
        assert file.read(notice) == (root / "NOTICE").read_bytes()
    package = {path.relative_to(root) for path in (root / "mixer_jax").rglob("*.py")}
    configs = {Path("mixer_jax/configs", path.name) for path in (root / "configs").glob("*.py")}
    data = {path.relative_to(root) for path in (root / "mixer_jax").rglob("*.html")}
    assert Path("mixer_jax/visualization/templates/base.html") in data
    data |= {Path("mixer_jax/py.typed"), Path("mixer_jax/data/wordnet.tsv.gz")}
    assert names == {str(path) for path in {*package, *configs, *data}}
    assert f"Version: {mixer_jax.__version__}" in lines
    assert "License-Expression: Apache-2.0 AND LicenseRef-WordNet-3.0" in lines
    assert {"License-File: LICENSE", "License-File: NOTICE"} <= {*lines}
    # Where the package is published, links to files of the checkout would lead nowhere.
    assert "## Documentation" in lines
    assert re.findall(r"\]\((?!https?:).*?\)|<!--", "\n".join(lines)) == []


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the installed wheel and without TensorFlow, to be added to Python's path."""
    site = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-compile", f"--target={site}"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    write_sitecustomize(site)
    return site


def test_installed_program_needs_neither_checkout_nor_tensorflow(
    site: Path, tmp_path: Path
) -> None:
    home, folder = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "HOME": str(home)}

    def run(*arguments: str, program: str = str(site / "bin" / "mixer-jax")) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", program, *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "TensorFlow" not in done.stderr
        return done.stdout

    code = "import importlib.util, mixer_jax; print(importlib.util.find_spec('tensorflow'))"
    assert run(f"{code}; print(mixer_jax.__file__)", program="-c").split() == [
        "None",
        str(site / "mixer_jax" / "__init__.py"),
    ]
    settings: dict[str, Any] = NO_REGULARIZATION | {"tensorboard": True}
    sizes = to_flags("", num_steps=4, optimizer__warmup_steps=1, **settings)
    sizes.remove("--config.dataset.data_dir=")
    run("train", "--config=digits:low", *sizes)
    workdir = folder / "runs" / "digits_low"
    assert (workdir / "checkpoints" / "4").is_dir()
    accumulator = EventAccumulator(str(workdir / "events")).Reload()
    losses = {line["step"]: line["loss"] for line in read_metrics(str(workdir)) if "loss" in line}
    events = {event.step: event.value for event in accumulator.Scalars("loss")}
    assert events == pytest.approx(losses)
    assert len(events) == 4

    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert cv2.imwrite(str(folder / "digit.png"), image)
    checkpoint = "--checkpoint=runs/digits_low"
    assert mentions(run("predict", checkpoint, "digit.png"), "digit.png")
    digits = ["--dataset=digits/low", "--split=test"]
    assert mentions(run("evaluate", checkpoint, *digits, "--report=report"), "top-1")
    assert (folder / "report" / "index.html").exists()
    code = "from mixer_jax.data.wordnet import label_class; print(label_class('n02012849'))"
    assert run(code, program="-c") == "crane (n02012849)\n"
    for target in ("google", "timm", "stablehlo"):
        suffix = {"google": "npz", "timm": "safetensors"}.get(target, target)
        run("convert", "runs/digits_low", f"digits.{suffix}", f"--to={target}")
        assert (folder / f"digits.{suffix}").exists()
    run("plan", "--config=mixer_s16_jft", "--topology=h100:16")
    run("visualize", "data", "--config=digits", "--out=batch.png", "--num_images=4")
    small = ["--image_size=64", "--batch_size=1", "--rounds=1"]
    run("benchmark", "--mode=infer", "--model=S/32", "--baselines=none", *small)
    suite = ["--suite=digits", "--tasks=knn_5_to_9", "--no_throughput"]
    run("transfer", checkpoint, *suite)
