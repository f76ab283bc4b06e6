"""Tests of runs on tar shards: one and two hosts, evaluation, and a folder of the same images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixer_jax.training.metrics import read_metrics
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions
from tests.helpers.processes import finish, start, start_two_hosts
from tests.helpers.shards import Member, make_image, write_shard
from tests.helpers.tiny_run import NO_REGULARIZATION

pytestmark = pytest.mark.slow

STEPS = 20
SPLITS = {"train": 200, "test": 40}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the same images, of which some are empty, as `images/` and in `shards/`."""
    root = tmp_path_factory.mktemp("data")
    for split, count in SPLITS.items():
        members: list[Member] = []
        for number in range(count):
            key = f"{split}/{number % 4}/{number}"
            image = b"" if number % 9 == 5 else make_image(key, 16)
            path = root / "images" / f"{key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
            members += [(f"{key}.cls", f"{number % 4}".encode()), (f"{key}.png", image)]
        for shard, first in enumerate(range(0, 2 * count, 66)):
            write_shard(root / f"shards/{split}-{shard}.tar", members[first : first + 66])
    return root


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return NO_REGULARIZATION | {
        "bad_images__max_fraction": 1.0,
        "bad_images__skip_in_evaluation": True,
        "num_steps": STEPS,
        "log_every_steps": 1,
        "checkpoint__every_steps": STEPS,
        "evals__test__every_steps": 0,
    }


@pytest.fixture(scope="module")
def on_one_host(
    tmp_path_factory: pytest.TempPathFactory, data: Path, settings: dict[str, Any]
) -> Path:
    """Workdir of a run on one host with four devices, whose images are loaded by two processes."""
    workdir = tmp_path_factory.mktemp("run") / "one"
    changes: dict[str, Any] = {"dataset__name": f"wds:{data}/shards", "loader__num_workers": 2}
    finish(start("", workdir, {"JAX_NUM_CPU_DEVICES": "4"}, **settings, **changes))
    return workdir


def losses(workdir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(str(workdir)) if "loss" in line]


def bad_images(workdir: Path) -> dict[str, int]:
    """Returns the first step of each bad image by its name in the archive or folder."""
    steps: dict[str, int] = {}
    for log in workdir.glob("bad_images_*.jsonl"):
        for line in map(json.loads, log.read_text().splitlines()):
            name = "/".join(line["name"].split("/")[-3:])
            steps[name] = min(line["step"], steps.get(name, STEPS))
    return steps


def test_two_hosts_compute_the_same_as_one(
    on_one_host: Path, data: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = settings | {"dataset__name": f"wds:{data}/shards"}
    for process in start_two_hosts("", tmp_path, **settings):
        finish(process)
    assert len(losses(tmp_path)) == STEPS
    np.testing.assert_allclose(losses(tmp_path), losses(on_one_host), rtol=1e-6)
    assert bad_images(tmp_path) == bad_images(on_one_host)
    assert len(bad_images(tmp_path)) == 22
    one, two = (read_metrics(str(workdir))[-1] for workdir in (on_one_host, tmp_path))
    for key in ("test/num_examples", "test/num_bad", "test/top1"):
        assert two[key] == one[key]
    assert (one["test/num_examples"], one["test/num_bad"]) == (36, 4)
    # No lock and no temporary file is left behind.
    others = [path.name for path in (data / "shards").iterdir() if path.suffix != ".tar"]
    assert others == ["mixer_jax_index.npz"]


def test_a_folder_of_the_same_images_is_the_same_run(
    on_one_host: Path, data: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"dataset__name": f"folder:{data}/images"}
    finish(start("", tmp_path, {"JAX_NUM_CPU_DEVICES": "4"}, **settings, **changes))
    assert losses(tmp_path) == losses(on_one_host)
    assert bad_images(tmp_path) == bad_images(on_one_host)


def test_commands_read_shards(on_one_host: Path, data: Path, tmp_path: Path) -> None:
    shards = f"wds:{data}/shards/{{train,test}}-*.tar"
    arguments = (f"--checkpoint={on_one_host}", f"--dataset={shards}", "--split=test")
    result = json.loads(run_cli("evaluate", *arguments, "--skip_bad_images", "--json").stdout)
    final = read_metrics(str(on_one_host))[-1]
    assert result["top1"] == pytest.approx(final["test/top1"])
    assert (result["num_examples"], result["num_bad"]) == (36, 4)
    failed = run_cli("evaluate", *arguments, code=2)
    assert mentions(failed.stderr, "4", f"{data}/shards/test-0.tar")
    out = tmp_path / "batch.png"
    options = ("--config=folder", f"--config.dataset.name={shards}", "--config.image_size=16")
    run_cli("visualize", "data", *options, "--num_images=4", f"--out={out}")
    assert out.stat().st_size > 1000
    path = data / "shards" / "train-1.tar"
    path.write_bytes(path.read_bytes()[:5000])
    failed = run_cli("evaluate", *arguments, code=2)
    assert mentions(failed.stderr.splitlines()[-1], str(path), "5000")
