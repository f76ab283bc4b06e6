"""Tests of feature extraction as real processes that are killed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cli import run_cli
from tests.helpers.processes import kill_at_end, wait_until
from tests.helpers.random_weights import random_weights, save_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_killed_and_resumed_extraction_writes_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    checkpoint = save_run(random_weights(), tmp_path / "run")
    flags = [f"--checkpoint={checkpoint}", "--dataset=synthetic", "--layers=pre_logits,blocks.1"]
    flags += ["--batch_size=2"]
    out = tmp_path / f"features.{suffix}"
    command = [sys.executable, "-W", "error", "-m", "mixer_jax.extract", *flags, f"--out={out}"]
    parts = tmp_path / f"{out.name}.parts"

    def num_parts() -> int:
        return len(list(parts.glob("0*.npz")))

    for at_least in (1, 4):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        with kill_at_end(process):
            wait_until(lambda n=at_least: num_parts() >= n, process)  # type: ignore[misc]
        assert not out.exists()
    assert num_parts() < 16
    done = run_cli("extract", *flags, f"--out={out}")
    assert "resumed" in done.stdout
    expected = tmp_path / f"expected.{suffix}"
    run_cli("extract", *flags, f"--out={expected}")
    assert out.read_bytes() == expected.read_bytes()
    assert not parts.exists()
