"""Config files, and overrides on the command line.

A config file is found in the working directory, or else among those that are installed with the
package: `configs/digits.py`, or its name alone, `digits`.

The syntax is that of ml_collections.config_flags: `--config=FILE:ARGUMENT`, `--config.KEY=VALUE`,
`--config.KEY VALUE`, and for booleans `--config.KEY` and `--noconfig.KEY`. The parser is our own:
errors are one line, with the nearest key, and commands need neither absl's flags nor its app.
"""

import importlib.util
import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from mixer_jax.config.compat import renamed_key_hint
from mixer_jax.config.config import check_key_exists, flatten, nearest_key
from mixer_jax.config.schema import BOOLEANS, FIELDS, NAMED_SECTIONS, Field, get_field
from mixer_jax.errors import UserError, nearest

_PACKAGE = Path(__file__).parents[1]
# Folder of configs in a checkout, and the same folder as an installed package has it.
_CHECKOUT_CONFIGS, _INSTALLED_CONFIGS = _PACKAGE.parent / "configs", _PACKAGE / "configs"
# Dotted paths of keys, each with its value as text.
Overrides = tuple[tuple[str, str], ...]


def load_config_with_overrides(
    config_spec: str, argv: Sequence[str], flags: Iterable[str] = ()
) -> ConfigDict:
    """Loads a config file and applies the overrides of the command line.

    See `load_config` and `parse_overrides` for the arguments.

    Raises:
        UserError: The file or an override is invalid.
    """
    config = load_config(config_spec)
    for path, text in parse_overrides(argv, flags):
        set_override(config, path, text)
    return config


def parse_overrides(argv: Sequence[str], flags: Iterable[str] = ()) -> Overrides:
    """Parses the arguments that change keys.

    Args:
        argv: Arguments that the command did not recognize: `--config.KEY=VALUE`, `--config.KEY
            VALUE`, or for booleans `--config.KEY` and `--noconfig.KEY`.
        flags: Names of the command's flags, which messages suggest.

    Raises:
        UserError: An argument has another form.
    """
    overrides = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        match = re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if not match:
            raise UserError(f"unknown argument {argument!r}. {_suggest_flag(argument, flags)}")
        negated, path, text = match.groups()
        field = get_field(path)
        is_boolean = field is not None and field.type is bool
        if negated:
            if not is_boolean or text is not None:
                raise UserError(f"argument {argument!r} must name a boolean key, without a value.")
            text = "false"
        elif text is None:
            if is_boolean and (not rest or rest[0].lower() not in BOOLEANS):
                text = "true"
            elif rest:
                text = rest.pop(0)
            else:
                raise UserError(f"argument {argument!r} has no value. Write {argument}=VALUE.")
        overrides.append((path, text))
    return tuple(overrides)


def _suggest_flag(argument: str, flags: Iterable[str]) -> str:
    """Formats the hint of a message about an unknown argument."""
    name = argument.partition("=")[0].removeprefix("--")
    if name and argument.startswith("--"):
        if match := nearest(name, flags, 0.8):
            return f"Did you mean --{match}?"
        if key := nearest_key(name, [*FIELDS]):
            return f"Did you mean --config.{key}?"
    return "See --help."


def load_config(
    config_spec: str | os.PathLike, overrides: Mapping[str, Any] | None = None
) -> ConfigDict:
    """Calls `get_config` of a config file.

    Args:
        config_spec: Path or name of a config: "digits" is digits.py or configs/digits.py in the
            working directory, or else the config of this name that comes with mixer_jax;
            "digits:low" calls `get_config("low")`.
        overrides: Values by dotted key, such as `{"optimizer.learning_rate": 3e-3}`.

    Raises:
        UserError: The file does not exist or fails, has no `get_config`, or the latter does not
            take the argument; or a key of `overrides` does not exist, or its value is invalid.
    """
    if not isinstance(config_spec, str | os.PathLike):
        raise UserError(f"config must be the name or path of a config, got {config_spec!r}.")
    config_spec = os.fspath(config_spec)
    path, argument = _split_config_spec(config_spec)

    def get_config(module: ModuleType) -> Any:
        return module.get_config(argument) if argument else module.get_config()

    config = exec_config_file(find_config_file(path), get_config, "config", config_spec)
    if not isinstance(config, ConfigDict):
        raise UserError(f"config file {config_spec!r}: get_config() must return a ConfigDict.")
    apply_overrides(config, overrides or {})
    return config


