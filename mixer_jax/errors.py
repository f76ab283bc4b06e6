"""Exceptions that the doors turn into one line and an exit code."""

import difflib
import signal

_MAX_REASON = 200


class UserError(ValueError):
    """A user's mistake, told in one line: the value, the rule it breaks, and the fix.

    The doors (`python -m mixer_jax.*`) print it without a stack trace and exit with code 2.
    """


class DatasetNotPreparedError(UserError):
    """A data set that is not there yet.

    Attributes:
        advice: what to do so that it is, in one line.
    """

    def __init__(self, message: str, advice: str):
        super().__init__(message)
        self.advice = advice


class OutputWriteError(UserError):
    """What must be kept cannot be written, so that going on would be in vain."""


class RunError(RuntimeError):
    """A run that cannot go on though it was asked for rightly; exit code 1."""


class NonFiniteError(RunError):
    """A run whose numbers are no longer finite, on all hosts alike; it would be so again."""


def exit_code(error: BaseException) -> int:
    """Returns the exit code of a command that ends with an error: 2 means "do not retry"."""
    if isinstance(error, UserError):
        return 2
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 1


def summarize_error(error: Exception) -> str:
    """Returns what another library says went wrong, on one line of moderate length."""
    return " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__


def suggest(value: str, known: list[str], otherwise: str = "") -> str:
    """Returns the end of a message: what of `known` is nearest to `value`, or `otherwise`."""
    section, _, name = value.rpartition(".")
    # A forgotten section is as common as a typing error, so a key of that very name comes first.
    nearest = [path for path in known if path.split(".")[-1] == name]
    siblings = [path for path in known if path.rpartition(".")[0] == section]
    if not nearest and section and siblings:
        names = [path.rpartition(".")[2] for path in siblings]
        nearest = [f"{section}.{match}" for match in difflib.get_close_matches(name, names, n=1)]
        if not nearest:
            return f"; {section} has {', '.join(names)}"
    nearest = nearest or difflib.get_close_matches(value, known, n=1, cutoff=0.8)
    if nearest:
        return f"; did you mean {nearest[0]}?"
    return otherwise
