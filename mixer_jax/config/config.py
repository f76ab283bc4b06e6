"""Building, validating and parsing configurations.

A file in configs/ starts from `get_default()` and changes what differs; the command line changes it
once more (see loading.py). `parse` then checks the whole, before any device is touched, and
converts it to a `RunConfig`.
"""

import functools
import operator
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from mixer_jax.config.compat import old_spellings, upgrade_config, upgrade_key
from mixer_jax.config.schema import (
    ENTRY_TYPES,
    FIELDS,
    NAMED_SECTIONS,
    SECTION_TYPES,
    Field,
    RunConfig,
    from_dict,
    parse_profile_steps,
    parse_shots,
)
from mixer_jax.errors import UserError, nearest, suggest
from mixer_jax.models.family import CUSTOM, INIT_FROM
from mixer_jax.models.param_groups import check_freeze
from mixer_jax.models.registry import FAMILIES, get_family

# Schedules that do not end at a rate of their own.
_COOLDOWN_TYPES = ("rsqrt", "none")
# Limits of Weights & Biases for names of projects.
_WANDB_RESERVED, _WANDB_MAX_LENGTH = r"/\#?%:", 128


def get_default() -> ConfigDict:
    """Builds a locked config with every key at its default, without evaluations and mixture."""
    return ConfigDict(fill_defaults({}) | {section: {} for section in NAMED_SECTIONS}).lock()


def fill_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """Copies a saved config, adding the default of every missing key.

    The default of a key is what runs did before the key existed. Old spellings of keys and values
    are translated. No entry is added to evals or mixture.

    Raises:
        TypeError, AttributeError: It is not a config: a section or value has another type.
    """
    tree = upgrade_config(saved)
    for path, field in FIELDS.items():
        *sections, name = path.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node.setdefault(name, field.default)
    for section, fields in NAMED_SECTIONS.items():
        for entry in tree.get(section, {}).values():
            for name, field in fields.items():
                entry.setdefault(name, field.default)
    for path, field in FIELDS.items():
        _check_saved_type(path, field, functools.reduce(operator.getitem, path.split("."), tree))
    for section, fields in NAMED_SECTIONS.items():
        for name, entry in tree.get(section, {}).items():
            for key, field in fields.items():
                _check_saved_type(f"{section}.{name}.{key}", field, entry[key])
    return tree


def _check_saved_type(path: str, field: Field, value: Any) -> None:
    """Raises TypeError unless a value of a saved config has the type of its key."""
    # JSON that other programs wrote has 1 instead of 1.0.
    accepted = (int, float) if field.type is float else (field.type,)
    if type(value) not in accepted:
        raise TypeError(f"{path} must be {field.type.__name__}")


def evals(**entries: dict[str, Any]) -> ConfigDict:
    """Builds a value for `config.evals`, e.g. `evals(test=dict(split="test", every_steps=100))`.

    Raises:
        UserError: A key of an entry does not exist.
    """
    return _build_entries("evals", entries)


def mixture(**entries: dict[str, Any]) -> ConfigDict:
    """Builds a value for `config.mixture`, e.g. `mixture(i1k=dict(dataset="imagenet2012"), …)`.

    Raises:
        UserError: A key of an entry does not exist.
    """
    return _build_entries("mixture", entries)


def _build_entries(section: str, entries: dict[str, dict[str, Any]]) -> ConfigDict:
    fields = NAMED_SECTIONS[section]
    for name, values in entries.items():
        for key in values:
            check_key_exists(f"{section}.{name}.{key}", [f"{section}.{name}.{k}" for k in fields])
    defaults = {name: field.default for name, field in fields.items()}
    return ConfigDict({name: defaults | values for name, values in entries.items()}).lock()


def parse(config: ConfigDict) -> RunConfig:
    """Validates a config and converts it to dataclasses; touches no device and no disk.

    Raises:
        UserError: The first rule that is broken, with key, value and fix.
    """
    values = flatten(config)
    for path, value in values.items():
        _check_value(path, value)
    for section in NAMED_SECTIONS:
        if section not in config:
            raise UserError(f"config.{section} is missing. Start from config.get_default().")
    entries = (
        f"{section}.{name}.{key}"
        for section, fields in NAMED_SECTIONS.items()
        for name in config[section]
        for key in fields
    )
    for path in [*FIELDS, *entries]:
        if path not in values:
            raise UserError(
                f"config.{path} is missing. Start from config.get_default(), config.evals() and "
                "config.mixture()."
            )
    run = from_dict(config.to_dict())
    _check_rules(run)
    return run


