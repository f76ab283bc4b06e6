"""The standard streams of a door: UTF-8 whatever the locale, and what happens when they fail."""

import io
import os
import signal
import sys
from typing import Any, Literal, TextIO

from mixer_jax.errors import RunError

_EXIT_SIGPIPE = 128 + signal.SIGPIPE


def wrap_stdio(needs_output: bool) -> None:
    """Puts streams of ours in the place of the standard ones, also where there are none.

    Args:
        needs_output: whether the program ends when standard output fails: quietly with 141 where
            nobody reads it any more, by a RunFailedError otherwise. Standard error never ends it.
    """
    sys.stdin = sys.stdin or _open_devnull("r")
    sys.stdout = _Stream(sys.stdout, needs_output)
    sys.stderr = _Stream(sys.stderr, False)


def _open_devnull(mode: Literal["r", "w"]) -> TextIO:
    """Opens what has nothing to read and forgets what is written; open until Python ends."""
    return open(os.open(os.devnull, os.O_RDWR), mode, closefd=False)


class _Stream(io.TextIOWrapper):
    """What is written to such a stream after it failed is thrown away."""

    def __init__(self, stream: Any, needed: bool):
        # Kept, as it would close the file when it goes; None: there is no such stream.
        self._replaced = stream or _open_devnull("w")
        self._needed = needed
        super().__init__(
            self._replaced.buffer,
            encoding="utf-8",
            errors="backslashreplace",
            line_buffering=bool(self._replaced.line_buffering),
            write_through=getattr(self._replaced, "write_through", False),
        )

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        # What still waits to be written, at the latest when Python ends, must not fail again.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if self._needed and isinstance(error, BrokenPipeError):
            sys.exit(_EXIT_SIGPIPE)
        if self._needed:
            raise RunError(f"standard output fails: {error.strerror}") from error
