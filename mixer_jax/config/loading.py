"""Configs from Python files, and keys that the command line changes."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from mixer_jax.config.compat import renamed_key_hint
from mixer_jax.config.config import TYPE_NAMES, check_key_exists, flatten
from mixer_jax.config.schema import FIELDS, NAMED_SECTIONS
from mixer_jax.errors import UserError, suggest

# Keys by dotted path, each with the value that a text spells.
Overrides = tuple[tuple[str, str], ...]


def load_config_with_overrides(config_spec: str, arguments: Sequence[str]) -> ConfigDict:
    """Returns the config of a file with the overrides of the command line applied.

    Args:
        config_spec: as `load_config` takes it.
        arguments: as `parse_overrides` takes them.

    Raises:
        UserError: an argument is none, or names no key, or gives no value of its type.
    """
    config = load_config(config_spec)
    for path, text in parse_overrides(arguments):
        set_override(config, path, text)
    return config


def parse_overrides(arguments: Sequence[str]) -> Overrides:
    """Returns the keys that a command line changes.

    Args:
        arguments: that the door itself did not know; each `--config.KEY=VALUE`, or `--config.KEY`
            followed by `VALUE`.

    Raises:
        UserError: an argument is not of this form.
    """
    overrides = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--config."):
            raise UserError(f"argument {argument!r} is unknown; see --help")
        path, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals:
            if not rest:
                raise UserError(f"argument {argument!r} has no value; write {argument}=VALUE")
            text = rest.pop(0)
        overrides.append((path, text))
    return tuple(overrides)


def load_config(config_spec: str) -> ConfigDict:
    """Returns what `get_config` of a config file gives.

    Args:
        config_spec: `PATH.py`, or `PATH.py:ARGUMENT` to call `get_config(ARGUMENT)`.

    Raises:
        UserError: no such file, no `get_config` in it, or it does not take this argument.
    """
    path, argument = _split_config_spec(config_spec)

    def get_config(module: ModuleType) -> Any:
        return module.get_config(argument) if argument else module.get_config()

    config = exec_config_file(path, get_config, "config", config_spec)
    if not isinstance(config, ConfigDict):
        raise UserError(f"config file {config_spec!r}: get_config() must return a ConfigDict")
    return config


def exec_config_file(
    path: Path, use: Callable[[ModuleType], Any], kind: str, name: str = ""
) -> Any:
    """Runs a user's Python file; returns what `use` makes of it.

    Args:
        path: of the file.
        use: from the module that the file is.
        kind: of file, for messages: "config", "suite".
        name: for messages; empty: the path.

    Raises:
        UserError: no such file, or it fails.
    """
    what = f"{kind} file {(name or str(path))!r}"
    if not path.is_file():
        siblings = sorted(str(p) for p in path.parent.glob("*.py"))
        hint = suggest(str(path), siblings)
        raise UserError(f"{kind} file {str(path)!r} does not exist{hint}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{kind} file {str(path)!r} is no Python file; name one ending in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return use(module)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:
        # It is the user's code: whatever it raises is theirs to read, in one line.
        reason = str(error).partition("\n")[0] or "no reason given"
        hint = renamed_key_hint(reason)
        raise UserError(f"{what} fails: {type(error).__name__}: {reason}{hint}") from error


def default_run_name(config_spec: str) -> str:
    """Returns the name of a config: `configs/digits.py:low` is "digits_low"."""
    path, argument = _split_config_spec(config_spec)
    return f"{path.stem}_{argument}" if argument else path.stem


def set_override(config: ConfigDict, path: str, text: str) -> None:
    """Sets the key `path`, e.g. "optimizer.learning_rate", to the value that `text` spells.

    Raises:
        UserError: the key does not exist, or the text is not of the key's type.
    """
    present = flatten(config)
    entries = [key for key in present if key.partition(".")[0] in NAMED_SECTIONS]
    check_key_exists(path, [*FIELDS, *entries])
    if path not in present:
        raise UserError(f"config.{path} is missing; start from config.get_default()")
    *sections, name = path.split(".")
    node = config
    for section in sections:
        node = node[section]
    node[name] = _parse_value(path, text, type(node[name]))


def _parse_value(path: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise UserError(f"config.{path}={text!r} is not {TYPE_NAMES[kind]}; pass one") from None


def _split_config_spec(config_spec: str) -> tuple[Path, str]:
    path, _, argument = config_spec.partition(":")
    return Path(path), argument
