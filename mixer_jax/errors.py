"""Exceptions that commands turn into one line and an exit code."""

import difflib
import signal
from collections.abc import Iterable

_MAX_REASON = 200


class UserError(ValueError):
    """Usage error: one line with the value, the rule it breaks, and the fix.

    Commands (`python -m mixer_jax.*`) print it without a stack trace and exit with code 2.
    """


class DatasetNotPreparedError(UserError):
    """A dataset that has not been prepared.

    Attributes:
        hint: Command that prepares it, in one line.
    """

    def __init__(self, message: str, hint: str):
        super().__init__(message)
        self.hint = hint


class OutputWriteError(UserError):
    """A result cannot be written, so that continuing would be pointless."""


class RunError(RuntimeError):
    """Failure that is not a usage error; commands exit with code 1."""


class NonFiniteError(RunError):
    """Loss or parameters have become NaN or infinite on all hosts; a retry fails as well."""


def exit_code(error: BaseException) -> int:
    """Returns the exit code of a command that ends with an error: 2 means "do not retry"."""
    if isinstance(error, UserError):
        return 2
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 1


def summarize_error(error: Exception) -> str:
    """Shortens the message of another library's exception to one line of moderate length."""
    text = " ".join(str(error).split())[:_MAX_REASON]
    return text.rstrip(".") or type(error).__name__


def nearest(name: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Finds the choice that is most similar to an unknown name, ignoring case, if any is.

    Args:
        name: Unknown name.
        choices: Known names.
        cutoff: Smallest similarity, between 0 and 1.
    """
    folded = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=cutoff)
    return folded[matches[0]] if matches else None


def suggest(name: str, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """Formats the question that ends a message about an unknown name; empty if none is similar.

    Args:
        name: Unknown name.
        choices: Known names.
        cutoff: Smallest similarity, between 0 and 1.
    """
    match = nearest(name, choices, cutoff)
    return f" Did you mean {match}?" if match else ""