def find_config_file(path: str) -> Path:
    """Finds a config file in the working directory, or else among the installed ones.

    Args:
        path: Path of the file, or the name of a config: `digits` is `digits.py` or
            `configs/digits.py` in the working directory, or the installed `configs/digits.py`.

    Raises:
        UserError: The file does not exist.
    """
    given = Path(path)
    if not given.name:
        raise UserError(f"config file must be a Python file, such as digits.py, got {path!r}.")
    has_suffix = given.suffix == ".py"
    file = given if has_suffix else given.with_name(f"{given.name}.py")
    is_name = file.parent == Path()
    candidates = [file]
    if is_name and not has_suffix:
        candidates.append("configs" / file)
    if is_name or file.parent == Path("configs"):
        candidates.append(installed_configs() / file.name)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if given.is_file():
        raise UserError(f"config file must be a Python file ending in .py, got {path!r}.")
    folders = {candidate.parent for candidate in candidates}
    # By name: a long path of the folder would make all of its files similar.
    names = {sibling.stem for folder in folders for sibling in folder.glob("*.py")}
    match = nearest(file.stem, sorted(names), cutoff=0.7)
    if match and has_suffix:
        hint = f" Did you mean {file.with_name(f'{match}.py')}?"
    elif match:
        hint = f" Did you mean {given.with_name(match)}?"
    elif installed_configs().is_dir():
        hint = f" The configs that come with mixer_jax are in {installed_configs()}."
    else:
        hint = " This installation has no configs: copy the folder configs of the source code."
    raise UserError(f"config file {path!r} does not exist.{hint}")


def installed_configs() -> Path:
    """Returns the folder of the configs that come with this installation, or with the checkout."""
    # An installed package always has the folder; next to it are packages of other projects.
    return _INSTALLED_CONFIGS if _INSTALLED_CONFIGS.is_dir() else _CHECKOUT_CONFIGS


def exec_config_file(
    path: Path, extract: Callable[[ModuleType], Any], file_type: str, name: str = ""
) -> Any:
    """Executes a user's Python file and extracts a value from it.

    Args:
        path: Python file.
        extract: Function from the module to the value.
        file_type: Type of file for messages: "config" or "suite".
        name: Name for messages; the path by default.

    Raises:
        UserError: The file does not exist, or it fails.
    """
    source = f"{file_type} file {(name or str(path))!r}"
    if not path.is_file():
        # By name: a long path of the folder would make all of its files similar.
        siblings = sorted(sibling.name for sibling in path.parent.glob("*.py"))
        match = nearest(path.name, siblings, cutoff=0.7)
        hint = f" Did you mean {path.with_name(match)}?" if match else ""
        raise UserError(f"{file_type} file {str(path)!r} does not exist.{hint}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{file_type} file must be a Python file ending in .py, got {str(path)!r}.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return extract(module)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except (Exception, SystemExit) as error:
        # The user's code may raise anything; all of it becomes one line.
        reason = str(error).partition("\n")[0] or "no reason given"
        hint = renamed_key_hint(reason)
        raise UserError(
            f"{source} fails: {type(error).__name__}: {reason.rstrip('.')}.{hint}"
        ) from error


def default_run_name(config_spec: str) -> str:
    """Returns the name of a run: that of `configs/digits.py:low` is "digits_low"."""
    path, argument = _split_config_spec(config_spec)
    name = Path(path).name.removesuffix(".py")
    return f"{name}_{argument}" if argument else name


def set_override(config: ConfigDict, path: str, text: str) -> None:
    """Sets a key, such as "optimizer.learning_rate", to the value in `text`.

    Raises:
        UserError: The key does not exist, or the text does not have its type.
    """
    _set_value(config, path, _find_field(config, path).parse(f"config.{path}", text))


def apply_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> None:
    """Sets keys to Python values, also to numbers of NumPy.

    Args:
        config: Config that is changed.
        overrides: Values by dotted key, such as `{"optimizer.learning_rate": 3e-3}`.

    Raises:
        UserError: A key does not exist, or a value has another type, is out of range or is not one
            of the key's choices.
    """
    if not isinstance(overrides, Mapping):
        raise UserError(
            'overrides must be a dict of values by dotted key, such as {"optimizer.learning_rate": '
            f"3e-3}}, got {overrides!r}."
        )
    for path, value in overrides.items():
        if not isinstance(path, str):
            raise UserError(f"overrides must have dotted keys, such as 'seed', got {path!r}.")
        field = _find_field(config, path)
        # Numbers of NumPy, and integers where a number is expected.
        accepted = {int: numbers.Integral, float: numbers.Real}.get(field.type)
        if accepted and isinstance(value, accepted) and not isinstance(value, bool):
            value = field.type(value)
        field.check(f"config.{path}", value)
        _set_value(config, path, value)


def _find_field(config: ConfigDict, path: str) -> Field:
    """Looks up the declaration of a key that a config has."""
    present = flatten(config)
    entries = [key for key in present if key.partition(".")[0] in NAMED_SECTIONS]
    check_key_exists(path, [*FIELDS, *entries])
    if path not in present:
        raise UserError(f"config.{path} is missing. Start from config.get_default().")
    field = get_field(path)
    assert field is not None
    return field


def _set_value(config: ConfigDict, path: str, value: Any) -> None:
    *sections, name = path.split(".")
    node = config
    for section in sections:
        node = node[section]
    node[name] = value


def _split_config_spec(config_spec: str) -> tuple[str, str]:
    path, _, argument = config_spec.partition(":")
    return path, argument
