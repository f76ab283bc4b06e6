"""Configurations: made from the keys of keys.py, flattened, described, and checked.

A file in configs/ starts from `get_default()` and changes what differs; `--config.KEY=VALUE` on the
command line (see command_line.py) changes it once more; `validate()` then checks the whole before a
device is touched.
"""

import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from mixer_jax.config.compat import RENAMED_VALUES, upgrade_config, upgrade_key
from mixer_jax.config.schema import FIELDS, NAMED_SECTIONS
from mixer_jax.errors import UserError, suggest
from mixer_jax.models.family import INIT_FROM
from mixer_jax.models.mixer_config import MixerConfig, check_image_size, get_config

TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def get_default() -> ConfigDict:
    """Returns a locked config with every key at its default, no evaluations and no mixture."""
    return ConfigDict(fill_defaults({}) | {section: {} for section in NAMED_SECTIONS}).lock()


def fill_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of a saved config with every key that it lacks at its default.

    Before a key existed, runs did what is its default now. Old spellings of keys and values are
    translated. No entry is added to evals or mixture.
    """
    tree = upgrade_config(saved)
    for path, key in FIELDS.items():
        *sections, name = path.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node.setdefault(name, key.default)
    for section, declared in NAMED_SECTIONS.items():
        for entry in tree.get(section, {}).values():
            for name, key in declared.items():
                entry.setdefault(name, key.default)
    return tree


def evals(**splits: dict[str, Any]) -> ConfigDict:
    """Returns a value for `config.evals`, e.g. `evals(test=dict(split="test", every_steps=100))`.

    Raises:
        UserError: an entry has a key that `EVAL_KEYS` lacks.
    """
    return _entries("evals", splits)


def mixture(**parts: dict[str, Any]) -> ConfigDict:
    """Returns a value for `config.mixture`, e.g. `mixture(i1k=dict(dataset="imagenet2012"), …)`.

    Raises:
        UserError: an entry has a key that `MIXTURE_KEYS` lacks.
    """
    return _entries("mixture", parts)


def _entries(section: str, given: dict[str, dict[str, Any]]) -> ConfigDict:
    declared = NAMED_SECTIONS[section]
    entries = {}
    for name, values in given.items():
        for key in values:
            check_key_exists(f"{section}.{name}.{key}", [f"{section}.{name}.{k}" for k in declared])
        entries[name] = {key: values.get(key, spec.default) for key, spec in declared.items()}
    return ConfigDict(entries).lock()


def validate(config: ConfigDict) -> None:
    """Checks types, ranges and the rules between keys; touches no device and no disk.

    Raises:
        UserError: the first rule broken, naming key, value and fix.
    """
    values = flatten(config)
    for section in NAMED_SECTIONS:
        if section not in config:
            raise UserError(f"config.{section} is missing; start from config.get_default()")
    for path, value in values.items():
        _check_value(path, value)
    entries = [
        f"{section}.{name}.{key}"
        for section, declared in NAMED_SECTIONS.items()
        for name in config[section]
        for key in declared
    ]
    for path in [*FIELDS, *entries]:
        if path not in values:
            raise UserError(
                f"config.{path} is missing; start from config.get_default(), config.evals() and "
                "config.mixture()"
            )
    for name, entry in config.evals.items():
        parse_shots(f"evals.{name}.shots", entry.shots)
    _check_model(config)
    if not config.num_steps and not config.num_epochs:
        raise UserError("config.num_steps=0 and config.num_epochs=0; set one of them")
    if config.batch_size % config.recipe.grad_accum_steps:
        raise UserError(
            f"config.batch_size={config.batch_size} is not divisible by "
            f"config.recipe.grad_accum_steps={config.recipe.grad_accum_steps}; "
            "choose a divisor of the batch"
        )
    if config.preprocess.max_shift >= config.image_size:
        raise UserError(
            f"config.preprocess.max_shift={config.preprocess.max_shift} moves the whole image out "
            f"of sight; pass less than config.image_size={config.image_size}"
        )
    if config.recipe.mixup and config.batch_size < 2:
        raise UserError("config.recipe.mixup needs a partner; set config.batch_size to 2 or more")
    if config.num_steps or config.dataset.num_examples:
        check_warmup(config, resolve_num_steps(config, config.dataset.num_examples))


def parse_shots(path: str, text: str) -> tuple[int, ...]:
    """Returns the numbers of images a class that a key such as "1,5,10,25" lists.

    Args:
        path: of the key, for the error.
        text: its value.

    Raises:
        UserError: it is no such list.
    """
    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isascii() and number.isdigit() and int(number) for number in numbers):
        raise UserError(
            f"config.{path}={text!r} is no list of whole numbers above zero; pass e.g. 1,5,10,25"
        )
    return tuple(dict.fromkeys(map(int, numbers)))


def resolve_num_steps(config: ConfigDict, num_examples: int) -> int:
    """Returns the number of training steps: `num_steps`, or whole batches in `num_epochs`."""
    return config.num_steps or max(1, int(config.num_epochs * num_examples / config.batch_size))


def check_warmup(config: ConfigDict, num_steps: int) -> None:
    """Raises UserError if warmup would outlast the run."""
    warmup = config.optimizer.warmup_steps
    if warmup > num_steps:
        raise UserError(
            f"config.optimizer.warmup_steps={warmup} is more than the run's {num_steps} steps; "
            "lower it or train for longer"
        )


def architecture_overrides(model: ConfigDict) -> dict[str, int]:
    """Returns the five width keys of the model section, as `get_config` takes them."""
    names = ("num_blocks", "patch_size", "hidden_dim", "tokens_mlp_dim", "channels_mlp_dim")
    return {name: model[name] for name in names}


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns every leaf by its dotted path, in the config's order."""

    def leaves(node: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, ConfigDict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(leaves(config, ""))


def format_help() -> str:
    """Returns every key with default and meaning, for `--help`."""
    lines = [f"  {path}={key.default!r:<22} {key.meaning}" for path, key in FIELDS.items()]
    lines += [
        f"  {section}.NAME.{name}={key.default!r:<9} {key.meaning}"
        for section, declared in NAMED_SECTIONS.items()
        for name, key in declared.items()
    ]
    return "\n".join(lines)


def check_key_exists(path: str, known: list[str]) -> None:
    """Raises UserError, with the nearest known key, if `path` is not one of `known`."""
    if path not in known:
        if (renamed := upgrade_key(path)) != path:
            raise UserError(f"config.{path} is now config.{renamed}")
        hint = suggest(path, known, otherwise="; --help lists them all")
        section = path.partition(".")[0]
        if section in NAMED_SECTIONS and not any(key.startswith(f"{section}.") for key in known):
            hint = f"; a config file declares its {section}, and this one has none"
        raise UserError(f"config.{path} is no configuration key{hint}")


def _check_model(config: ConfigDict) -> None:
    overrides = architecture_overrides(config.model)
    if config.model.variant == INIT_FROM:
        if not config.init_from:
            raise UserError(
                f"config.model.variant={INIT_FROM!r} takes the model from config.init_from, which "
                "is empty; name weights, e.g. --config.init_from=Mixer-B_16.npz"
            )
        for name, value in overrides.items():
            if value:
                raise UserError(
                    f"config.model.{name}={value} has no say with config.model.variant="
                    f"{INIT_FROM!r}; leave it 0"
                )
        return
    widths = get_config(config.model.variant, **overrides)
    check_image_size(config.image_size, config.image_size, widths.patch_size)
    check_unroll(config, widths)


def check_unroll(config: ConfigDict, widths: MixerConfig) -> None:
    """Raises UserError if the model has fewer blocks than are to be laid out."""
    if config.model.scan_unroll > widths.num_blocks:
        raise UserError(
            f"config.model.scan_unroll={config.model.scan_unroll} is more than the model's "
            f"{widths.num_blocks} blocks; pass 1 to {widths.num_blocks}, or 0 for all"
        )


def _check_value(path: str, value: Any) -> None:
    declared, prefix = FIELDS, ""
    if (section := path.partition(".")[0]) in NAMED_SECTIONS:
        declared, prefix = NAMED_SECTIONS[section], f"{path.rpartition('.')[0]}."
    check_key_exists(path, [prefix + name for name in declared])
    key = declared[path.removeprefix(prefix)]
    kind = type(key.default)
    if type(value) is not kind:
        raise UserError(f"config.{path}={value!r} is not {TYPE_NAMES[kind]}; change it to one")
    if key.choices and value not in key.choices:
        if renamed := RENAMED_VALUES.get(path, {}).get(value):
            raise UserError(f"config.{path}={value!r} is now {renamed!r}")
        raise UserError(f"config.{path}={value!r} is unknown; choose {' or '.join(key.choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config.{path}={value} is not finite; pass a finite number")
    if isinstance(value, int | float) and not key.low <= value <= key.high:
        raise UserError(
            f"config.{path}={value!r} is out of range; pass {key.low:g} to {key.high:.10g}"
            if key.high < math.inf
            else f"config.{path}={value!r} is out of range; pass {key.low:g} or more"
        )
