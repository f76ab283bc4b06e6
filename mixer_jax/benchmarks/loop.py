"""`--mode=loop`: time per step of the training loop next to that of a bare loop.

The bare loop calls the compiled training step with the same batch again and again, and reads
nothing. The training loop takes the same steps on the same batch, and also reads and checks the
metrics of each step, counts bad images, reacts to signals, writes metrics.jsonl and TensorBoard
events, and prints its progress, with the default settings of a run. Neither loads data or saves
checkpoints. The model is tiny, so that the time of the host counts. The loops alternate in rounds.
"""

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixer_jax.benchmarks.compare import rotate
from mixer_jax.benchmarks.report import Column, print_table
from mixer_jax.cli.common import check_positive
from mixer_jax.errors import RunError

if TYPE_CHECKING:
    from mixer_jax.config.schema import RunConfig

DESCRIPTION = "Measure what the training loop takes per step on top of the compiled step."

_IMAGES_PER_DEVICE = 8
_BARE, _LOOP = "bare loop", "training loop"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this mode."""
    parser.add_argument("--steps", type=int, default=500, help="steps per round; default: 500")
    parser.add_argument("--rounds", type=int, default=21, help="timed rounds; default: 21")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times both loops in alternating rounds.

    Raises:
        UserError: An argument is out of range, or JAX_PLATFORMS names absent devices.
        RunError: A signal has stopped the training loop.
    """
    check_positive(args, "steps", "rounds")
    import jax

    from mixer_jax.distributed.multihost import check_devices
    from mixer_jax.training.loop import TrainLoop

    check_devices()
    times: dict[str, list[float]] = {_BARE: [], _LOOP: []}
    cpu_times: dict[str, list[float]] = {_BARE: [], _LOOP: []}
    # More steps than are taken: a run saves a checkpoint at its last one.
    config = _tiny_config(jax.device_count(), num_steps=(args.rounds + 2) * args.steps)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        # Both streams are a file, as those of a job are.
        log = stack.enter_context(Path(folder, "log.txt").open("w"))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        loop = TrainLoop(config, f"{folder}/run", None, None, stack)
        batch = next(iter(loop.batches))
        state = loop.experiment.create_state()

        def run_bare_loop() -> None:
            nonlocal state
            for repeated in itertools.repeat(batch, args.steps):
                state, _ = loop.experiment.train_step(state, repeated, loop.hyperparams)
            jax.block_until_ready(state)

        def run_training_loop() -> None:
            loop.batches = itertools.repeat(batch, args.steps)
            result = loop.run()
            jax.block_until_ready(loop.state)
            if result.stopped_by is not None:
                raise RunError(f"{result.stopped_by.name}: stopped before the last round.")
            loop.start_step = result.step

        tasks: dict[str, Callable[[], None]] = {_BARE: run_bare_loop, _LOOP: run_training_loop}
        # The first round warms up.
        for number in range(args.rounds + 1):
            for name, task in rotate([*tasks.items()], number):
                start, cpu_start = time.perf_counter(), time.process_time()
                task()
                seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
                if number:
                    times[name].append(seconds / args.steps)
                    cpu_times[name].append(cpu_seconds / args.steps)
    return {
        "device": jax.devices()[0].device_kind,
        "batch_size": config.batch_size,
        "steps": args.steps,
        "rounds": args.rounds,
        "measurements": [
            {
                "name": name,
                "seconds": statistics.median(times[name]),
                "cpu_seconds": statistics.median(cpu_times[name]),
                **_summarize_ratios(times[name], times[_BARE]),
            }
            for name in tasks
        ],
        "overhead_seconds": statistics.median(
            ours - bare for ours, bare in zip(times[_LOOP], times[_BARE], strict=True)
        ),
    }


def print_report(report: dict[str, Any]) -> None:
    """Prints the table."""
    print(
        f"{report['device']}, {report['batch_size']} images per step, median of {report['rounds']} "
        f"rounds of {report['steps']} steps\n"
    )
    columns = [
        Column("µs/step", "seconds", ".1f", 1e6),
        Column("CPU µs/step", "cpu_seconds", ".1f", 1e6),
        Column("ratio", "ratio", ".3f"),
        Column("lower quartile", "lower_quartile", ".3f"),
        Column("upper quartile", "upper_quartile", ".3f"),
    ]
    print_table(report["measurements"], columns)
    print(f"\noverhead per step: {1e6 * report['overhead_seconds']:.1f} µs")


def _tiny_config(num_devices: int, num_steps: int) -> "RunConfig":
    """Builds a run of a tiny model on synthetic data, with the default settings of logging."""
    from mixer_jax.config.config import get_default, parse

    config = get_default()
    config.num_steps = num_steps
    config.batch_size = _IMAGES_PER_DEVICE * num_devices
    config.image_size = 16
    config.dataset.name = "synthetic"
    config.dataset.num_classes = 10
    config.model.variant = "custom"
    config.model.num_blocks = 2
    config.model.patch_size = 4
    config.model.hidden_dim = 16
    config.model.tokens_mlp_dim = 8
    config.model.channels_mlp_dim = 16
    config.optimizer.warmup_steps = 0
    config.checkpoint.every_steps = 0
    return parse(config)


def _summarize_ratios(values: list[float], base: list[float]) -> dict[str, float]:
    """Computes the ratio to the base in the same round: its median and its quartiles."""
    ratios = sorted(a / b for a, b in zip(values, base, strict=True))
    lower, upper = (ratios[round(q * (len(ratios) - 1))] for q in (0.25, 0.75))
    return {"ratio": statistics.median(ratios), "lower_quartile": lower, "upper_quartile": upper}
