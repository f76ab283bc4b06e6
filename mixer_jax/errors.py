"""Exceptions that commands turn into one line and an exit code."""

import difflib
import errno
import itertools
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_MAX_REASON = 200
# How to install a library that reads URLs, by its name in error messages.
_INSTALL_HINTS = {"gcsfs": "Run pip install gcsfs."}
# Line breaks, and what makes terminals move their cursor or change colors.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# A full disk, an exceeded quota, and an exceeded limit on the size of files.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A failing disk or device, and a file server that is gone or has restarted.
_FAILING = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN)
# A file system that has become read-only, and permissions that were taken away.
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
# What JAX and PyTorch write when memory runs out.
_OUT_OF_MEMORY = ("resource_exhausted", "out of memory", "can't allocate memory")
# What Gloo, NCCL, JAX and orbax write when another host does not answer.
_LOST_HOST = re.compile(r"\b(gloo|nccl\w*|coordination ?service\w*|barrier)\b", re.IGNORECASE)


def escape_control_characters(text: str) -> str:
    r"""Replaces line breaks and other control characters by escapes such as \x1b."""
    return _CONTROL_CHARACTERS.sub(lambda match: ascii(match[0])[1:-1], text)


class UserError(ValueError):
    """Usage error: one line with the value, the rule it breaks, and the fix.

    Commands (`python -m mixer_jax.*`) print it without a stack trace and exit with code 2. Line
    breaks and control characters of foreign text in the message are escaped.
    """

    def __init__(self, message: str = ""):
        super().__init__(escape_control_characters(message))


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
    """Failure that is not a usage error, with a message of one line; commands exit with code 1."""

    def __init__(self, message: str = ""):
        super().__init__(escape_control_characters(message))


class MissingFileError(RunError):
    """A file of a dataset does not exist."""


class NonFiniteError(RunError):
    """Loss or parameters have become NaN or infinite on all hosts; a retry fails as well."""


class WriteFailureError(RunError):
    """The file system fails, usually while writing; retries fail as well until it is fixed."""


class DiskFullError(WriteFailureError):
    """A result cannot be written for lack of space."""


def no_space_reason(error: BaseException | None) -> str:
    """Returns the message of an error that is, or was caused by, a lack of disk space; or "".

    It contains the system's message for the lack of space, and the error's own.
    """
    found = next(_find_system_errors(error, _NO_SPACE), None)
    return "" if error is None or found is None else _format_reason(error, found)


def no_space_path(error: BaseException, folder: str) -> str:
    """Returns the file that an error of `no_space_reason` names if it is not in a folder.

    Args:
        error: Error for which `no_space_reason` is not empty.
        folder: Absolute path or URL, which is returned if the error names no other file.
    """
    found = next(_find_system_errors(error, _NO_SPACE), None)
    path = found and _file_name(found.error)
    return folder if not path or _is_inside(path, folder) else path


def write_failure_reason(error: BaseException | None, folder: str) -> str:
    """Returns why a file system failed, such as "Input/output error", and the file; or "".

    Args:
        error: Error, whose causes are searched.
        folder: Absolute path or URL. Only errors that name a file in it count: that a dataset
            cannot be read says nothing about the workdir.
    """
    for found in _find_system_errors(error, _FAILING + _REFUSED):
        path = _file_name(found.error)
        if path and _is_inside(path, folder):
            return f"{os.strerror(found.code)}: {path}"
        if not path and _names_folder(found.error, folder):
            return os.strerror(found.code)
    return ""


def describe_file_failure(error: Exception) -> str:
    """Formats an error of a full or failing disk, or of missing permissions, and its fix; or ""."""
    if not isinstance(error, OSError) or error.errno not in _NO_SPACE + _FAILING + _REFUSED:
        return ""
    path = _file_name(error)
    name = repr(path) if path else "a file"
    fix = "Free space" if error.errno in _NO_SPACE else "Check the file system and its permissions"
    return (
        f"{name} cannot be read or written ({os.strerror(error.errno)}). {fix} and run the same "
        "command again."
    )


def read_error(problem: str, error: OSError) -> UserError | RunError:
    """Makes the error of a file that cannot be read; a failing disk is not a usage error.

    Args:
        problem: What cannot be done, such as "manifest 'birds.csv' cannot be read".
        error: Error that was caught.
    """
    message = f"{problem}: {error.strerror}."
    return RunError(message) if error.errno in _FAILING else UserError(message)


def disk_failure(problem: str, error: BaseException) -> WriteFailureError | None:
    """Makes the error of a command that a full or failing disk ends; None for other errors.

    Args:
        problem: What cannot be done, such as "report 'page' cannot be written".
        error: Error that was caught, whose causes are searched. Usage errors and failures of the
            run have a message already.
    """
    if isinstance(error, UserError | RunError):
        return None
    again = "run the same command again."
    if reason := no_space_reason(error):
        return DiskFullError(f"{problem} ({reason}). Free space and {again}")
    if found := next(_find_system_errors(error, _FAILING), None):
        reason = _format_reason(error, found)
        return WriteFailureError(f"{problem} ({reason}). Check the file system and {again}")
    return None


