"""Worker processes, one per framework, in which all programs are built and timed.

Separate processes keep frameworks from disturbing each other, and crashes from ending the run. The
caller's process imports neither JAX nor PyTorch.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from absl import logging

from mixer_jax.benchmarks.candidates import JAX, Candidate, Workload
from mixer_jax.benchmarks.runner import CompileCosts, FrameworkRunner
from mixer_jax.errors import is_out_of_memory, summarize_error

# Defaults for what the environment does not set.
_ENVIRONMENT = {
    # By default, JAX takes three quarters of a GPU's memory at once.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
}
_STOP_SECONDS = 10.0
_LOG_CHARS = 4000


class WorkerError(RuntimeError):
    """Failure of one call in a worker process; the message is its reason, in one line.

    `trace` is the traceback, or the last output of the lost process.
    """

    def __init__(self, reason: str, out_of_memory: bool, trace: str):
        super().__init__(reason, out_of_memory, trace)
        self.reason, self.out_of_memory, self.trace = reason, out_of_memory, trace

    def __str__(self) -> str:
        return "out of memory" if self.out_of_memory else self.reason


class Worker:
    """Process that holds the runner of one framework; starts at the first call."""

    def __init__(self, framework: str, workload: Workload, platform: str = "", cache_dir: str = ""):
        self._args = (framework, workload, platform, cache_dir)
        self._process: Any = None
        self._connection: Any = None
        self._log: Any = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process id; None if the process is not running."""
        return self._process and self._process.pid

    def call(self, method: str, **kwargs: Any) -> Any:
        """Calls a method of the `FrameworkRunner` and returns its result.

        Raises:
            WorkerError: The method failed, or the process was lost.
        """
        if self._process is None:
            self._start()
        try:
            self._connection.send((method, kwargs))
            reply = self._connection.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if isinstance(reply, WorkerError):
            raise reply
        return reply

    def stop(self) -> None:
        """Ends the process, if it runs, which frees its memory."""
        if self._process is None:
            return
        self._connection.close()
        self._process.join(_STOP_SECONDS)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        self._log.close()
        self._process = None

    def _start(self) -> None:
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115
        context = multiprocessing.get_context("spawn")
        self._connection, remote = context.Pipe()
        self._process = context.Process(target=_serve, args=(remote, self._log.name, *self._args))
        self._process.start()
        remote.close()

    def _lost(self) -> WorkerError:
        self._process.join()
        code = self._process.exitcode
        self._log.seek(0)
        trace = self._log.read().decode(errors="replace")[-_LOG_CHARS:]
        self.stop()
        last = trace.strip().splitlines()[-1] if trace.strip() else f"exit code {code}"
        # Linux kills processes when memory is short.
        return WorkerError(summarize_error(RuntimeError(last)), code == -9, trace)


class WorkerPool:
    """Worker processes of all frameworks of a comparison, which share one device.

    Lost processes are started again at the next call and find their compiled programs in
    `cache_dir`. If the device has too little memory for two processes, the pool becomes `isolated`:
    only one of them runs at a time from then on.
    """

    def __init__(
        self, workload: Workload, frameworks: Sequence[str], platform: str, cache_dir: str
    ):
        self.isolated = False
        self._workload, self._cache_dir = workload, cache_dir
        self._workers = {name: Worker(name, workload, platform, cache_dir) for name in frameworks}

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop_all()

    def call(self, framework: str, method: str, **kwargs: Any) -> Any:
        """Calls a method of a framework's runner; see `Worker.call`."""
        worker = self._workers[framework]
        others = [name for name in self._workers if name != framework and self._workers[name].pid]
        if self.isolated:
            for name in others:
                self._workers[name].stop()
        try:
            return worker.call(method, **kwargs)
        except WorkerError as error:
            if not (error.out_of_memory and others and not self.isolated):
                raise
        print(
            f"{framework} and {others[0]} do not fit into memory together: from now on, their "
            "processes take turns",
            file=sys.stderr,
        )
        self.isolated = True
        self._stop_all()
        return worker.call(method, **kwargs)

    def measure_cold_start(self, candidate: Candidate) -> CompileCosts:
        """Measures the costs of a candidate of JAX in a new process with an empty cache.

        In one process, XLA would reuse what it computed for the candidate before, which can even
        be the same program. The compiled program is added to the cache of the pool.
        """
        with tempfile.TemporaryDirectory() as cache_dir:
            with Worker(JAX, self._workload, cache_dir=cache_dir) as worker:
                costs: CompileCosts = worker.call("measure_costs", candidate=candidate)
            shutil.copytree(cache_dir, self._cache_dir, dirs_exist_ok=True)
        return costs

    def _stop_all(self) -> None:
        for worker in self._workers.values():
            worker.stop()


def _cache_environment(folder: str) -> dict[str, str]:
    """Returns the variables that make JAX and PyTorch keep compiled programs in a folder."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(Path(folder, "xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # Whole programs only: cached parts of one program would speed up the compilation of others.
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
        "TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "inductor")),
        "TRITON_CACHE_DIR": str(Path(folder, "triton")),
    }


def _serve(
    connection: Connection,
    log_path: str,
    framework: str,
    workload: Workload,
    platform: str,
    cache_dir: str,
) -> None:
    """Runs the calls that arrive until the connection is closed, as a worker's main function."""
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if cache_dir:
        os.environ.update(_cache_environment(cache_dir))
    logging.set_verbosity(logging.ERROR)
    runner: Any = None
    while True:
        try:
            method, kwargs = connection.recv()
        except EOFError:
            return
        try:
            runner = runner or _make_runner(framework, workload, platform)
            reply = getattr(runner, method)(**kwargs)
        except Exception as error:
            out_of_memory = is_out_of_memory(error)
            reply = WorkerError(summarize_error(error), out_of_memory, traceback.format_exc())
        connection.send(reply)


def _make_runner(framework: str, workload: Workload, platform: str) -> FrameworkRunner:
    if framework == JAX:
        from mixer_jax.benchmarks.jax_runner import JaxRunner

        return JaxRunner(workload)
    from mixer_jax.benchmarks.torch_runner import TorchRunner

    return TorchRunner(workload, platform)
