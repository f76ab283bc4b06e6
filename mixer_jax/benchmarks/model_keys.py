"""Keys of the model whose values may be compared: `--model.KEY=VALUE,VALUE`."""

import argparse
import dataclasses
from typing import Any

from mixer_jax.config.schema import FIELDS, Field
from mixer_jax.errors import UserError
from mixer_jax.models.mixer_config import MixerConfig

# Given by flags of their own, or by the variant.
_NOT_HERE = {"family", "variant", "dtype", "scan_unroll", "remat"} | {
    w.name for w in dataclasses.fields(MixerConfig)
}


def add_model_keys(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every key of the model that has none of its own."""
    for name, key in _keys().items():
        parser.add_argument(
            f"--model.{name}", metavar="VALUE[,VALUE]", help=f"of ours, to compare: {key.help}"
        )


def read_model_keys(known: argparse.Namespace) -> dict[str, list[Any]]:
    """Returns the values asked for, by key.

    Raises:
        UserError: a value is not of its key's type or range, or there twice.
    """
    found: dict[str, list[Any]] = {}
    for name, key in _keys().items():
        text = getattr(known, f"model.{name}")
        if text is not None:
            found[name] = [_read(name, key, part) for part in text.split(",")]
            if len(set(found[name])) < len(found[name]):
                raise UserError(f"--model.{name}={text} names something twice; name each once")
    return found


def _keys() -> dict[str, Field]:
    keys = {
        path.removeprefix("model."): k for path, k in FIELDS.items() if path.startswith("model.")
    }
    return {name: key for name, key in keys.items() if name not in _NOT_HERE}


def _read(name: str, key: Field, text: str) -> Any:
    kind = type(key.default)
    try:
        value = {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        value = None
    if key.choices and value not in key.choices:
        raise UserError(
            f"--model.{name}={text}: {text!r} is unknown; choose of {', '.join(key.choices)}"
        )
    if value is None or (isinstance(value, (int, float)) and not key.min <= value <= key.max):
        raise UserError(f"--model.{name}={text} is no value of this key: {key.help}")
    return value
