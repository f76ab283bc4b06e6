"""The parts of the documentation that follow from the code: commands, configs, and config keys.

`docs/site_hooks.py` inserts them when the site is built.
"""

import argparse
import ast
import importlib
import math
import re
import shlex
from collections.abc import Sequence
from unittest import mock

from mixer_jax.__main__ import COMMANDS
from mixer_jax.benchmark import MODES
from mixer_jax.config.config import format_help
from mixer_jax.config.loading import installed_configs
from mixer_jax.config.schema import ENTRY_TYPES, FIELDS, NAMED_SECTIONS, SECTION_TYPES, Field

EMPTY = '""'
_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


_UNITS = {
    "px": "pixels",
    "s": "seconds",
    "min": "minutes",
    "steps": "steps",
    "epochs": "epochs",
    "evaluations": "evaluations",
    "images": "images",
    "batches": "batches",
    "devices": "devices",
}


class _ParserFoundError(Exception):
    """Carries a command's parser out of its main function."""

    def __init__(self, parser: argparse.ArgumentParser):
        super().__init__()
        self.parser = parser


def find_parser(module: str, argv: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """Returns the parser of a command.

    Args:
        module: Name of the command's module, e.g. "predict".
        argv: Arguments that select the parser.
    """
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def stop(
        self: argparse.ArgumentParser,
        args: list[str] | None = None,
        namespace: argparse.Namespace | None = None,
    ) -> tuple[argparse.Namespace, list[str]]:
        # Parsers without --help select the parser of the command.
        if self.add_help:
            raise _ParserFoundError(self)
        return parse_known_args(self, args, namespace)

    main = importlib.import_module(f"mixer_jax.{module}").main
    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop):
        try:
            main(list(argv))
        except _ParserFoundError as found:
            return found.parser
    raise ValueError(f"mixer_jax.{module} must parse its arguments.")


def format_commands() -> str:
    """Formats every command with all of its arguments."""
    parts = []
    for name, module, description in COMMANDS:
        parts.append(f"## {name} {{ #{name} }}\n")
        if module == "benchmark":
            parts.append(f"{_sentence(description)}\n")
            parts += [_format_mode(modes) for modes in _modes()]
            continue
        parser = find_parser(module)
        parts.append(_format_parser(parser, name, f"mixer-jax {name}"))
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command, subparser in action.choices.items():
                    anchor = f"{name}-{command}"
                    parts.append(f"### {name} {command} {{ #{anchor} }}\n")
                    parts.append(_format_parser(subparser, anchor, f"mixer-jax {name} {command}"))
    return "\n".join(parts)


def _modes() -> list[str]:
    """Lists the modes of the benchmark; those of one module are combined."""
    modules: dict[str, list[str]] = {}
    for mode, module in MODES.items():
        modules.setdefault(module, []).append(mode)
    return [",".join(modes) for modes in modules.values()]


def _format_mode(modes: str) -> str:
    parser = find_parser("benchmark", (f"--mode={modes}",))
    anchor = f"benchmark-{modes.replace(',', '-')}"
    title = f"### benchmark --mode={modes} {{ #{anchor} }}\n\n"
    return title + _format_parser(parser, anchor, f"mixer-jax benchmark --mode={modes}")


def _format_parser(parser: argparse.ArgumentParser, anchor: str, command: str) -> str:
    """Formats a parser: its description, usage, arguments and epilog."""
    actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
    positional = [_metavar(action) for action in actions if not action.option_strings]
    required = [_usage(action) for action in actions if action.option_strings and action.required]
    usage = " ".join([command, *required, "[FLAG …]" if len(actions) > len(positional) else ""])
    text = f"{parser.description}\n\n" if parser.description else ""
    text += f"```text\n{' '.join([usage.strip(), *positional])}\n```\n\n"
    for action in actions:
        if not isinstance(action, argparse._SubParsersAction):
            text += _format_action(action, anchor)
    if parser.epilog:
        epilog = parser.epilog.replace(format_help(), "see the page Config keys").strip()
        text += f"\n```text\n{epilog}\n```\n"
    return text


def _metavar(action: argparse.Action) -> str:
    if isinstance(action, argparse._SubParsersAction):
        return "COMMAND"
    name = str(action.metavar or action.dest.upper())
    return {"?": f"[{name}]", "*": f"[{name} …]"}.get(str(action.nargs), name)


def _usage(action: argparse.Action) -> str:
    if not action.option_strings or action.nargs == 0:
        return "|".join(action.option_strings) or _metavar(action)
    value = action.metavar or action.dest.upper()
    return f"{action.option_strings[-1]}={value}"


