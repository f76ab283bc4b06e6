"""Tests of docs/guide.md: its commands and code, in order, with small sizes."""

import json
import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from mixer_jax.checkpoints.resolve import METADATA_SUFFIX
from mixer_jax.models.mixer_config import MixerConfig
from tests.helpers.cli_session import run_commands
from tests.helpers.messages import mentions
from tests.helpers.random_weights import random_weights, save_npz

GUIDE = (Path(__file__).parent.parent / "docs" / "guide.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()]
# Overrides that keep training short.
SHORT_RUN = {
    "num_steps": 2,
    "batch_size": 8,
    "eval_batch_size": 8,
    "optimizer.warmup_steps": 1,
    "checkpoint.every_steps": 0,
    "tensorboard": False,
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Folder with photographs, the configs, and a small checkpoint in Google's format."""
    workspace = tmp_path_factory.mktemp("guide")
    (workspace / "configs").symlink_to(root / "configs")
    config = MixerConfig(1, 32, 16, 8, 16)
    weights = random_weights(config, (224, 224), class_names=(), num_classes=1000)
    npz = save_npz(weights, workspace / "Mixer-B_16.npz")
    Path(npz + METADATA_SUFFIX).unlink()
    rng = np.random.default_rng(0)
    for name, photograph in zip(("cat", "dog"), load_sample_images().images, strict=True):
        folder = workspace / "photos" / name
        folder.mkdir(parents=True)
        for index in range(1, 11):
            top, left = rng.integers(0, 200, 2)
            crop = photograph[top : top + 220, left : left + 300, ::-1]
            assert cv2.imwrite(str(folder / f"{index}.jpg"), crop)
    return workspace


def shorten(line: str) -> list[str]:
    """Splits a command line, with overrides that keep training short."""
    command = shlex.split(line)
    if "mixer_jax.main" in command:
        command += [f"--config.{key}={value}" for key, value in SHORT_RUN.items()]
    return command


@pytest.mark.slow
def test_guide_commands_run_in_order(workspace: Path) -> None:
    assert len(COMMANDS) >= 14
    outputs = {}
    results = run_commands(list(map(shorten, COMMANDS)), workspace)
    for line, result in zip(COMMANDS, results, strict=False):
        assert result.code == 0, f"{line}: {result.err}"
        assert result.out, line
        outputs[line] = result.out
    assert outputs.keys() == set(COMMANDS)

    def output_of(part: str) -> str:
        return next(out for line, out in outputs.items() if part in line)

    (images,) = [json.loads(out) for line, out in outputs.items() if "--format=json" in line]
    assert len(images) == 20

    def init_info(part: str, weights: str) -> str:
        lines = output_of(part).splitlines()
        return next(line for line in lines if mentions(line, weights, "224", "Appendix C"))

    new_head = init_info("runs/mine_448", "Mixer-B_16.npz")
    same_head = init_info("runs/mine_later", "runs/mine")
    assert mentions(new_head, "new", "head")
    assert mentions(same_head, "head")
    assert not mentions(same_head, "new")
    # The trained and the converted model predict the same, with folder names as class names.
    mine = output_of("--checkpoint=runs/mine photos").splitlines()
    assert {line.split()[-1] for line in mine if line.startswith(" ")} == {"cat", "dog"}
    converted = output_of("--checkpoint=mine.npz").splitlines()
    start = mine.index("photos/dog/1.jpg")
    assert converted == mine[start : start + len(converted)]
    metrics = output_of("mixer_jax.evaluate").splitlines()
    assert any(mentions(line, "2", "images") for line in metrics)

    code = "\n".join(block for language, block in BLOCKS if language == "python")
    names: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        exec(code, names)
    assert getattr(names["logits"], "shape", None) == (3, 2)
