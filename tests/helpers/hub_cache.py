"""Repositories in the cache of the Hugging Face Hub's library."""

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from tests.helpers import pretrained_files

NAME = "someone/mixer_tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "f" * 40


def add_to_cache(cache: Path, params: Any, config: dict[str, Any], commit: str = COMMIT) -> None:
    """Adds a repository to the cache, in the layout of the Hub's library."""
    repo = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs/main").write_text(COMMIT)
    save_file(pretrained_files.timm(params), snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps(config))


def timm_config(interpolation: str, mean: list[float], std: list[float]) -> dict[str, Any]:
    """Returns a config with timm's fields for preprocessing."""
    preprocessing = {"interpolation": interpolation, "crop_pct": 0.875, "mean": mean, "std": std}
    return {
        "architecture": "mixer_tiny",
        "num_classes": 10,
        "pretrained_cfg": {"input_size": [3, 16, 16], "crop_mode": "center", **preprocessing},
    }


GOOGLE = timm_config("bicubic", [0.5] * 3, [0.5] * 3)
