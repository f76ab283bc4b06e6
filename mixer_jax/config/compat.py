"""Old spellings of configuration keys and values, accepted where saved files are read.

Runs, checkpoints and suites that were saved before a rename still load: their keys are translated
once, when they are read. On the command line and in config files an old key is an error that names
the new one.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

# An asterisk stands for the name of an entry of `config.evals`.
RENAMED_KEYS = {
    "model.kernels": "model.backend",
    "model.unroll": "model.scan_unroll",
    "recipe.accumulation_steps": "recipe.grad_accum_steps",
    "optimizer.decay": "optimizer.decay_type",
    "loader.threads": "loader.num_threads",
    "loader.processes": "loader.num_workers",
    "bad_images.max_share": "bad_images.max_fraction",
    "evals.*.kind": "evals.*.type",
    "evals.*.probe_seeds": "evals.*.num_seeds",
}
RENAMED_VALUES = {
    "preprocess.train_crop": {"shift": "random_shift"},
    "preprocess.eval_crop": {"whole": "resize"},
    "optimizer.name": {"adam": "adamw", "momentum": "sgd"},
}


def upgrade_key(path: str) -> str:
    """Translates a dotted key, e.g. "evals.test.kind", to its present spelling."""
    parts = path.split(".")
    for old, new in RENAMED_KEYS.items():
        pattern = old.split(".")
        if len(parts) == len(pattern) and all(
            p in ("*", part) for p, part in zip(pattern, parts, strict=True)
        ):
            return ".".join([*parts[:-1], new.rpartition(".")[2]])
    return path


def upgrade_value(path: str, value: Any) -> Any:
    """Translates the value of a key, which has its present spelling, to its own."""
    renamed = RENAMED_VALUES.get(path, {})
    return renamed.get(value, value) if isinstance(value, str) else value


def upgrade_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Translates keys and values by dotted path; a key in both spellings keeps the present one."""
    upgraded: dict[str, Any] = {}
    for path, value in overrides.items():
        new = upgrade_key(path)
        if new == path or new not in overrides:
            upgraded[new] = upgrade_value(new, value)
    return upgraded


def upgrade_config(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Translates a saved config, as nested dicts; returns a copy."""

    def upgrade_section(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        flat = upgrade_overrides({prefix + name: value for name, value in section.items()})
        return {
            path.removeprefix(prefix): upgrade_section(value, f"{path}.")
            if isinstance(value, Mapping)
            else value
            for path, value in flat.items()
        }

    return upgrade_section(saved, "")


def old_spellings(keys: Iterable[str]) -> dict[str, str]:
    """Returns the present spelling of each old key whose present spelling is among `keys`."""
    old_names = [path.rpartition(".")[2] for path in RENAMED_KEYS]
    return {
        old: key
        for key in keys
        for name in old_names
        if (old := f"{key.rpartition('.')[0]}.{name}") != key and upgrade_key(old) == key
    }


def renamed_key_hint(message: str) -> str:
    """Formats the end of an error in which ConfigDict quotes an old key; empty for other errors."""
    quoted = set(re.findall(r"""['"](\w+)['"]""", message))
    for old, new in RENAMED_KEYS.items():
        if old.rpartition(".")[2] in quoted:
            return f" config.{old} is now config.{new}."
    return ""
