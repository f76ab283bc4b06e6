"""Training runs as forked processes, and what they must end with.

Python and JAX are imported once, before the processes are forked, and compiled programs are cached:
a run of 60 steps takes a few seconds. JAX's backends are never initialized in the parent process,
because their threads would not survive a fork.
"""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import tensorflow_datasets  # noqa: F401

import mixer_jax.data.tfds
import mixer_jax.main
import mixer_jax.training.loop
import mixer_jax.visualization.curves
from mixer_jax.checkpoints.resolve import list_steps
from mixer_jax.cli import common
from mixer_jax.distributed import multihost
from tests.helpers.processes import final_arrays, host_env, untimed_metrics
from tests.helpers.tiny_run import to_flags

ROOT = Path(__file__).parent.parent.parent
# Folders in `Folders.outside`.
_OUTSIDE = ("cwd", "home", "tmp")
# Process ids since the last `kill_all`.
_started: list[int] = []
# Time after which a host that does not answer is lost. Less than users wait, but enough for hosts
# that share the cores of a busy machine.
HEARTBEAT_TIMEOUT_SECONDS = 10
# An undisturbed process that takes longer hangs, even on a busy machine.
TIMEOUT_SECONDS = 600.0


class LostError(Exception):
    """A run that did not recover from a fault as it must."""


@dataclasses.dataclass(frozen=True)
class Folders:
    """Folders of one run.

    Attributes:
        root: Folder that has the others.
        cache: Compiled programs, shared by all runs.
    """

    root: Path
    cache: Path

    @property
    def disk(self) -> Path:
        """Folder whose system calls are watched."""
        return self.root / "disk"

    @property
    def workdir(self) -> Path:
        """Workdir of the run."""
        return self.disk / "run"

    @property
    def images(self) -> Path:
        """Image files of runs that train on such."""
        return self.root / "images"

    @property
    def digests(self) -> Path:
        """Digests of the arrays that the run has ended with."""
        return self.root / "digests.json"

    @property
    def outside(self) -> Path:
        """Current folder, home and folder for temporary files; the run must leave them empty."""
        return self.root / "outside"

    @property
    def logs(self) -> Path:
        """Output of the processes."""
        return self.root / "logs"

    def create(self) -> None:
        """Creates all of them but the workdir."""
        for folder in (self.disk, self.logs, *(self.outside / name for name in _OUTSIDE)):
            folder.mkdir(parents=True, exist_ok=True)

    def check_outside(self) -> None:
        """Raises LostError if a run has written outside of its workdir."""
        found = [path for path in self.outside.rglob("*") if path.parent != self.outside]
        found += [path for path in self.disk.iterdir() if path != self.workdir]
        if found:
            raise LostError(f"written outside of the workdir: {found[0]}")


class Process:
    """Process of a training run, the first of its own process group."""

    def __init__(self, pid: int, name: str, logs: Path):
        self.pid, self.name, self._logs = pid, name, logs
        self.code: int | None = None

    def wait(self, seconds: float) -> int | None:
        """Waits for the end; returns the exit code, or minus the signal, or None if it runs."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                break
            else:
                time.sleep(0.002)
        return self.code

    def finish(self, seconds: float = TIMEOUT_SECONDS) -> int:
        """Waits for the end and returns the exit code; kills a process that hangs.

        Raises:
            LostError: The process hangs, or has left others behind.
        """
        code = self.wait(seconds)
        if code is None:
            self.send(signal.SIGKILL)
            self.wait(10)
            raise LostError(f"{self.name} hangs after {seconds:g} seconds")
        # Loader processes end when they notice that the run has ended.
        deadline = time.monotonic() + 20
        while _group_exists(self.pid):
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise LostError(f"{self.name} has left processes behind")
            time.sleep(0.02)
        return code

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, unless the process has ended."""
        if self.code is None:
            os.kill(self.pid, number)

    @property
    def out(self) -> str:
        """Standard output."""
        return (self._logs / f"{self.name}.out").read_text()

    @property
    def err(self) -> str:
        """Standard error."""
        return (self._logs / f"{self.name}.err").read_text()

    @property
    def error_line(self) -> str:
        """The one line on standard error.

        Raises:
            LostError: There are more or fewer lines.
        """
        lines = self.err.splitlines()
        if len(lines) != 1 or not lines[0].startswith(("error: ", "interrupted")):
            raise LostError(
                f"{self.name} ended with {self.code} and {len(lines)} lines on standard error"
            )
        return lines[0]


