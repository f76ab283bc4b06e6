"""Tests of few-shot probes on two hosts that do not read the same files, as real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax.data.registry import open_dataset
from mixer_jax.evaluation.probes import LazyLabels, ProbeConfig, sample_all_shots
from tests.helpers.images import encode
from tests.helpers.messages import mentions
from tests.helpers.processes import host_env

pytestmark = pytest.mark.slow

CONFIG = ProbeConfig("few_shot", shots=(1, 3), seeds=(0, 1))
NUM_CLASSES = 4
# Prints the metrics of a probe of the pixels as JSON, or the error of a user.
CODE = """
import json, sys
from mixer_jax.data.registry import open_dataset
from mixer_jax.distributed import multihost
from mixer_jax.distributed.sharding import make_mesh
from mixer_jax.errors import UserError
from mixer_jax.evaluation.probes import ProbeConfig, run_probe
from tests.evaluation.conftest import make_input_config, pixels_as_features
import jax
folder, skip_bad, batch_size = sys.argv[1], sys.argv[2] == "skip", int(sys.argv[3])
multihost.initialize_distributed("auto", 60)
mesh = make_mesh(0, 1)
fn = jax.jit(pixels_as_features, out_shardings=jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec()))
train, test = (open_dataset(f"folder:{folder}", split) for split in ("train", "test"))
config = ProbeConfig("few_shot", shots=(1, 3), seeds=(0, 1))
try:
    with multihost.propagate_failure():
        found = run_probe(fn, None, config, train, test, mesh,
                          make_input_config(batch_size, skip_bad))
except UserError as error:
    print("RESULT" + json.dumps(str(error)))
    sys.exit(2)
print("RESULT" + json.dumps(found._asdict()))
"""


def start(folder: Path, env: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", CODE, str(folder), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
    )


def finish(process: subprocess.Popen[str], code: int) -> Any:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == code, (out, errors)
    (line,) = [line for line in out.splitlines() if line.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


def run_on_one_host(folder: Path, batch_size: int) -> Any:
    return finish(start(folder, {"JAX_NUM_CPU_DEVICES": "2"}, "skip", str(batch_size)), 0)


def run_on_two_hosts(folders: tuple[Path, Path], *arguments: str, code: int = 0) -> list[Any]:
    """Runs the probe on two hosts, each with its own copy of the files."""
    envs = host_env(2, num_devices=1)
    both = [start(folder, env, *arguments) for folder, env in zip(folders, envs, strict=True)]
    return [finish(process, code) for process in both]


def write_images(folder: Path) -> None:
    """Writes noisy images, whose brightness hints at their class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 20)):
        for label in range(NUM_CLASSES):
            for index in range(count):
                path = folder / split / f"class {label}" / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.normal(60 + 45 * label, 50, (16, 16, 3)).clip(0, 255)
                path.write_bytes(encode(pixels.astype(np.uint8), "PNG"))


@pytest.fixture
def copies(tmp_path: Path) -> tuple[Path, Path]:
    """The same files on two hosts."""
    for host in ("0", "1"):
        write_images(tmp_path / host)
    return tmp_path / "0", tmp_path / "1"


def sampled_images(folder: Path) -> list[str]:
    """Lists the images that the probe samples, in the order in which they are read."""
    source = open_dataset(f"folder:{folder}", "train")
    samples = sample_all_shots(CONFIG, source, LazyLabels(source, skip_bad=True))
    return [source.examples[index]["name"] for index in np.unique(samples)]


def make_unreadable(path: Path) -> None:
    path.unlink()
    path.symlink_to("missing")


@pytest.mark.parametrize("host", [0, 1])
@pytest.mark.parametrize("is_read", [True, False])
def test_an_image_that_one_host_cannot_read(
    copies: tuple[Path, Path], host: int, is_read: bool
) -> None:
    """All images are in one batch, of which each host reads one half."""
    names = sampled_images(copies[host])
    half = len(names) // 2
    batch_size = 2 * half + 2
    # The first host reads one more than half of the images.
    is_first = (host == 0) == is_read
    name = names[0] if is_first else names[-1]
    make_unreadable(Path(name))
    expected = run_on_one_host(copies[host if is_read else 1 - host], batch_size)
    assert expected["num_bad"] == is_read
    assert 0.3 < expected["accuracies"]["1_shot"] < 1
    for found in run_on_two_hosts(copies, "skip", str(batch_size)):
        assert found == expected
    if is_read:
        errors = run_on_two_hosts(copies, "fail", str(batch_size), code=2)
        assert all(mentions(error, "1", "skip_in_evaluation") for error in errors)
        assert [name in error for error in errors] == [host == 0, host == 1]


def test_images_that_are_missing_on_one_host(copies: tuple[Path, Path]) -> None:
    for path in (copies[1] / "test").rglob("1*.png"):
        path.unlink()
    # Eighty images are two batches, forty are one.
    for error in run_on_two_hosts(copies, "skip", "40", code=2):
        assert mentions(error, "test", "80", "36")


def test_too_few_images_are_an_error_on_both_hosts(copies: tuple[Path, Path]) -> None:
    for folder in copies:
        for path in (folder / "train" / "class 2").glob("*.png"):
            if path.stem not in ("0", "1"):
                path.unlink()
    for error in run_on_two_hosts(copies, "skip", "40", code=2):
        assert mentions(error, "3", "2", "class 2")