def validate(config: ConfigDict) -> None:
    """Validates a config like `parse`."""
    parse(config)


def _check_value(path: str, value: Any) -> None:
    """Checks that a key exists, and the type and range of its value."""
    fields, prefix = FIELDS, ""
    if (section := path.partition(".")[0]) in NAMED_SECTIONS:
        fields, prefix = NAMED_SECTIONS[section], f"{path.rpartition('.')[0]}."
    check_key_exists(path, [prefix + name for name in fields])
    fields[path.removeprefix(prefix)].check(f"config.{path}", value)


def check_key_exists(path: str, keys: list[str]) -> None:
    """Raises UserError, with the nearest of `keys`, if `path` is not one of them."""
    if path in keys:
        return
    if (renamed := upgrade_key(path)) != path:
        raise UserError(f"config.{path} is now config.{renamed}.")
    hint = _suggest_key(path, keys)
    section = path.partition(".")[0]
    if section in NAMED_SECTIONS and not any(key.startswith(f"{section}.") for key in keys):
        hint = f"Entries of {section} are declared in a config file, and this one has none."
    raise UserError(f"config.{path} is not a configuration key. {hint}")


def _suggest_key(path: str, keys: list[str]) -> str:
    """Formats the hint of a message about an unknown key."""
    if match := nearest_key(path, keys):
        return f"Did you mean config.{match}?"
    section = path.rpartition(".")[0]
    names = [
        key.rpartition(".")[2] for key in keys if section and key.rpartition(".")[0] == section
    ]
    if names:
        return f"The keys of config.{section} are {', '.join(names)}."
    return "--help lists all keys."


def nearest_key(path: str, keys: Sequence[str]) -> str | None:
    """Finds the key that is most similar to an unknown one in its last part, if any is."""
    section, _, name = path.rpartition(".")
    spellings = {key: key for key in keys} | old_spellings(keys)
    siblings = [key for key in spellings if section and key.rpartition(".")[0] == section]
    # A forgotten section is as common as a typing error: a key of the same name comes first.
    for candidates, cutoff in ((list(spellings), 1.0), (siblings, 0.6), (list(spellings), 0.8)):
        by_name: dict[str, str] = {}
        for key in candidates:
            by_name.setdefault(key.rpartition(".")[2], key)
        if match := nearest(name, by_name, cutoff):
            return spellings[by_name[match]]
    return None


def _check_rules(config: RunConfig) -> None:
    """Checks the rules between keys."""
    for name, entry in config.evals.items():
        parse_shots(f"config.evals.{name}.shots", entry.shots)
    _check_model(config)
    _check_wandb(config.wandb)
    _check_best_metric(config)
    parse_profile_steps("config.profile_steps", config.profile_steps)
    if not config.num_steps and not config.num_epochs:
        raise UserError("config.num_steps or config.num_epochs must be set, got 0 for both.")
    if config.batch_size % config.recipe.grad_accum_steps:
        raise UserError(
            "config.batch_size must be divisible by config.recipe.grad_accum_steps "
            f"({config.recipe.grad_accum_steps}), got {config.batch_size}."
        )
    _check_recipe(config)
    if config.preprocess.max_shift >= config.image_size:
        raise UserError(
            f"config.preprocess.max_shift must be less than config.image_size "
            f"({config.image_size}), got {config.preprocess.max_shift}."
        )
    patch_size = config.preprocess.permute_patch_size
    if config.preprocess.permute == "patches" and config.image_size % patch_size:
        sizes = [n for n in range(1, config.image_size + 1) if config.image_size % n == 0]
        nearest_size = min(sizes, key=lambda size: abs(size - patch_size))
        raise UserError(
            "config.preprocess.permute_patch_size must divide config.image_size "
            f"({config.image_size}), got {patch_size}. The nearest valid size is {nearest_size}."
        )
    if (config.recipe.mixup or config.recipe.cutmix) and config.batch_size < 2:
        raise UserError(
            f"config.batch_size must be at least 2 with mixup or CutMix, got {config.batch_size}."
        )
    if config.num_steps or config.dataset.num_examples:
        num_steps = resolve_num_steps(config, config.dataset.num_examples)
        check_schedule(config, num_steps)
        check_profile_steps(config, num_steps)


