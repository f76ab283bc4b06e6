"""Exceptions that commands turn into one line and an exit code."""

import difflib
import signal

_MAX_REASON = 200


class UserError(ValueError):
    """Usage error: one line with the value, the rule it breaks, and the fix.

    Commands (`python -m mixer_jax.*`) print it without a stack trace and exit with code 2.
    """


class DatasetNotPreparedError(UserError):
    """A data set that has not been prepared.

    Attributes:
        hint: How to prepare it, in one line.
    """

    def __init__(self, message: str, hint: str):
        super().__init__(message)
        self.hint = hint


class OutputWriteError(UserError):
    """A result cannot be written, so that continuing would be pointless."""


class RunError(RuntimeError):
    """Failure that is not a usage error; commands exit with code 1."""


class NonFiniteError(RunError):
    """Loss or parameters are no longer finite, on every host; a retry fails as well."""


def exit_code(error: BaseException) -> int:
    """Returns the exit code of a command that ends with an error: 2 means "do not retry"."""
    if isinstance(error, UserError):
        return 2
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 1


def summarize_error(error: Exception) -> str:
    """Shortens the message of another library's exception to one line of moderate length."""
    return " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__


def suggest(value: str, choices: list[str], fallback: str = "") -> str:
    """Formats the end of a message about an unknown name: the most similar choice, if any.

    Args:
        value: Unknown name; the parts of a key are separated by dots.
        choices: Known names.
        fallback: Result if no choice is similar.
    """
    section, _, name = value.rpartition(".")
    # A forgotten section is as common as a typing error: a key of the same name comes first.
    nearest = [path for path in choices if path.split(".")[-1] == name]
    siblings = [path for path in choices if path.rpartition(".")[0] == section]
    if not nearest and section and siblings:
        names = [path.rpartition(".")[2] for path in siblings]
        nearest = [f"{section}.{match}" for match in difflib.get_close_matches(name, names, n=1)]
        if not nearest:
            return f"; keys of {section} are {', '.join(names)}"
    nearest = nearest or difflib.get_close_matches(value, choices, n=1, cutoff=0.8)
    if nearest:
        return f"; did you mean {nearest[0]}?"
    return fallback
