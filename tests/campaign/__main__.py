"""Fault campaign: `python -m tests.campaign`. See docs/reliability.md."""

import argparse
import gc
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mixer_jax.cli.common import check_positive
from mixer_jax.errors import UserError
from tests.helpers.faults import Faults, build_library

OUTCOMES = ("recovered", "refused", "lost")
NOT_INJECTED = "not injected"


def main() -> int:
    """Injects faults and writes the table; returns 1 if a run was lost."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign",
        description="Injects faults into training runs, resumes them, and compares their results "
        "bit by bit with those of an undisturbed run.",
    )
    parser.add_argument(
        "--faults", type=int, default=sys.maxsize, help="number of faults; default: no limit"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="duration; default: no limit"
    )
    parser.add_argument("--seed", type=int, help="default: random")
    parser.add_argument("--only", metavar="KIND,…", help="kinds of faults; default: all")
    parser.add_argument(
        "--first",
        type=int,
        metavar="INDEX",
        help="index of the first fault of each kind, to repeat it; default: after those in "
        "results.jsonl",
    )
    parser.add_argument(
        "--workdir", type=Path, help="folder for runs and results; default: a temporary one"
    )
    args = parser.parse_args()
    check_positive(args, "faults")
    _list_kinds(args.only)
    workdir = (args.workdir or Path(tempfile.mkdtemp(prefix="campaign"))).absolute()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    faults = workdir / "faults"
    if os.environ.get("FAULT_FOLDER") != str(faults):
        # The library only watches programs that start with it.
        shutil.rmtree(faults, ignore_errors=True)
        faults.mkdir(parents=True)
        env = os.environ | build_library(faults)
        # Backends of accelerators would disturb other programs.
        env["JAX_PLATFORMS"] = "cpu"
        command = [sys.executable, "-m", "tests.campaign", *sys.argv[1:]]
        os.execve(sys.executable, [*command, f"--seed={seed}", f"--workdir={workdir}"], env)
    print(f"seed {seed}, workdir {workdir}", flush=True)
    return _run(args, seed)


def _list_kinds(only: str | None) -> list[str]:
    """Returns the kinds of faults that `--only` selects; raises UserError for unknown ones."""
    from tests.campaign.kinds import KINDS

    names = only.split(",") if only else [*KINDS]
    for name in names:
        if name not in KINDS:
            raise UserError(f"--only must be some of {', '.join(KINDS)}, got {name!r}.")
    return names


def _run(args: argparse.Namespace, seed: int) -> int:
    from tests.campaign import runs
    from tests.campaign.kinds import KINDS
    from tests.campaign.trial import Campaign, RunType

    # The garbage collector of a forked process would copy what this one has imported.
    gc.collect()
    gc.freeze()
    # As Ctrl-C, after which the table is written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    names = _list_kinds(args.only)
    campaign = Campaign(
        args.workdir, Faults(args.workdir / "faults"), _prepare_digits(args.workdir)
    )
    results = Results(args.workdir, seed)
    deadline = time.monotonic() + args.minutes * 60
    first = args.first
    indices = {name: results.next_index(name) if first is None else first for name in names}
    done: Counter[str] = Counter()
    try:
        campaign.reference(RunType())
        while time.monotonic() < deadline and done.total() < args.faults:
            name = min(names, key=lambda name: (done[name] + 0.5) / KINDS[name].weight)
            done[name] += 1
            result = _inject(campaign, KINDS[name].inject, name, indices[name], seed)
            indices[name] += 1
            results.add(result)
            print(_describe(result, done.total()), flush=True)
    except KeyboardInterrupt:
        print("stopped")
    except runs.LostError as error:
        # Of the undisturbed run: no fault can be injected.
        sys.exit(f"error: {error}")
    finally:
        campaign.faults.disarm()
        runs.kill_all()
    descriptions = {name: kind.description for name, kind in KINDS.items()}
    table = results.write_table(descriptions)
    print(f"\n{table}")
    for reason, number in results.not_injected().items():
        print(f"\n{number:,} more were not injected: {reason}.")
    return 1 if results.count("lost") else 0


def _inject(campaign: Any, inject: Any, kind: str, index: int, seed: int) -> dict[str, Any]:
    """Injects one fault and returns its line of results.jsonl."""
    from tests.campaign import runs
    from tests.campaign.runs import LostError
    from tests.campaign.trial import NotInjectedError, Trial

    folder = campaign.folder / "trials" / f"{kind}-{seed}-{index}"
    trial = Trial(campaign, random.Random(f"{seed}/{kind}/{index}"), index, folder)
    start, reason = time.monotonic(), ""
    try:
        outcome = inject(trial)
    except NotInjectedError as error:
        outcome, reason = NOT_INJECTED, str(error)
    except LostError as error:
        outcome, reason = "lost", str(error)
    except Exception:
        # Likely a bug of the campaign; it must not end the others.
        outcome, reason = "lost", traceback.format_exc()
    campaign.faults.disarm()
    runs.kill_all()
    result = {
        "kind": kind,
        "index": index,
        "seed": seed,
        "outcome": outcome,
        "reason": reason,
        "parameters": trial.parameters,
        "seconds": round(time.monotonic() - start, 2),
    }
    if outcome != "lost":
        shutil.rmtree(folder)
    return result


def _describe(result: dict[str, Any], number: int) -> str:
    kind, index, seed = result["kind"], result["index"], result["seed"]
    parameters = ", ".join(f"{key}={value}" for key, value in result["parameters"].items())
    text = f"{number:5}  {result['outcome']:12}  {kind} {index}  {parameters}"
    if result["outcome"] == "lost":
        text += (
            f"\n       {result['reason']}\n       repeat with --only={kind} --first={index} "
            f"--faults=1 --seed={seed}; kept in trials/{kind}-{seed}-{index}"
        )
    return text


class Results:
    """Results of campaigns: results.jsonl, results.json and table.md in their folder.

    A fault that is repeated replaces its earlier result.
    """

    def __init__(self, folder: Path, seed: int):
        """Reads the results of earlier campaigns in the same folder."""
        self._folder, self._seed = folder, seed
        self._path = folder / "results.jsonl"
        # By kind, seed and index.
        self._results: dict[tuple[str, int, int], dict[str, Any]] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            self._store(json.loads(line))

    def next_index(self, kind: str) -> int:
        """Returns the index after those of a kind that have been injected with the same seed."""
        found = (index for *key, index in self._results if key == [kind, self._seed])
        return max(found, default=-1) + 1

    def add(self, result: dict[str, Any]) -> None:
        """Adds a result."""
        self._store(result)
        with self._path.open("a") as file:
            file.write(json.dumps(result) + "\n")

    def _store(self, result: dict[str, Any]) -> None:
        self._results[result["kind"], result["seed"], result["index"]] = result

    def count(self, outcome: str) -> int:
        """Counts the results with an outcome."""
        return sum(result["outcome"] == outcome for result in self._results.values())

    def not_injected(self) -> Counter[str]:
        """Counts the faults that were not injected by their reason."""
        found = (r for r in self._results.values() if r["outcome"] == NOT_INJECTED)
        return Counter(result["reason"] for result in found)

    def write_table(self, descriptions: dict[str, str]) -> str:
        """Writes results.json and table.md; returns the table."""
        counts = defaultdict[str, Counter[str]](Counter)
        for result in self._results.values():
            if result["outcome"] != NOT_INJECTED:
                counts[result["kind"]][result["outcome"]] += 1
        rows = {kind: counts[kind] for kind in descriptions if kind in counts}
        table = format_table((descriptions[kind], row) for kind, row in rows.items())
        (self._folder / "table.md").write_text(table + "\n")
        summary = {
            kind: {"injected": row.total(), **{name: row[name] for name in OUTCOMES}}
            for kind, row in rows.items()
        }
        seeds = sorted({seed for _, seed, _ in self._results})
        content = {"seeds": seeds, "kinds": summary}
        (self._folder / "results.json").write_text(json.dumps(content, indent=2) + "\n")
        return table


def format_table(rows: Iterable[tuple[str, Counter[str]]]) -> str:
    """Formats outcomes by kind of fault, and their sums, as a Markdown table."""
    lines = [
        "| fault | injected | recovered bit-identically | refused with one line | lost |",
        "|---|---|---|---|---|",
    ]
    total: Counter[str] = Counter()
    for description, row in rows:
        total += row
        lines.append(_format_row(description, row))
    return "\n".join([*lines, _format_row("**all**", total)])


def _format_row(description: str, row: Counter[str]) -> str:
    cells = [f"{row.total():,}", *(f"{row[name]:,}" for name in OUTCOMES)]
    return f"| {description} | {' | '.join(cells)} |"


def _prepare_digits(folder: Path) -> str:
    """Prepares the digits, in a process of its own, and returns the TFDS folder."""
    from tests.campaign.runs import Process, fork

    data_dir = folder / "data"
    if not data_dir.exists():

        def prepare() -> None:
            from mixer_jax.data.registry import open_dataset

            open_dataset("digits/all", "train", str(data_dir))

        process = Process(fork(prepare, folder / "prepare"), "prepare", folder)
        if process.finish() != 0:
            raise UserError(f"the digits must be prepared, got:\n{process.err}")
    return str(data_dir)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
