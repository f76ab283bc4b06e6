"""Tests of the README: every command in it runs, every file it names exists."""

import re
import shlex
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.helpers.cli_session import run_commands
from tests.helpers.messages import mentions
from tests.helpers.random_weights import random_weights, save_run
from tests.helpers.tiny_run import NO_REGULARIZATION, to_flags

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line for language, block in BLOCKS if not language for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("python -m mixer_jax.")]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Directory for all runs of the README, which build on each other, with two photographs."""
    workspace = tmp_path_factory.mktemp("readme")
    (workspace / "configs").symlink_to(root / "configs")
    (workspace / "photos").mkdir()
    for name in ("photo.jpg", "photos/digit.png"):
        image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
        assert cv2.imwrite(str(workspace / name), image)
    return workspace


def reduce_sizes(command: list[str], data_dir: str) -> list[str]:
    """Reduces the sizes in a command."""
    command = [part.replace("gs://BUCKET/", "bucket/") for part in command]
    if "mixer_jax.evaluate" in command:
        return [*command, f"--data_dir={data_dir}"]
    if "mixer_jax.plan" in command:
        # Compiling for TPUs is tested elsewhere.
        return [re.sub("--topology=.*", "--topology=h100:16", part) for part in command]
    if "mixer_jax.prepare" in command:
        return [*command, "--data_dir=data"]
    if "mixer_jax.transfer" in command:
        if "--report" in command:
            return command
        # A whole suite is tested elsewhere.
        some = ["--tasks=few_shot_5_to_9,knn_5_to_9"] if "--suite=digits" in command else []
        return [*command, *some, "--no_throughput", f"--data_dir={data_dir}"]
    if "mixer_jax.visualize" in command:
        return [*command, f"--config.dataset.data_dir={data_dir}"]
    if "--mode=input" in command:
        sizes = ["--image_size=32", "--rounds=1", "--images_per_round=128", "--no_baselines"]
        return [*command, *sizes]
    if "--mode=weights" in command:
        return [*command, "--variant=S/32", "--rounds=1"]
    if "--mode=hbm_traffic" in command:
        # Compiling for TPUs is tested elsewhere.
        return [*command, "--help"]
    if "mixer_jax.benchmark" in command:
        sizes = ["--variant=S/32", "--image_size=64", "--batch_size=1", "--scan_unroll=1"]
        return [*command, *sizes, "--baselines=none", "--rounds=1"]
    if "mixer_jax.main" not in command:
        return command
    # The recipe's parts are tested elsewhere; here the commands are.
    sizes = to_flags(data_dir, num_steps=4, optimizer__warmup_steps=1, **NO_REGULARIZATION)
    if not any("digits" in part for part in command):
        synthetic = ["--config.dataset.name=synthetic", "--config.model.variant=custom"]
        sizes = [size for size in sizes if "evals" not in size] + synthetic
    # Flags of the command itself take precedence.
    own = {part.partition("=")[0] for part in command}
    return command + [size for size in sizes if size.partition("=")[0] not in own]


@pytest.mark.slow
def test_commands_run_in_order(workspace: Path, digits_dir: str) -> None:
    commands = [reduce_sizes(shlex.split(line, comments=True), digits_dir) for line in COMMANDS]
    commands[0].append("--config.tensorboard=true")
    outputs = {}
    assert len(commands) >= 10
    for line, done in zip(COMMANDS, run_commands(commands, workspace), strict=False):
        assert done.code == 0, f"{line}: {done.err}"
        assert done.out, line
        outputs[line] = done.out
    assert outputs.keys() == set(COMMANDS)
    (speed,) = [out for line, out in outputs.items() if "--mode=train,infer" in line]
    titles = [line for line in speed.splitlines() if "Mixer-" in line]
    for title, mode in zip(titles, ("train", "infer"), strict=True):
        assert mentions(title, mode, "Mixer-S/32")
    (tiled,) = [out for line, out in outputs.items() if "runs/large" in line]
    init_info = ("runs/digits", "16", "Appendix C", "head")
    assert any(mentions(line, *init_info) for line in tiled.splitlines())
    (answer,) = [out for line, out in outputs.items() if "--topk=3" in line]
    assert answer.splitlines()[::4] == ["photo.jpg", "photos/digit.png"]


def test_make_targets_exist() -> None:
    targets = [line.split()[1] for line in LINES if re.match(r"make [a-z]", line)]
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], capture_output=True, check=True)


@pytest.mark.slow
def test_python_examples_run(workspace: Path, tmp_path: Path) -> None:
    code = "\n".join(block for language, block in BLOCKS if language == "python")
    code = code.replace('"Mixer-B/16"', '"Mixer-S/32"')
    save_run(random_weights(image_size=(32, 32)), tmp_path / "runs" / "digits")
    (tmp_path / "photo.jpg").symlink_to(workspace / "photo.jpg")
    names: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(code, names)
    assert isinstance(names["params"], dict)
    assert names["params"].keys() >= {"stem", "blocks", "head"}
    assert getattr(names["logits"], "shape", None) == (3, 10)


def test_files_and_links_exist(root: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    configs = re.findall(r"configs/\w+\.py", README)
    tree = next(block for _, block in BLOCKS if block.startswith("mixer_jax/\n"))
    files = [f"mixer_jax/{name}" for name in re.findall(r"^  ([a-z]\S+)", tree, re.MULTILINE)]
    for name in [*links, *configs, *files]:
        assert (root / name.partition("#")[0]).exists(), name
