"""Tests of saved runs, checkpoints and command lines with keys from before they were renamed."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixer_jax import config as config_lib
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.config.compat import RENAMED_KEYS, RENAMED_VALUES, upgrade_config, upgrade_overrides
from mixer_jax.config.loading import load_config, load_config_with_overrides
from mixer_jax.config.schema import get_field
from mixer_jax.errors import UserError
from mixer_jax.training.workdir import CONFIG_FILE, check_workdir, config_diff
from tests.helpers.messages import raises

# Written by the code before the renames, for configs/digits.py:low with four steps.
OLD_CONFIG: dict[str, Any] = json.loads("""
{"bad_images": {"max_share": 0.001, "skip_in_evaluation": false}, "batch_size": 16, "checkpoint":
{"every_minutes": 0.0, "every_steps": 2, "keep": 2}, "compilation_cache": "~/.cache/mixer_jax",
"dataset": {"data_dir": "", "name": "digits/low", "num_classes": 0, "num_examples": 0,
"train_split": "train"}, "distributed": "auto", "distributed_timeout": 300, "eval_batch_size": 360,
"evals": {"test": {"dataset": "", "every_steps": 2, "kind": "classify", "probe_seeds": 3, "shots":
"1,5,10,25", "split": "test", "train_split": "train"}}, "image_size": 32, "init_from": "",
"init_head": "auto", "loader": {"prefetch_batches": 2, "processes": 0, "threads": 0},
"log_every_steps": 50, "log_update_norm": false, "mesh": {"data": 0, "fsdp": 1}, "mixture": {},
"model": {"channels_mlp_dim": 256, "dropout": 0.0, "dtype": "auto", "gelu": "tanh", "head_bias":
0.0, "hidden_dim": 64, "kernels": "auto", "num_blocks": 4, "patch_size": 8, "remat": "auto",
"stochastic_depth": 0.0, "tokens_mlp_dim": 32, "unroll": -1, "variant": "custom"}, "num_epochs":
0.0, "num_steps": 4, "optimizer": {"b1": 0.9, "b2": 0.999, "clip_norm": 1.0, "decay": "cosine",
"end_learning_rate": 0.0, "eps": 1e-08, "learning_rate": 0.003, "momentum": 0.9, "name": "adam",
"warmup_steps": 1, "weight_decay": 0.1}, "preprocess": {"eval_crop": "whole", "exif_orientation":
false, "flip": false, "max_shift": 4, "min_area": 0.05, "randaugment_layers": 0,
"randaugment_magnitude": 10.0, "train_crop": "shift"}, "recipe": {"accumulation_steps": 1,
"ema_decay": 0.0, "label_smoothing": 0.0, "loss": "softmax", "mixup": 0.2}, "seed": 0,
"tensorboard": false}
""")
OLD_METADATA: dict[str, Any] = {
    "about": {
        "variant": "custom",
        "widths": {
            "num_blocks": 4,
            "patch_size": 8,
            "hidden_dim": 64,
            "tokens_mlp_dim": 32,
            "channels_mlp_dim": 256,
        },
        "image_size": [32, 32],
        "num_classes": 5,
        "class_names": ["0", "1", "2", "3", "4"],
        "gelu": "tanh",
        "eval_crop": "whole",
        "exif_orientation": False,
        "loss": "softmax",
        "dtype": "auto",
        "resolution": "",
    },
    "ema": False,
    "num_steps": 4,
    "num_train_examples": 708,
    "config": OLD_CONFIG,
    "versions": {"mixer_jax": "0.1.0", "jax": "0.10.2"},
    "loss_window": [],
}
SAME_RUN = [
    "--config.num_steps=4",
    "--config.batch_size=16",
    "--config.optimizer.warmup_steps=1",
    "--config.evals.test.every_steps=2",
    "--config.checkpoint.every_steps=2",
    "--config.tensorboard=false",
]


def test_renames_lead_to_declared_keys_and_choices() -> None:
    for old, new in RENAMED_KEYS.items():
        assert get_field(old.replace("*", "test")) is None
        assert get_field(new.replace("*", "test")) is not None
    for path, values in RENAMED_VALUES.items():
        field = get_field(path)
        assert field is not None
        assert not set(values) & set(field.choices)
        assert set(values.values()) <= set(field.choices)


def test_fill_defaults_translates_a_saved_config() -> None:
    before = json.dumps(OLD_CONFIG)
    filled = config_lib.fill_defaults(OLD_CONFIG)
    assert json.dumps(OLD_CONFIG) == before
    assert filled["model"]["family"] == "mixer"
    assert (filled["model"]["backend"], filled["model"]["scan_unroll"]) == ("auto", -1)
    assert filled["optimizer"]["decay_type"] == "cosine"
    assert filled["preprocess"]["train_crop"] == "random_shift"
    assert filled["preprocess"]["eval_crop"] == "resize"
    assert (filled["evals"]["test"]["type"], filled["evals"]["test"]["num_seeds"]) == (
        "classify",
        3,
    )
    current = load_config_with_overrides("configs/digits.py:low", SAME_RUN)
    config_lib.validate(current)
    assert filled == current.to_dict()


def test_config_diff_of_an_old_run_names_only_what_changed() -> None:
    current = load_config_with_overrides("configs/digits.py:low", SAME_RUN)
    assert config_diff(OLD_CONFIG, config_lib.parse(current)) == ([], [])
    current.loader.num_threads = 3
    current.optimizer.decay_type = "linear"
    assert config_diff(OLD_CONFIG, config_lib.parse(current)) == (
        ["loader.num_threads: 0 -> 3"],
        ["optimizer.decay_type: 'cosine' -> 'linear'"],
    )


def test_check_workdir_accepts_an_old_run(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps(OLD_CONFIG))
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    current = load_config_with_overrides("configs/digits.py:low", SAME_RUN)
    assert check_workdir(str(tmp_path), config_lib.parse(current)) == []


def test_from_metadata_reads_an_old_checkpoint() -> None:
    info = ModelInfo.from_metadata(OLD_METADATA, "here")
    assert info.eval_crop == "resize"
    assert (info.variant, info.image_size, info.num_classes) == ("custom", (32, 32), 5)


def test_upgrade_overrides_prefers_the_present_spelling() -> None:
    both = {"loader.threads": "2", "loader.num_threads": "3", "seed": "1"}
    assert upgrade_overrides(both) == {"loader.num_threads": "3", "seed": "1"}


def test_upgrade_config_leaves_entries_with_the_name_of_an_old_key() -> None:
    saved = {"evals": {"kind": {"kind": "knn"}}}
    assert upgrade_config(saved) == {"evals": {"kind": {"type": "knn"}}}


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_an_old_key_on_the_command_line_names_the_new_one(old: str, new: str) -> None:
    old, new = old.replace("*", "test"), new.replace("*", "test")
    with raises(UserError, f"config.{old}", f"config.{new}"):
        load_config_with_overrides("configs/digits.py", [f"--config.{old}=1"])


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [(path, old, new) for path, values in RENAMED_VALUES.items() for old, new in values.items()],
)
def test_an_old_value_names_the_new_one(path: str, old: str, new: str) -> None:
    config = load_config_with_overrides("configs/digits.py", [f"--config.{path}={old}"])
    with raises(UserError, path, f"now {new!r}", f"got {old!r}"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ("line", "new"),
    [
        ("config.model.kernels = 'xla'", "config.model.backend"),
        ("config.optimizer.decay = 'none'", "config.optimizer.decay_type"),
        ("config.evals = evals(test={'kind': 'knn'})", "config.evals.test.type"),
        ("config.batch_size *= config.recipe.accumulation_steps", "config.recipe.grad_accum_steps"),
    ],
)
def test_an_old_key_in_a_config_file_names_the_new_one(line: str, new: str, tmp_path: Path) -> None:
    path = tmp_path / "old.py"
    path.write_text(
        "from mixer_jax.config import evals, get_default\n\n"
        f"def get_config():\n    config = get_default()\n    {line}\n    return config\n"
    )
    with raises(UserError, str(path), new) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)
