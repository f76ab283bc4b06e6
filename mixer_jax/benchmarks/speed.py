"""Training and inference: images a second, use of the chip, memory, beside the peers."""

import argparse
import sys
from importlib import metadata
from typing import Any

from mixer_jax.benchmarks.asked import (
    add_work,
    missing_of_timm,
    read_ours,
    read_peers,
    read_setting,
)
from mixer_jax.benchmarks.batch_size import Tried, search
from mixer_jax.benchmarks.comparison import Comparison, ask_facts, compare
from mixer_jax.benchmarks.contestants import Contestant, Setting
from mixer_jax.benchmarks.outputs import add_outputs, check_outputs, say, write_outputs
from mixer_jax.benchmarks.table import print_comparisons
from mixer_jax.benchmarks.workers import FailedError, Worker
from mixer_jax.errors import RunError

DESCRIPTION = "Measure training and inference of a Mixer on this machine, beside their peers."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what these modes take to the command line."""
    add_work(parser)
    parser.add_argument(
        "--batch_size",
        default="auto",
        help="images a step; default: auto, doubled until ours gains no more than 2 %% by it",
    )
    parser.add_argument(
        "--peers", help="none, or of reference,timm; default: both, as far as they are installed"
    )
    parser.add_argument(
        "--no_torch_compile", action="store_true", help="leave out timm compiled by PyTorch"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timings of each; default: 5")
    parser.add_argument("--profile", metavar="DIR", help="write a trace of ours for each mode")
    add_outputs(parser, picture=True)


def run(known: argparse.Namespace) -> None:
    """Measures as the command line says and prints the result.

    Raises:
        UserError: an argument is out of range.
        RunFailedError: ours cannot be measured.
    """
    settings = [read_setting(known, mode) for mode in known.mode.split(",")]
    ours = [read_ours(known, setting.mode) for setting in settings]
    peers = read_peers(known)
    check_outputs(known)

    facts = ask_facts(settings[0], [contestant for group in ours for contestant in group])
    # Not sooner: a mistake is told in one line.
    if known.peers is None and (missing := missing_of_timm()):
        print(f"{missing} is not installed: timm is left out", file=sys.stderr)
    if facts["platform"] not in ("cpu", "gpu") and any(p.framework == "torch" for p in peers):
        print(f"timm does not run on {facts['platform']}: it is left out", file=sys.stderr)
        peers = [peer for peer in peers if peer.framework == "jax"]
    if any(peer.framework == "torch" for peer in peers):
        facts |= {name: metadata.version(name) for name in ("torch", "timm")}
    modes = []
    for setting, contestants in zip(settings, ours, strict=True):
        setting, tried = setting._replace(dtype=facts["dtype"]), None
        if not setting.batch_size:
            setting, tried = find_batch_size(setting, contestants[0], facts["platform"])
        profile = f"{known.profile}/{setting.mode}" if known.profile else ""
        everyone = [*contestants, *peers]
        result = compare(setting, everyone, known.rounds, facts["platform"], profile)
        modes.append(_as_json(result, tried))
    report = {**facts, "rounds": known.rounds, "modes": modes}
    write_outputs(known, report)
    if not known.json:
        print_comparisons(report)


def find_batch_size(
    setting: Setting, contestant: Contestant, platform: str
) -> tuple[Setting, list[Tried]]:
    """Returns the setting with the batch size at which ours is fast, and all that were tried.

    Raises:
        RunFailedError: it fails for another reason than memory, or with one image.
    """
    with Worker("jax", setting) as worker:

        def rate_of(batch_size: int) -> float | None:
            say(f"{setting.mode}: {batch_size} images a step are tried")
            for _ in range(2):
                try:
                    rate: float = worker.ask("rate", contestant=contestant, batch_size=batch_size)
                except FailedError as error:
                    if not error.out_of_memory:
                        raise RunError(f"{contestant.name} failed: {error}") from error
                    # Once more in a process whose memory does not lie in pieces.
                    worker.stop()
                else:
                    return rate
            return None

        size, tried = search(rate_of, 8 if platform == "cpu" else 64)
    if not size:
        raise RunError("not even one image fits into the device's memory")
    return setting._replace(batch_size=size), tried


def _as_json(result: Comparison, tried: list[Tried] | None) -> dict[str, Any]:
    return {
        **result.setting._asdict(),
        "searched": tried and [trial._asdict() for trial in tried],
        "product_flops_per_second": result.product_rates,
        "apart": result.apart,
        "contestants": [row._asdict() for row in result.rows],
    }
