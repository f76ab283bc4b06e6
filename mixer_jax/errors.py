"""Exceptions that commands turn into one line and an exit code."""

import difflib
import errno
import os
import signal
from collections.abc import Iterable

_MAX_REASON = 200
# How to install a library that reads URLs, by its name in error messages.
_INSTALL_HINTS = {"gcsfs": "Run pip install gcsfs."}
# A full disk, an exceeded quota, and an exceeded limit on the size of files.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What JAX and PyTorch write when memory runs out.
_OUT_OF_MEMORY = ("resource_exhausted", "out of memory", "can't allocate memory")


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


class DiskFullError(RunError):
    """A result cannot be written for lack of space; a retry fails as well until there is more."""


def no_space_reason(error: BaseException | None) -> str:
    """Returns the system's message if an error, or its cause, is a lack of disk space; or "".

    Libraries raise errors of many types; their messages contain the system's.
    """
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for code in _NO_SPACE:
            if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
                return os.strerror(code)
        error = error.__cause__ or error.__context__
    return ""


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error means that the memory of a device or host ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in text for phrase in _OUT_OF_MEMORY)


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


def install_hint(reason: str) -> str:
    """Formats how to install the library that the message of an error names; empty if none."""
    return "".join(f" {fix}" for library, fix in _INSTALL_HINTS.items() if library in reason)


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
