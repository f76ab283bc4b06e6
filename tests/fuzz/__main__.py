"""Fuzzing of every parser that reads foreign bytes.

    python -m tests.fuzz --inputs=10000 --seed=0

Damages small valid inputs and checks what the parsers do: they accept an input or refuse it in
one line; they do not crash, hang, use much memory, run programs, or write outside of their folder.
Parsers run in a process with limits, which is replaced when it ends. An input depends only on the
target, the seed and its index. Prints a table, and keeps the inputs that failed.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mixer_jax.cli.common import check_positive
from mixer_jax.errors import UserError

_HANG_SECONDS = 5
# Other programs may keep the machine busy, so the limit is on processor time; this one, on time
# by the clock, is for processes that wait.
_WAIT_SECONDS = 90
# Address space in addition to that at the start, in bytes; the stacks of threads are part of it.
_MEMORY = 4 * 2**30
_MAX_KEPT_INPUTS = 200


@dataclasses.dataclass
class Row:
    """Results of a target.

    Attributes:
        accepted: Number of accepted inputs.
        refused: Number of refused inputs.
        failures: A line per input that failed.
        slowest: Most processor time that an input took, in seconds.
        memory: Most memory in addition to that before the first input, in MiB.
    """

    accepted: int = 0
    refused: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    slowest: float = 0.0
    memory: float = 0.0

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return self.accepted + self.refused + len(self.failures)


def select_targets(only: Sequence[str]) -> list[Any]:
    """Returns the targets whose names contain one of some texts."""
    from tests.fuzz.targets import TARGETS

    return [t for t in TARGETS if not only or any(text in t.name for text in only)]


def work(args: argparse.Namespace) -> None:
    """Runs targets and prints two lines of JSON per input: before and after it."""
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    warnings.simplefilter("ignore")
    import matplotlib

    from tests.fuzz.target import run_input

    # Matplotlib creates its folders in HOME, outside of the folder that parsers may write to.
    matplotlib.get_configdir()
    matplotlib.get_cachedir()

    skip_target, skip_index = args.start.rsplit("/", 1)
    targets = select_targets(args.only)
    names = [target.name for target in targets]
    first = names.index(skip_target) if skip_target else 0
    _limit_memory()
    for target in targets[first:]:
        count = max(len(target.seeds()), args.inputs // target.cost)
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        start = int(skip_index) if target.name == skip_target else 0
        base = _reset_peak_memory()
        for index in range(start, count):
            data = target.make_input(args.seed, index)
            print(json.dumps(["begin", target.name, index]), file=results, flush=True)
            signal.setitimer(signal.ITIMER_PROF, _HANG_SECONDS)
            begin = time.process_time()
            detail = ""
            try:
                outcome = "accepted" if run_input(target, data, folder) else "refused"
            except MemoryError:
                outcome, detail = "memory", traceback.format_exc(limit=-4)
            except BaseException as error:
                outcome = type(error).__name__
                detail = traceback.format_exc(limit=-4)
            seconds = time.process_time() - begin
            signal.setitimer(signal.ITIMER_PROF, 0)
            memory = (_read_status("VmHWM") - base) / 2**20
            print(json.dumps(["end", outcome, seconds, memory, detail]), file=results, flush=True)


def _limit_memory() -> None:
    """Limits the address space of this process to `_MEMORY` more than it has."""
    limit = _read_status("VmSize") + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _reset_peak_memory() -> int:
    """Resets the peak of the memory of this process; returns what it has now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _read_status("VmRSS")