def _check_recipe(config: RunConfig) -> None:
    """Checks the rules of loss, schedule and crop."""
    optimizer, recipe = config.optimizer, config.recipe
    if optimizer.decay_type == "staircase" and not optimizer.decay_fractions:
        raise UserError(
            "config.optimizer.decay_points must be set with config.optimizer.decay_type="
            f"'staircase', got {optimizer.decay_points!r}. For example: 0.3,0.6,0.9"
        )
    if optimizer.cooldown_steps and optimizer.decay_type not in _COOLDOWN_TYPES:
        raise UserError(
            "config.optimizer.cooldown_steps must be 0 with config.optimizer.decay_type="
            f"{optimizer.decay_type!r}, got {optimizer.cooldown_steps}. Cooldown requires "
            f"decay_type {' or '.join(_COOLDOWN_TYPES)}."
        )
    if recipe.min_target and recipe.loss != "sigmoid":
        raise UserError(
            f"config.recipe.min_target must be 0 with config.recipe.loss={recipe.loss!r}, got "
            f"{recipe.min_target}. config.recipe.label_smoothing suits both losses."
        )
    if recipe.class_weights != "none" and recipe.min_target:
        raise UserError(
            "config.recipe.min_target must be 0 with config.recipe.class_weights="
            f"{recipe.class_weights!r}, got {recipe.min_target}. Use config.recipe.label_smoothing."
        )
    if 0 < config.preprocess.resize_size < config.image_size:
        raise UserError(
            f"config.preprocess.resize_size must be 0 or at least config.image_size "
            f"({config.image_size}), got {config.preprocess.resize_size}."
        )


def _check_best_metric(config: RunConfig) -> None:
    """Checks `checkpoint.best_metric`, which an evaluation must log while the run trains."""
    name = config.checkpoint.best_metric
    if config.early_stopping_min_delta and not config.early_stopping_patience:
        raise UserError(
            "config.early_stopping_patience must be at least 1 with "
            f"config.early_stopping_min_delta={config.early_stopping_min_delta:g}, got 0. For "
            "example: --config.early_stopping_patience=5"
        )
    metrics = [
        f"{evaluation}/{metric}"
        for evaluation, entry in config.evals.items()
        for metric in entry.metrics
    ]
    if not name:
        if config.early_stopping_patience:
            fix = f"For example: --config.checkpoint.best_metric={metrics[0]}" if metrics else ""
            raise UserError(
                "config.checkpoint.best_metric must be set with config.early_stopping_patience="
                f"{config.early_stopping_patience}, got ''. {fix or 'Declare an evaluation first.'}"
            )
        return
    if name not in metrics:
        choices = f"one of {', '.join(metrics)}" if metrics else "'' without an evaluation"
        raise UserError(
            f"config.checkpoint.best_metric must be {choices}, got {name!r}."
            f"{suggest(name, metrics)}"
        )
    evaluation = name.rpartition("/")[0]
    if not config.evals[evaluation].every_steps:
        raise UserError(
            f"config.evals.{evaluation}.every_steps must be at least 1 with "
            f"config.checkpoint.best_metric={name!r}, got 0. For example: "
            f"--config.evals.{evaluation}.every_steps=100"
        )


def _check_wandb(project: str) -> None:
    """Raises UserError if Weights & Biases does not allow the name of a project."""
    fix = "The entity is set by the environment variable WANDB_ENTITY."
    if project.lower() in ("true", "false"):
        raise UserError(
            f"config.wandb must be the name of a project, got {project!r}. "
            "For example: --config.wandb=mixer"
        )
    if used := sorted(set(project) & set(_WANDB_RESERVED)):
        raise UserError(
            f"config.wandb must be the name of a project without any of {_WANDB_RESERVED}, "
            f"got {project!r} with {''.join(used)}. {fix}"
        )
    if len(project) > _WANDB_MAX_LENGTH:
        raise UserError(
            f"config.wandb must have at most {_WANDB_MAX_LENGTH} characters, got {len(project)}. "
            "Choose a shorter name."
        )


def _check_model(config: RunConfig) -> None:
    model = config.model
    if model.variant == INIT_FROM:
        if not config.init_from:
            raise UserError(
                f"config.init_from must be set with config.model.variant={INIT_FROM!r}, got ''. "
                "Name a checkpoint, e.g. --config.init_from=Mixer-B_16.npz."
            )
        for name, value in model.overrides.items():
            if value:
                raise UserError(
                    f"config.model.{name} must be {type(value)()!r} with config.model.variant="
                    f"{INIT_FROM!r}, got {value!r}. The architecture is that of config.init_from."
                )
        return
    family = get_family(model.family)
    if model.variant not in (*family.variants, CUSTOM):
        choices = (*family.variants, CUSTOM, INIT_FROM)
        others = (name for name, other in FAMILIES.items() if model.variant in other.variants)
        hint = " or ".join(f"--config.model.family={name}" for name in others)
        raise UserError(
            f"config.model.variant must be one of {', '.join(choices)}, got {model.variant!r}."
            + (f" Set {hint} to use it." if hint else suggest(model.variant, choices))
        )
    family.check_image_size(model.architecture, config.image_size, config.image_size)
    patterns = config.optimizer.freeze_patterns
    check_freeze(patterns, family, model.architecture, config.image_size)
    check_scan_unroll(model.scan_unroll, family.num_blocks(model.architecture))