def iter_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and those that led to it, also those in exception groups."""
    seen = set[int]()
    remaining = [error]
    while remaining:
        error = remaining.pop(0)
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        if isinstance(error, BaseExceptionGroup):
            remaining += error.exceptions
        context = None if error.__suppress_context__ else error.__context__
        remaining.append(error.__cause__ or context)


class _SystemError(NamedTuple):
    """Error of the operating system, or of a library that quotes one, and its code."""

    error: BaseException
    code: int


def _find_system_errors(
    error: BaseException | None, codes: Sequence[int]
) -> Iterator[_SystemError]:
    """Finds errors with some codes among an error and those that led to it.

    Libraries raise errors of many types; their messages contain the system's.
    """
    for cause in iter_causes(error):
        for code in codes:
            if getattr(cause, "errno", None) == code or os.strerror(code) in str(cause):
                yield _SystemError(cause, code)


def _format_reason(error: BaseException, found: _SystemError) -> str:
    reason, text = os.strerror(found.code), summarize_error(error)
    return text if reason in text else f"{reason}; {type(error).__name__}: {text}"


def _file_name(error: BaseException) -> str:
    """Returns the name of the file in an error of the operating system, or ""."""
    path = getattr(error, "filename", None)
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""


def _is_inside(path: str, folder: str) -> bool:
    if "://" in folder:
        # Object stores name their files in various ways, but never by a local path.
        return not os.path.isabs(path)
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _names_folder(error: BaseException, folder: str) -> bool:
    """Returns whether a message names a file in a folder."""
    names = {folder.rstrip("/"), folder if "://" in folder else os.path.realpath(folder)}
    return any(f"{name}/" in str(error) for name in names)


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error means that the memory of a device or host ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in text for phrase in _OUT_OF_MEMORY)


def describe_full_memory(error: Exception) -> str:
    """Formats an error that a lack of the machine's memory caused, and its fix; or ""."""
    is_memory_full = any(
        isinstance(cause, MemoryError)
        or getattr(cause, "errno", None) == errno.ENOMEM
        or "can't start new thread" in str(cause)
        for cause in iter_causes(error)
    )
    if not is_memory_full:
        return ""
    return (
        f"the memory of this machine is full ({summarize_error(error)}). Free memory, or lift the "
        "limit on it, and run the same command again."
    )


def describe_lost_host(error: BaseException) -> str:
    """Formats an error that the loss of another host of the run caused, and its fix; or ""."""
    jax = sys.modules.get("jax")
    # On one host, NCCL connects its GPUs, and the names of files may have these words.
    if jax is None or not jax.distributed.is_initialized():
        return ""
    for cause in iter_causes(error):
        if _LOST_HOST.search(str(cause)):
            return (
                f"another host was lost, or cannot be reached ({summarize_error(cause)}). Run the "
                "same command again on all hosts."
            )
    return ""


def exit_code(error: BaseException) -> int:
    """Returns the exit code of a command that ends with an error: 2 means "do not retry"."""
    if isinstance(error, UserError):
        return 2
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 1


def summarize_error(error: BaseException) -> str:
    """Shortens the message of another library's exception to one line of moderate length."""
    text = " ".join(str(error).split())[:_MAX_REASON]
    return text.rstrip(".") or type(error).__name__


def abbreviate(names: Iterable[str], limit: int = 5) -> str:
    """Joins names by commas, with an ellipsis instead of those after the first `limit`."""
    listed = list(itertools.islice(names, limit + 1))
    return ", ".join([*listed[:limit], "…"] if len(listed) > limit else listed)


def describe_error(error: Exception) -> str:
    """Formats an error in one line, with its type if the message is another library's."""
    if isinstance(error, UserError | RunError):
        return str(error)
    return f"{type(error).__name__}: {summarize_error(error)}."


def missing_library_error(feature: str, library: str, install: str) -> UserError:
    """Makes the error of a feature that needs a library which is not installed.

    Args:
        feature: What needs the library, such as "--to=onnx".
        library: Name of the library.
        install: Arguments of pip install.
    """
    return UserError(
        f"{feature} needs {library}, which is not installed. Run pip install {install}."
    )


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
    return next(iter(_close_matches(name, choices, cutoff, limit=1)), None)


def suggest(name: str, choices: Iterable[str], cutoff: float = 0.6, limit: int = 1) -> str:
    """Formats the question that ends a message about an unknown name; empty if none is similar.

    Args:
        name: Unknown name.
        choices: Known names.
        cutoff: Smallest similarity, between 0 and 1.
        limit: Largest number of choices to name.
    """
    *first, last = _close_matches(name, choices, cutoff, limit) or [""]
    names = f"{', '.join(first)} or {last}" if first else last
    return f" Did you mean {names}?" if names else ""


def _close_matches(name: str, choices: Iterable[str], cutoff: float, limit: int) -> list[str]:
    folded = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(name.lower(), folded, n=limit, cutoff=cutoff)
    return [folded[match] for match in matches]
