"""A config file whose models train in seconds on synthetic data, and calls of `compare`."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixer_jax import compare
from mixer_jax.comparison.table import MEASURED

CONFIG_FILE = """
from mixer_jax import config as config_lib

def get_config(hidden_dim="8"):
    config = config_lib.get_default()
    config.dataset.name, config.dataset.num_classes = "synthetic", 5
    config.dataset.num_examples = 32
    config.num_steps, config.batch_size, config.eval_batch_size = 4, 8, 8
    config.image_size, config.preprocess.train_crop = 16, "resize"
    config.optimizer.warmup_steps = 2
    config.log_every_steps, config.checkpoint.every_steps = 1, 2
    config.model.variant = "custom"
    config.model.num_blocks, config.model.patch_size = 1, 8
    config.model.hidden_dim = int(hidden_dim)
    config.model.tokens_mlp_dim, config.model.channels_mlp_dim = 4, 8
    config.compilation_cache = ""
    config.evals = config_lib.evals(test={"split": "test"})
    return config
"""


def write_config(folder: Path, name: str = "tiny.py", text: str = CONFIG_FILE) -> Path:
    """Writes the config file."""
    path = folder / name
    path.write_text(text)
    return path


def run_compare(
    capsys: pytest.CaptureFixture[str], workdir: Path, *arguments: str, code: int = 0
) -> str:
    """Runs the command in this process; returns what it prints on standard output."""
    capsys.readouterr()
    assert compare.main([*arguments, f"--workdir={workdir}"]) == code
    return capsys.readouterr().out


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """Reads the rows of a table without what is measured by the clock."""
    rows = json.loads((workdir / "results.json").read_text())["rows"]
    return [{name: x for name, x in row.items() if name not in MEASURED} for row in rows]