def _read_status(name: str) -> int:
    """Reads a size from the status of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def fuzz(args: argparse.Namespace) -> dict[str, Row]:
    """Runs all inputs, or those until Ctrl-C, in as many processes as parsers crash, and one."""
    rows: dict[str, Row] = collections.defaultdict(Row)
    start = "/0"
    with contextlib.suppress(KeyboardInterrupt):
        while start:
            start = _run_worker(args, start, rows)
    return rows


def _run_worker(args: argparse.Namespace, start: str, rows: dict[str, Row]) -> str:
    """Runs inputs in a process until it ends.

    Args:
        args: Arguments of the command.
        start: Target and index of the first input; "/0" for the first target.
        rows: Results by target, which are updated.

    Returns:
        Target and index of the input after the one that ended the process; "" after the last one.
    """
    command = [sys.executable, "-m", "tests.fuzz", "--worker", f"--start={start}"]
    command += [f"--inputs={args.inputs}", f"--seed={args.seed}", f"--folder={args.folder}"]
    command += [f"--only={text}" for text in args.only]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "HOME": str(args.folder),
        "TMPDIR": str(args.folder),
        "HF_HUB_OFFLINE": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    with open(args.folder / "stderr.txt", "ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)
    name, index, is_running, has_waited = "", -1, False, False
    try:
        for line in _read_lines(process):
            if line is None:
                has_waited = is_running
                break
            event = json.loads(line)
            if event[0] == "begin":
                _, name, index = event
                is_running = True
                continue
            _, outcome, seconds, memory, detail = event
            is_running = False
            row = rows[name]
            row.slowest, row.memory = max(row.slowest, seconds), max(row.memory, memory)
            if outcome == "accepted":
                row.accepted += 1
            elif outcome == "refused":
                row.refused += 1
            else:
                _keep(args, rows, name, index, outcome, detail)
    finally:
        if process.poll() is None and (has_waited or sys.exc_info()[0]):
            process.kill()
        code = process.wait()
        assert process.stdout is not None
        process.stdout.close()
    if code == 0:
        return ""
    if not is_running:
        raise RuntimeError(f"the process of the parsers ended with {code}: see {log.name}")
    kind = "hang" if has_waited or code == -signal.SIGPROF else f"exit status {code}"
    _keep(args, rows, name, index, kind, "")
    return f"{name}/{index + 1}"


def _read_lines(process: Any) -> Iterator[bytes | None]:
    """Yields the lines of a process, and None if there is none for too long."""
    buffer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(_WAIT_SECONDS):
                yield None
                return
            chunk = os.read(process.stdout.fileno(), 2**16)
            if not chunk:
                return
            *lines, buffer = (buffer + chunk).split(b"\n")
            yield from lines


def _keep(
    args: argparse.Namespace, rows: dict[str, Row], name: str, index: int, kind: str, detail: str
) -> None:
    """Records a failure, and writes its input."""
    (target,) = (target for target in select_targets([]) if target.name == name)
    rows[name].failures.append(f"{name} {index}: {kind}")
    if len(rows[name].failures) > _MAX_KEPT_INPUTS:
        return
    folder = args.folder / "failures"
    folder.mkdir(exist_ok=True)
    stem = f"{''.join(c if c.isalnum() else '_' for c in name)}_{index}"
    (folder / stem).write_bytes(target.make_input(args.seed, index))
    (folder / f"{stem}.txt").write_text(
        f"{name} {index}: {kind}\n{detail}", errors="backslashreplace"
    )


def format_table(rows: dict[str, Row]) -> str:
    """Formats the table of the documentation."""
    lines = [
        "| target | inputs | accepted | refused | failures | slowest, s CPU | memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    total = Row()
    for name, row in rows.items():
        lines.append(_format_row(name, row))
        total.accepted, total.refused = total.accepted + row.accepted, total.refused + row.refused
        total.failures += row.failures
        total.slowest, total.memory = max(total.slowest, row.slowest), max(total.memory, row.memory)
    return "\n".join([*lines, _format_row("all", total)])


def _format_row(name: str, row: Row) -> str:
    cells = (name, *(f"{n:,}" for n in (row.inputs, row.accepted, row.refused, len(row.failures))))
    return f"| {' | '.join(cells)} | {row.slowest:.2f} | {row.memory:,.0f} |"


def main() -> int:
    """Fuzzes the parsers; returns 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1000, help="inputs of a fast target")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage")
    parser.add_argument("--only", action="append", default=[], help="part of a target's name")
    parser.add_argument("--folder", type=Path, help="folder for failures; default: a new one")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--start", default="/0", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return 0
    check_positive(args, "inputs")
    if not select_targets(args.only):
        raise UserError(f"--only must be part of a target's name, got {', '.join(args.only)}.")
    os.environ["JAX_PLATFORMS"] = "cpu"
    args.folder = Path(args.folder or tempfile.mkdtemp()).absolute()
    args.folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows = fuzz(args)
    print(f"{time.perf_counter() - start:,.0f} s\n")
    print(format_table(rows))
    failures = [failure for row in rows.values() for failure in row.failures]
    if failures:
        print(f"\n{len(failures)} failures, whose inputs are in {args.folder}/failures")
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