def _format_action(action: argparse.Action, anchor: str) -> str:
    """Formats one argument as an entry with an anchor."""
    name = re.sub(r"\W+", "_", (action.option_strings or [_metavar(action)])[-1]).strip("_")
    facts = ["required"] if action.required and action.option_strings else []
    if action.choices:
        facts.append("one of " + ", ".join(f"`{choice}`" for choice in action.choices))
    is_plain = isinstance(action.default, str | int | float) and action.default is not False
    if is_plain and action.nargs != 0 and action.default and "default" not in str(action.help):
        facts.append(f"default `{action.default}`")
    return _entry(
        _usage(action),
        f"{anchor}-{name.lower()}",
        facts,
        _sentence(action.help or "", tuple(map(str, action.choices or ()))),
    )


def format_configs() -> str:
    """Formats a table of the configs that are installed, each with a link to its file."""
    rows = ["| config | purpose |", "|---|---|"]
    for path in sorted(installed_configs().glob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if not docstring:
            raise ValueError(f"{path} must have a docstring.")
        purpose = docstring.partition("\n")[0]
        rows.append(f"| [`{path.stem}`](../../configs/{path.name}) | {purpose} |")
    return "\n".join(rows)


def format_config_keys() -> str:
    """Formats every config key, by section."""
    top_level = {path: field for path, field in FIELDS.items() if "." not in path}
    text = "## Run { #run }\n\n" + _format_fields(top_level)
    for name, section in SECTION_TYPES.items():
        keys = {path: field for path, field in FIELDS.items() if path.startswith(f"{name}.")}
        text += f"## {name} {{ #{name} }}\n\n{_first_line(section)}\n\n" + _format_fields(keys)
    for name, entry in ENTRY_TYPES.items():
        keys = {f"{name}.NAME.{key}": field for key, field in NAMED_SECTIONS[name].items()}
        text += f"## {name} {{ #{name} }}\n\n{_first_line(entry)}\n\n" + _format_fields(keys)
    return text


def _format_fields(fields: dict[str, Field]) -> str:
    return "".join(
        _entry(
            path,
            path.replace(".", "-").lower(),
            _field_facts(field),
            _sentence(field.help, field.choices) + _format_example(path, field),
        )
        for path, field in fields.items()
    )


def _format_example(path: str, field: Field) -> str:
    if not field.example:
        return ""
    return f" Example: `--config.{path}={shlex.quote(field.example)}`."


def _field_facts(field: Field) -> list[str]:
    """Lists type, default, allowed values and whether a resumed run may change a key."""
    if len(field.choices) > 1:
        facts = ["one of " + ", ".join(f"`{choice or EMPTY}`" for choice in field.choices)]
    else:
        facts = [_TYPES[field.type] + (f" in {_UNITS[field.unit]}" if field.unit else "")]
    default = str(field.default).lower() if field.type is bool else str(field.default) or EMPTY
    facts.append(f"default `{default}`")
    if field.max < math.inf:
        facts.append(f"from {field.min:g} to {field.max:.10g}")
    elif field.min > -math.inf:
        facts.append(f"at least {field.min:g}")
    return facts + (["may change when a run is resumed"] if field.resumable else [])


def _entry(name: str, anchor: str, facts: Sequence[str], meaning: str) -> str:
    """Formats one key or argument: a heading, its facts, and its meaning."""
    text = f"#### `{name}` {{ #{anchor} .entry }}\n\n"
    if facts:
        text += "; ".join(facts)[:1].upper() + "; ".join(facts)[1:] + ".\n{ .facts }\n\n"
    return text + f"{meaning}\n\n"


def _sentence(text: str, choices: Sequence[str] = ()) -> str:
    """Returns a help text as a sentence, with identifiers as they are."""
    text = re.sub(r"([<*])", r"\\\1", text)
    text = re.sub(r"(--[\w.]+(=[^\s,;]*\w)?)", r"`\1`", text)
    first = re.match(r"[a-z]+(-[a-z]+)*(?=[ ,;.]|$)|default(?=:)", text)
    # "muon, adafactor: …" starts with values of another key.
    starts_with_values = re.match(r"\w+(, \w+)+:", text)
    if first and first[0] not in choices and not starts_with_values:
        text = text[0].upper() + text[1:]
    return text if text.endswith((".", "!")) else f"{text}."


def _first_line(section: type) -> str:
    return str(section.__doc__).partition("\n")[0]
