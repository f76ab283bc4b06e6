"""Tests of docs/guide.md: its commands, one after the other, in a folder such as a reader has."""

import json
import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from mixer_jax.checkpoints.formats.npz import METADATA_SUFFIX, write_npz
from mixer_jax.checkpoints.layouts import layout_views
from mixer_jax.checkpoints.tree import flatten
from mixer_jax.models.mixer_config import MixerConfig
from mixer_jax.models.mixer_layouts import GOOGLE
from tests.helpers.cli_session import run_commands
from tests.helpers.messages import mentions
from tests.helpers.random_weights import random_weights

GUIDE = (Path(__file__).parent.parent / "docs" / "guide.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()]
# A training run that a test has time for; what the guide itself sets comes before.
SMALL = {
    "num_steps": 2,
    "batch_size": 8,
    "eval_batch_size": 8,
    "optimizer.warmup_steps": 1,
    "checkpoint.every_steps": 0,
    "tensorboard": False,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A folder with photographs, the configs, and a file as Google publishes them, but small."""
    place = tmp_path_factory.mktemp("guide")
    (place / "configs").symlink_to(root / "configs")
    widths = MixerConfig(1, 32, 16, 8, 16)
    weights = random_weights(widths, (224, 224), class_names=(), num_classes=1000)
    npz = str(place / "Mixer-B_16.npz")
    write_npz(npz, layout_views(dict(flatten(weights.params)), GOOGLE), {})
    Path(npz + METADATA_SUFFIX).unlink()
    rng = np.random.default_rng(0)
    for name, photograph in zip(("cat", "dog"), load_sample_images().images, strict=True):
        folder = place / "photos" / name
        folder.mkdir(parents=True)
        for number in range(1, 11):
            top, left = rng.integers(0, 200, 2)
            part = photograph[top : top + 220, left : left + 300, ::-1]
            assert cv2.imwrite(str(folder / f"{number}.jpg"), part)
    return place


def small(line: str) -> list[str]:
    """The command with its sizes made small."""
    command = shlex.split(line)
    if "mixer_jax.main" in command:
        command += [f"--config.{key}={value}" for key, value in SMALL.items()]
    return command


def test_every_command_runs_after_the_one_above_it(place: Path) -> None:
    assert len(COMMANDS) >= 14
    told = {}
    for line, done in zip(COMMANDS, run_commands(list(map(small, COMMANDS)), place), strict=False):
        assert done.code == 0, f"{line}: {done.err}"
        assert done.out, line
        told[line] = done.out
    assert told.keys() == set(COMMANDS)

    def said(part: str) -> str:
        return next(out for line, out in told.items() if part in line)

    (large,) = [json.loads(out) for line, out in told.items() if "--format=json" in line]
    assert len(large) == 20

    def init_info(part: str, weights: str) -> str:
        lines = said(part).splitlines()
        return next(line for line in lines if mentions(line, weights, "224", "Appendix C"))

    new_head = init_info("runs/mine_448", "Mixer-B_16.npz")
    same_head = init_info("runs/mine_later", "runs/mine")
    assert mentions(new_head, "new", "head")
    assert mentions(same_head, "head")
    assert not mentions(same_head, "new")
    # What was trained and what was converted say the same, with the names of the folders.
    mine = said("--checkpoint=runs/mine photos").splitlines()
    assert {line.split()[-1] for line in mine if line.startswith(" ")} == {"cat", "dog"}
    converted = said("--checkpoint=mine.npz").splitlines()
    start = mine.index("photos/dog/1.jpg")
    assert converted == mine[start : start + len(converted)]
    scores = said("mixer_jax.evaluate").splitlines()
    assert any(mentions(line, "2", "images") for line in scores)

    code = "\n".join(block for language, block in BLOCKS if language == "python")
    names: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        exec(code, names)
    assert getattr(names["logits"], "shape", None) == (3, 2)
