"""Checks of text line by line, by the names and values that a line mentions."""

from collections.abc import Sequence

from tests.helpers.messages import mentions


def some_line_mentions(text: str, *parts: str) -> bool:
    """Returns whether some line mentions all parts."""
    return any(mentions(line, *parts) for line in text.splitlines())


def each_mentions(lines: Sequence[str], *parts_of_each: tuple[str, ...]) -> bool:
    """Returns whether there are as many lines as lists of parts, and each mentions its parts."""
    return len(lines) == len(parts_of_each) and all(map(_mentions_all, lines, parts_of_each))


def _mentions_all(line: str, parts: tuple[str, ...]) -> bool:
    return mentions(line, *parts)