class Run:
    """Processes of a run, one per host, of which the first one prints for all."""

    def __init__(self, name: str, processes: Sequence[Process]):
        self.name, self.processes = name, processes

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the processes that have not ended."""
        for process in self.processes:
            process.send(number)

    def wait(self, seconds: float) -> int | None:
        """Waits for the end of all; returns the first code that is not 0, or None if one runs."""
        deadline = time.monotonic() + seconds
        codes = [process.wait(deadline - time.monotonic()) for process in self.processes]
        return None if None in codes else next(filter(None, codes), 0)

    def finish(self, seconds: float = TIMEOUT_SECONDS) -> int:
        """Waits for the end of all; returns the first code that is not 0, or 0.

        Raises:
            LostError: One hangs, or has left others behind.
        """
        deadline = time.monotonic() + seconds
        codes = [process.finish(deadline - time.monotonic()) for process in self.processes]
        return next(filter(None, codes), 0)

    @property
    def out(self) -> str:
        """Standard output of the first host."""
        return self.processes[0].out

    @property
    def err(self) -> str:
        """Standard error of all hosts."""
        return "".join(process.err for process in self.processes)

    @property
    def error_line(self) -> str:
        """The one line on standard error of the first host; raises LostError if it has others."""
        return self.processes[0].error_line


def _group_exists(group: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


def start(
    folders: Folders,
    name: str,
    data_dir: str,
    settings: Mapping[str, Any],
    before: Callable[[], object] = lambda: None,
) -> Process:
    """Starts or resumes a run.

    Args:
        folders: Folders of the run.
        name: Name of the process and of its output files.
        data_dir: TFDS folder.
        settings: Changes of the settings, as `tests.helpers.tiny_run.to_flags` takes them.
        before: Function that is called in the process before the run starts.
    """
    folders.create()
    flags = to_flags(data_dir, **settings, compilation_cache=str(folders.cache))
    arguments = [f"--config={ROOT}/configs/digits.py", f"--workdir={folders.workdir}", *flags]

    def train() -> None:
        _set_up_process(folders)
        before()
        sys.argv = ["main.py", *arguments]
        try:
            common.run_cli(mixer_jax.main.main, needs_output=False)
        except SystemExit as error:
            if error.code == 0 and "JAX_NUM_PROCESSES" not in os.environ:
                # In this process, because JAX is not initialized in the campaign's own one.
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
                logging.disable()
                _write_digests(folders)
            raise

    return Process(fork(train, folders.logs / name), name, folders.logs)


def start_hosts(
    folders: Folders,
    name: str,
    data_dir: str,
    settings: Mapping[str, Any],
    num_hosts: int,
    before: Callable[[int], object] = lambda host: None,
) -> Run:
    """Starts or resumes a run on several hosts, which are processes with one device each.

    Args:
        folders: Folders of the run.
        name: Name of the processes, without the index of the host.
        data_dir: TFDS folder.
        settings: Changes of the settings.
        num_hosts: Number of hosts.
        before: Function that is called in each process, with the index of its host, before the run
            starts.
    """

    def join(host: int, env: Mapping[str, str]) -> None:
        os.environ |= env
        multihost._HEARTBEAT_TIMEOUT_SECONDS = HEARTBEAT_TIMEOUT_SECONDS
        before(host)

    envs = enumerate(host_env(num_hosts, num_devices=1))
    return Run(
        name,
        [
            start(
                folders,
                f"{name}_host{host}",
                data_dir,
                settings,
                functools.partial(join, host, env),
            )
            for host, env in envs
        ],
    )


def fork(function: Callable[[], object], output: Path) -> int:
    """Calls a function in a forked process, as if it were the whole program; returns its id.

    Args:
        function: Function to call.
        output: Path of the files for its standard output and error, without suffix.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        _started.append(pid)
        return pid
    code = 1
    try:
        os.setsid()
        for descriptor, suffix in ((1, "out"), (2, "err")):
            file = os.open(f"{output}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, descriptor)
            os.close(file)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        try:
            function()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        # As Python does at its end.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code)


def kill_all() -> None:
    """Kills all processes that have been forked, and those that they have started."""
    for pid in _started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    _started.clear()


def _set_up_process(folders: Folders) -> None:
    cwd, home, temporary = (folders.outside / name for name in _OUTSIDE)
    os.chdir(cwd)
    os.environ |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    tempfile.tempdir = None
    # Drawing takes an eighth of a run's time, and the file is not compared.
    mixer_jax.visualization.curves.render_figure = lambda figure, file_format: b""
    configure_jax = common.configure_jax

    def configure_cache(compilation_cache: str, **options: Any) -> None:
        configure_jax(compilation_cache, **options)
        import jax

        # Tiny programs as well.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    common.configure_jax = configure_cache


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a finished run, which must equal that of an undisturbed one.

    Attributes:
        arrays: Digest of all arrays of the last checkpoint, by item.
        metrics: Lines of metrics.jsonl without timings.
        scores: Line that the command prints about the last evaluation.
    """

    arrays: dict[str, str]
    metrics: list[dict[str, Any]]
    scores: str

    def difference(self, other: "Result") -> str:
        """Describes the first difference; "" if there is none."""
        if self.metrics != other.metrics:
            pairs = zip(self.metrics, other.metrics, strict=False)
            lines = next((f"{a} and {b}" for a, b in pairs if a != b), "")
            return f"metrics: {lines or f'{len(self.metrics)} and {len(other.metrics)} lines'}"
        if self.arrays != other.arrays:
            names = self.arrays.keys() | other.arrays.keys()
            items = [n for n in sorted(names) if self.arrays.get(n) != other.arrays.get(n)]
            return f"arrays of {', '.join(items)}"
        return "" if self.scores == other.scores else f"scores: {self.scores} and {other.scores}"


def _write_digests(folders: Folders) -> None:
    """Writes digests of the arrays of the newest checkpoint."""
    digests = {}
    step = list_steps(str(folders.workdir))[-1]
    for item, leaves in final_arrays(folders.workdir, step).items():
        digest = hashlib.sha256(f"step {step} ".encode())
        for leaf in leaves:
            digest.update(f"{leaf.dtype} {leaf.shape} ".encode() + leaf.tobytes())
        digests[item] = digest.hexdigest()
    folders.digests.write_text(json.dumps(digests))


def read_result(folders: Folders, run: Run) -> Result:
    """Reads the result of a finished run."""
    if len(run.processes) > 1:
        # One host cannot read a checkpoint alone.
        reader = Process(
            fork(lambda: _write_digests(folders), folders.logs / "digests"), "digests", folders.logs
        )
        if reader.finish() != 0:
            raise LostError(f"the last checkpoint cannot be read: {reader.err}")
    scores = [line for line in run.out.splitlines() if line.startswith("test: ")]
    return Result(
        json.loads(folders.digests.read_text()),
        untimed_metrics(folders.workdir),
        scores[-1] if scores else "none",
    )


def find_leftovers(workdir: Path) -> Iterator[Path]:
    """Yields files that a run has not finished or should have removed."""
    steps = {str(step) for step in list_steps(str(workdir))}
    for path in sorted(workdir.rglob("*")):
        is_temporary = path.name.endswith(".tmp") or "orbax-checkpoint-tmp" in path.name
        is_internal = path.name.startswith((".probe-", ".lock"))
        is_incomplete = path.parent == workdir / "checkpoints" and path.name not in steps
        if is_temporary or is_internal or is_incomplete:
            yield path
