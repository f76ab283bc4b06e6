"""Tests of exceptions and of what messages say about them."""

import errno
import os
from pathlib import Path

import jax
import pytest

from mixer_jax.errors import (
    DiskFullError,
    RunError,
    UserError,
    WriteFailureError,
    describe_lost_host,
    disk_failure,
    no_space_path,
    no_space_reason,
    read_error,
    write_failure_reason,
)
from tests.helpers.messages import mentions

NO_SPACE = OSError(errno.ENOSPC, "No space left on device", "/disk/run/metrics.jsonl")


def raise_from_no_space(error: Exception, how: str) -> Exception:
    """Raises an error while a lack of space is handled, and returns it."""

    def fail() -> None:
        raise error

    try:
        try:
            raise NO_SPACE
        except OSError as cause:
            if how == "implicitly":
                fail()
            raise error from (cause if how == "from it" else None)
    except type(error) as raised:
        return raised


@pytest.mark.parametrize("how", ["from it", "implicitly"])
def test_no_space_reason_has_the_text_of_the_error(how: str) -> None:
    error = raise_from_no_space(KeyError("top1"), how)
    assert mentions(no_space_reason(error), "No space left on device", "KeyError", "top1")


def test_no_space_reason_of_the_error_itself_names_its_file() -> None:
    reason = no_space_reason(NO_SPACE)
    assert mentions(reason, "No space left on device", "/disk/run/metrics.jsonl")
    assert reason.count("No space left on device") == 1


def test_no_space_reason_ignores_a_suppressed_context() -> None:
    assert no_space_reason(NO_SPACE) != ""
    assert no_space_reason(raise_from_no_space(KeyError("top1"), "from None")) == ""


def test_no_space_reason_reads_the_messages_of_libraries() -> None:
    reason = no_space_reason(ValueError("RESOURCE_EXHAUSTED: write: No space left on device [28]"))
    assert mentions(reason, "No space left on device", "RESOURCE_EXHAUSTED")


@pytest.mark.parametrize(
    ("folder", "is_outside"),
    [("/disk/run", False), ("/disk/ru", True), ("/other", True), ("gs://disk/run", True)],
)
def test_no_space_path_is_the_file_if_it_is_outside(folder: str, is_outside: bool) -> None:
    for error in (NO_SPACE, raise_from_no_space(ValueError("failed"), "from it")):
        assert no_space_path(error, folder) == (NO_SPACE.filename if is_outside else folder)


def test_no_space_path_resolves_links(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    error = OSError(errno.ENOSPC, "No space left on device", f"{tmp_path}/disk/metrics.jsonl")
    assert no_space_path(error, f"{tmp_path}/link") == f"{tmp_path}/link"


def test_no_space_path_is_the_folder_if_the_error_names_no_file() -> None:
    assert no_space_path(OSError(errno.ENOSPC, "No space left on device"), "/run") == "/run"


def system_error(code: int, path: str | None = "/disk/run/metrics.jsonl") -> OSError:
    return OSError(code, os.strerror(code), path)


@pytest.mark.parametrize(
    "code",
    [errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENODEV, errno.ENOTCONN],
)
def test_write_failure_reason_names_the_file(code: int) -> None:
    error = system_error(code)
    wrapped = ExceptionGroup("several", [KeyError("top1"), ValueError("failed")])
    wrapped.exceptions[1].__cause__ = error
    for raised in (error, wrapped):
        reason = write_failure_reason(raised, "/disk/run")
        assert mentions(reason, os.strerror(code), "/disk/run/metrics.jsonl")
        assert write_failure_reason(raised, "/disk/other") == ""


def test_write_failure_reason_reads_the_messages_of_libraries() -> None:
    text = 'Error writing "/disk/run/checkpoints/5/d": [OS error 5: EIO Input/output error]'
    assert write_failure_reason(ValueError(text), "/disk/run") == "Input/output error"
    assert write_failure_reason(ValueError(text), "/disk/ru") == ""


@pytest.mark.parametrize(
    "error",
    [
        system_error(errno.EIO, None),
        system_error(errno.ENOENT),
        ValueError("/disk/run/metrics.jsonl"),
    ],
)
def test_write_failure_reason_is_empty_without_a_file_or_a_failure(error: Exception) -> None:
    assert write_failure_reason(error, "/disk/run") == ""


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (NO_SPACE, DiskFullError),
        (system_error(errno.EIO), WriteFailureError),
        (system_error(errno.EACCES), None),
    ],
)
def test_disk_failure_of_a_library_quotes_the_cause(
    cause: OSError, kind: type[Exception] | None
) -> None:
    error = RuntimeError("writer failed")
    error.__cause__ = cause
    failure = disk_failure("report 'page' cannot be written", error)
    assert type(failure) is (kind or type(None))
    if kind:
        reason = os.strerror(cause.errno or 0)
        assert mentions(str(failure), "report 'page'", "writer failed", reason)
    reported = RunError("loss is nan")
    reported.__cause__ = cause
    assert disk_failure("report 'page' cannot be written", reported) is None


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.EIO, RunError), (errno.ESTALE, RunError), (errno.EACCES, UserError)]
)
def test_read_error_is_a_usage_error_unless_the_disk_fails(
    code: int, kind: type[Exception]
) -> None:
    error = read_error("manifest 'birds.csv' cannot be read", system_error(code))
    assert type(error) is kind
    assert mentions(str(error), "birds.csv", os.strerror(code))


@pytest.mark.parametrize("error_type", [UserError, RunError])
def test_messages_are_one_line_whatever_text_they_quote(error_type: type[Exception]) -> None:
    message = str(error_type("class 'a\nb\x1b[31m\u2028c' is unknown."))
    assert message == r"class 'a\nb\x1b[31m\u2028c' is unknown."


@pytest.mark.parametrize(
    ("message", "is_lost"),
    [
        ("UNKNOWN: Gloo AllGather failed: Connection reset by peer", True),
        ("NCCL operation failed: ncclSystemError", True),
        ("/data/igloo/1.png is not an image", False),
    ],
)
def test_only_errors_of_communication_are_those_of_a_lost_host(
    message: str, is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not describe_lost_host(RuntimeError(message))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert bool(describe_lost_host(RuntimeError(message))) == is_lost
