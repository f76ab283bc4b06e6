"""Checks of messages by the names and values they mention, not by their wording."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

Kind = TypeVar("Kind", bound=BaseException)


def mentions(text: str, *parts: str) -> bool:
    """Returns whether all parts occur in the text as whole words, in any order.

    "16" occurs in "16.", "(16)" and "size=16", but not in "160", "1.16" or "16.5". Thousands
    separators are ignored: "1200" occurs in "1,200", and the reverse.
    """
    return not _missing(text, parts)


@contextmanager
def raises(kind: type[Kind], *parts: str) -> Iterator[pytest.ExceptionInfo[Kind]]:
    """Fails unless the block raises an exception of this kind that mentions all parts."""
    __tracebackhide__ = True
    with pytest.raises(kind) as caught:
        yield caught
    missing = _missing(str(caught.value), parts)
    if missing:
        pytest.fail(f"{kind.__name__} does not mention {missing}: {str(caught.value)!r}")


def _missing(text: str, parts: tuple[str, ...]) -> list[str]:
    plain = _without_separators(text)
    return [part for part in parts if not re.search(_whole_word(part), plain)]


def _whole_word(part: str) -> str:
    plain = _without_separators(part)
    before = r"(?<!\d[.,])" if plain[0].isdigit() else ""
    after = r"(?![.,]\d)" if plain[-1].isdigit() else ""
    if re.match(r"\w", plain[0]):
        before += r"(?<!\w)"
    if re.match(r"\w", plain[-1]):
        after += r"(?!\w)"
    return before + re.escape(plain) + after


def _without_separators(text: str) -> str:
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
