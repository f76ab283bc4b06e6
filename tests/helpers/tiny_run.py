"""configs/digits.py made small enough for tests."""

from typing import Any

from mixer_jax.config.config import parse
from mixer_jax.config.loading import load_config_with_overrides
from mixer_jax.config.schema import RunConfig

OVERRIDES: dict[str, Any] = {
    "num_steps": 20,
    "batch_size": 16,
    "eval_batch_size": 128,
    "image_size": 16,
    "model.num_blocks": 2,
    "model.hidden_dim": 16,
    "model.tokens_mlp_dim": 8,
    "model.channels_mlp_dim": 16,
    "model.patch_size": 4,
    "model.stochastic_depth": 0.1,
    "preprocess.max_shift": 1,
    "optimizer.warmup_steps": 2,
    "log_every_steps": 1,
    "checkpoint.every_steps": 5,
    "evals.test.every_steps": 10,
}
# Line of starts.jsonl.
START: dict[str, Any] = {
    "step": 0,
    "num_steps": 20,
    "time": "2026-01-02T03:04:05+00:00",
    "model": "Mixer-S/16",
    "num_parameters": 1_234_567,
    "train_data": "digits/all train",
    "num_train_examples": 1_437,
    "num_hosts": 2,
    "num_devices": 8,
    "device_kind": "NVIDIA H200",
    "mesh": {"data": 4, "fsdp": 2},
    "dtype": "bfloat16",
    "backend": "triton",
    "versions": {"mixer-jax": "0.1.0", "jax": "0.10.2"},
}
# Changes that make the program faster to compile.
NO_REGULARIZATION: dict[str, Any] = {
    "model__num_blocks": 1,
    "model__channels_mlp_dim": 16,
    "model__stochastic_depth": 0.0,
    "model__dropout": 0.0,
    "recipe__mixup": 0.0,
    "recipe__ema_decay": 0.0,
    "tensorboard": False,
}
# Changes of `OVERRIDES` that make a run of each family; 0 unsets a key of another.
_NO_MIXER = {"model__tokens_mlp_dim": 0, "model__channels_mlp_dim": 0}
FAMILY_OVERRIDES: dict[str, dict[str, Any]] = {
    "mixer": {},
    "vit": _NO_MIXER | {"model__family": "vit", "model__num_heads": 2, "model__mlp_dim": 32},
    "bit": _NO_MIXER
    | dict.fromkeys(("model__num_blocks", "model__patch_size", "model__hidden_dim"), 0)
    | {"model__family": "bit", "model__units": "1,1", "model__root_width": 8}
    | {"model__root": "3x3", "model__stochastic_depth": 0.0, "model__dropout": 0.0},
}
# Settings of optimizers whose state or step differs from that of AdamW.
OPTIMIZER_OVERRIDES: dict[str, dict[str, Any]] = {
    "muon": {"optimizer__name": "muon"},
    "adafactor": {"optimizer__name": "adafactor"},
    "sam": {"optimizer__sam_rho": 0.05},
    "frozen": {"optimizer__freeze": "stem,blocks.0", "optimizer__layer_decay": 0.7},
}


def to_flags(data_dir: str, **changes: Any) -> list[str]:
    """Formats command-line overrides; `changes` are keys with two underscores for a dot."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    values = {**OVERRIDES, "dataset.data_dir": data_dir, **changes}
    return [f"--config.{key}={value}" for key, value in values.items()]


def small_config(data_dir: str, file: str = "configs/digits.py", **changes: Any) -> RunConfig:
    """Loads a config file with `OVERRIDES` and the changes of `to_flags`."""
    return parse(load_config_with_overrides(file, to_flags(data_dir, **changes)))