def check_scan_unroll(scan_unroll: int, num_blocks: int) -> None:
    """Raises UserError if more blocks are to be unrolled than the model has."""
    if scan_unroll > num_blocks:
        raise UserError(
            f"config.model.scan_unroll must be at most the number of blocks ({num_blocks}), "
            f"got {scan_unroll}. 0 unrolls all blocks."
        )


def resolve_num_steps(config: RunConfig, num_examples: int) -> int:
    """Returns the number of training steps: `num_steps`, or the whole batches of `num_epochs`."""
    return config.num_steps or max(1, int(config.num_epochs * num_examples / config.batch_size))


def check_schedule(config: RunConfig, num_steps: int) -> None:
    """Raises UserError if warmup and cooldown are longer than the run."""
    warmup_steps, cooldown_steps = config.optimizer.warmup_steps, config.optimizer.cooldown_steps
    if warmup_steps > num_steps:
        raise UserError(
            f"config.optimizer.warmup_steps must be at most the number of steps ({num_steps}), "
            f"got {warmup_steps}. Lower it or train for longer."
        )
    if cooldown_steps > num_steps - warmup_steps:
        raise UserError(
            f"config.optimizer.cooldown_steps must be at most the {num_steps - warmup_steps} steps "
            f"after warmup, got {cooldown_steps}. Lower it or train for longer."
        )


def check_profile_steps(config: RunConfig, num_steps: int) -> None:
    """Raises UserError if steps are to be profiled that the run does not have."""
    if config.profile_range and config.profile_range[-1] > num_steps:
        raise UserError(
            f"config.profile_steps must be within the steps of the run, 1:{num_steps + 1}, "
            f"got {config.profile_steps!r}."
        )


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns every leaf by its dotted path, in the config's order."""

    def iter_leaves(node: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, ConfigDict):
                yield from iter_leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(iter_leaves(config, ""))


_PATH_WIDTH, _DEFAULT_WIDTH = 35, 14


def format_help() -> str:
    """Formats every key with default, unit, help and choices, by section, for `--help`."""
    width = max(100, shutil.get_terminal_size().columns)
    lines = [f"  {'KEY':<{_PATH_WIDTH - 2}}{'DEFAULT':<{_DEFAULT_WIDTH}}MEANING"]
    top_level = {path: field for path, field in FIELDS.items() if "." not in path}
    lines += ["", "run:"] + [_format_field(*item, width) for item in top_level.items()]
    for name, section in SECTION_TYPES.items():
        lines += ["", f"{name}: {_title(section)}"]
        keys = {path: field for path, field in FIELDS.items() if path.startswith(f"{name}.")}
        lines += [_format_field(path, field, width) for path, field in keys.items()]
    for name, entry in ENTRY_TYPES.items():
        lines += ["", f"{name}: {_title(entry)}"]
        for key, field in NAMED_SECTIONS[name].items():
            lines.append(_format_field(f"{name}.NAME.{key}", field, width))
    return "\n".join(lines)


def _format_field(path: str, field: Field, width: int) -> str:
    indent = _PATH_WIDTH + _DEFAULT_WIDTH
    default = str(field.default).lower() if field.type is bool else str(field.default) or '""'
    start = f"  {path:<{_PATH_WIDTH - 2}}{default} {field.unit}".rstrip()
    choices = f" [{'|'.join(field.choices)}]" if len(field.choices) > 1 else ""
    example = f"; e.g. {field.example}" if field.example and not choices else ""
    lines = textwrap.wrap(field.help + example + choices, width - indent, break_on_hyphens=False)
    if len(start) >= indent:
        lines.insert(0, "")
    return f"\n{' ' * indent}".join([f"{start:<{indent}}{lines[0]}".rstrip(), *lines[1:]])


def _title(section: type) -> str:
    return str(section.__doc__).partition("\n")[0].rstrip(".")
