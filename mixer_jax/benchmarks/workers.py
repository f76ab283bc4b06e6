"""Processes that measure, one a framework, so that none disturbs another and none outlives us."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mixer_jax.benchmarks.contestants import Contestant, Setting
from mixer_jax.errors import summarize_error

_PATIENCE = 10.0
_ROOT = Path(__file__).parent.parent.parent
_ENVIRONMENT = {
    # JAX would take three quarters of a GPU's memory at once, whatever it needs.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
}


class FailedError(RuntimeError):
    """What a worker was asked for did not work; the message is its reason, in one line.

    Attributes:
        out_of_memory: whether memory ran out.
        trace: where, for those who want to mend it.
    """

    def __init__(self, reason: str, out_of_memory: bool, trace: str):
        super().__init__("out of memory" if out_of_memory else reason)
        self.out_of_memory = out_of_memory
        self.trace = trace


class Worker:
    """A process of one framework; it starts when it is first asked for something."""

    def __init__(
        self,
        framework: str,
        setting: Setting,
        platform: str = "",
        environment: Mapping[str, str] | None = None,
    ):
        """Takes what the process works with.

        Args:
            framework: "jax" or "torch".
            setting: the work.
            platform: as JAX calls it; for "torch" only.
            environment: variables beside ours.
        """
        self._arguments = [framework, json.dumps(setting._asdict()), platform]
        self._environment = {**_ENVIRONMENT, **os.environ, **(environment or {})}
        self._process: subprocess.Popen[str] | None = None
        self._errors: Any = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None

    def ask(self, do: str, **arguments: Any) -> Any:
        """Returns what a method of the worker's side returns.

        Args:
            do: the method.
            **arguments: that it takes.

        Raises:
            FailedError: it failed, or the process is gone.
        """
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        request = {
            name: value._asdict() if isinstance(value, Contestant) else value
            for name, value in arguments.items()
        }
        try:
            process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._is_gone()
        reply = json.loads(line)
        if "error" in reply:
            raise FailedError(reply["error"], reply["out_of_memory"], self._read_errors())
        return reply["result"]

    def stop(self) -> None:
        """Ends the process, if it is there, and frees all that it holds."""
        if self._process is None:
            return
        try:
            # It ends when there are no more requests; so do processes of its own.
            self._process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._errors.close()
        self._process = None

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        # From where the package is, so that it is found there.
        paths = [str(_ROOT), self._environment.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mixer_jax.benchmarks.worker", *self._arguments],
            env={**self._environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def _is_gone(self) -> FailedError:
        assert self._process is not None
        code = self._process.wait()
        trace = self._read_errors()
        self.stop()
        # Killed: where memory is scarce, that is how Linux says so.
        last = trace.strip().splitlines()[-1] if trace.strip() else f"exit code {code}"
        return FailedError(summarize_error(RuntimeError(last)), code == -9, trace)

    def _read_errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-4000:]
