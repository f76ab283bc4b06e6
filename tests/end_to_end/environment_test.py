"""Tests of commands in environments that other programs or machines left, as real processes."""

import os
from pathlib import Path

import pytest

from mixer_jax.checkpoints.resolve import list_steps
from tests.helpers.cli import run_cli
from tests.helpers.messages import mentions
from tests.helpers.processes import finish, start
from tests.helpers.random_weights import random_weights, save_run
from tests.helpers.tiny_run import NO_REGULARIZATION, to_flags

pytestmark = pytest.mark.slow


def test_training_ignores_the_plot_backend_of_a_notebook(digits_dir: str, tmp_path: Path) -> None:
    env = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    out = finish(start(digits_dir, tmp_path, env, **NO_REGULARIZATION, num_steps=3))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert mentions(out, f"{tmp_path}/curves.png")


# Known to JAX, but without a device here; and unknown.
@pytest.mark.parametrize("platforms", ["cuda", "none_such"])
@pytest.mark.parametrize("command", ["main", "predict", "evaluate", "transfer", "benchmark"])
def test_platform_that_is_not_present_is_a_usage_error(
    command: str,
    platforms: str,
    digits_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if platforms == "cuda" and os.path.exists("/dev/nvidiactl"):
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    checkpoint = f"--checkpoint={tmp_path}/weights"
    if command in ("predict", "evaluate", "transfer"):
        save_run(random_weights(), tmp_path / "weights")
    arguments = {
        "main": ["--config=configs/digits.py", f"--workdir={tmp_path}/run", *to_flags(digits_dir)],
        "predict": [checkpoint, "docs/digits_curves.png"],
        "evaluate": [checkpoint, "--dataset=digits", f"--data_dir={digits_dir}"],
        "transfer": [
            checkpoint,
            "--suite=few_shot",
            "--dataset=digits",
            f"--data_dir={digits_dir}",
            f"--workdir={tmp_path}/run",
        ],
        "benchmark": ["--mode=infer"],
    }[command]
    done = run_cli(command, *arguments, code=2)
    (line,) = done.stderr.splitlines()
    assert mentions(line, "JAX_PLATFORMS", platforms)
    assert not (tmp_path / "run").exists()


def test_commands_that_need_no_accelerator_ignore_the_platform(
    digits_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(random_weights(), tmp_path / "weights")
    monkeypatch.setenv("JAX_PLATFORMS", "none_such")
    run_cli("convert", f"{tmp_path}/weights", f"{tmp_path}/weights.npz")
    run_cli("convert", f"{tmp_path}/weights.npz", f"{tmp_path}/again")
    assert list_steps(f"{tmp_path}/again") == [0]
    plot = ["visualize", "data", "--config=configs/digits.py", f"--out={tmp_path}/batch.png"]
    run_cli(*plot, "--num_images=2", *to_flags(digits_dir))
