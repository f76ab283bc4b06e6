"""The training step: time, memory and compilation, setting against setting in one run.

Needs neither data nor TensorFlow.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mixer_jax import command_line
from mixer_jax.errors import UserError
from mixer_jax.model.variants import check_image_size, forward_flops, resolve_widths

DESCRIPTION = "Measure the training step of a Mixer on this machine."


class Case(NamedTuple):
    """One setting to measure.

    Attributes:
        unroll: blocks per iteration of the scan, 0: all.
        remat: name of the rematerialisation policy.
    """

    unroll: int
    remat: str


class Measurement(NamedTuple):
    """What one setting costs.

    Attributes:
        unroll: of the setting.
        remat: of the setting.
        compile_seconds: from lowered program to executable, without a cache.
        temporary_bytes: of device memory beyond parameters, moments and batch.
        step_seconds: median over rounds.
        images_per_second: at that median.
        ratio: median over rounds of this step's time to the first setting's in the same round.
    """

    unroll: int
    remat: str
    compile_seconds: float
    temporary_bytes: int
    step_seconds: float
    images_per_second: float
    ratio: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what this mode takes to the command line."""
    parser.add_argument("--variant", default="B/16", help="default: B/16")
    parser.add_argument("--image_size", type=int, default=224, help="pixels; default: 224")
    parser.add_argument("--num_classes", type=int, default=1000, help="default: 1000")
    parser.add_argument("--batch_size", type=int, default=8, help="images a step; default: 8")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--unroll", default="0", help="settings to compare, e.g. 1,12; 0: all")
    parser.add_argument(
        "--remat", default="none", help="settings to compare, e.g. none,dots,mlp_hidden,full"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each; default: 5")


def run(known: argparse.Namespace) -> None:
    """Measures as the command line says and prints the result.

    Raises:
        UserError: an argument is out of range.
    """
    widths = resolve_widths(known.variant)
    check_image_size(known.image_size, known.image_size, widths.patch_size)
    cases = [
        Case(unroll, remat)
        for unroll, remat in itertools.product(
            _whole_numbers("--unroll", known.unroll, widths.num_blocks), known.remat.split(",")
        )
    ]
    for name in ("batch_size", "num_classes", "rounds"):
        if getattr(known, name) < 1:
            raise UserError(f"--{name}={getattr(known, name)} is out of range; pass 1 or more")

    # From here on the heavy libraries are needed. No cache: compilation is what is measured.
    command_line.set_up_libraries(compilation_cache="")
    import jax

    from mixer_jax.model.mixer import REMAT_POLICIES

    for remat in known.remat.split(","):
        if remat != "none" and remat not in REMAT_POLICIES:
            choices = ", ".join(["none", *REMAT_POLICIES])
            raise UserError(f"--remat={remat} is unknown; choose of {choices}")
    measurements = measure(cases, known)
    flops = 3 * forward_flops(widths, known.image_size, known.num_classes) * known.batch_size
    device = jax.devices()[0].device_kind
    if known.json:
        rows = [m._asdict() for m in measurements]
        print(json.dumps({"device": device, "jax": jax.__version__, "measurements": rows}))
        return
    print(
        f"training step of Mixer-{known.variant}, {known.image_size} px, {known.batch_size} "
        f"images, {known.dtype}, {device}, jax {jax.__version__}"
    )
    print("unroll       remat  compile s  temporary GiB  step s  images/s  GFLOP/s  ratio to first")
    for m in measurements:
        print(
            f"{m.unroll or 'all':>6}  {m.remat:>10}  {m.compile_seconds:9.1f}  "
            f"{m.temporary_bytes / 2**30:13.2f}  {m.step_seconds:6.3f}  "
            f"{m.images_per_second:8.2f}  {flops / m.step_seconds / 1e9:7.1f}  {m.ratio:14.2f}"
        )


def measure(cases: Sequence[Case], options: argparse.Namespace) -> list[Measurement]:
    """Returns what each case costs, in the order of `cases`.

    Args:
        cases: to compare.
        options: the parsed command line.
    """
    compiled = [_compile(case, options) for case in cases]
    times: list[list[float]] = [[] for _ in cases]
    for round_number in range(options.rounds + 1):
        for case_times, (step, _, _) in zip(times, compiled, strict=True):
            start = time.perf_counter()
            step()
            if round_number:  # The first round warms up.
                case_times.append(time.perf_counter() - start)
    measurements = []
    for case, case_times, (_, seconds, temporary) in zip(cases, times, compiled, strict=True):
        median = statistics.median(case_times)
        ratio = statistics.median(a / b for a, b in zip(case_times, times[0], strict=True))
        rate = options.batch_size / median
        measurements.append(Measurement(*case, seconds, temporary, median, rate, ratio))
    return measurements


def _compile(case: Case, options: argparse.Namespace) -> tuple[Callable[[], None], float, int]:
    """Returns a function that takes one step, the seconds to compile it, its temporary bytes."""
    import functools

    import jax
    import jax.numpy as jnp

    from mixer_jax.model.mixer import build_model
    from mixer_jax.parallel.sharding import make_mesh
    from mixer_jax.training.optimizer import make_optimizer, make_schedule
    from mixer_jax.training.step import create_state, train_step

    section = {"variant": options.variant, "dtype": options.dtype, **case._asdict()}
    model = build_model(section, options.num_classes)
    schedule = make_schedule(
        1000, learning_rate=1e-3, warmup_steps=10, decay="linear", end_learning_rate=0.0
    )
    tx = make_optimizer(
        schedule,
        name="adam",
        weight_decay=0.1,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        momentum=0.0,
        clip_norm=1.0,
    )
    step = functools.partial(
        train_step,
        model=model,
        tx=tx,
        schedule=schedule,
        mesh=make_mesh(1, 1, jax.devices()[:1]),
        num_classes=options.num_classes,
        seed=0,
        loss="sigmoid",
        label_smoothing=0.0,
        mixup=0.0,
        accumulation_steps=1,
        ema_decay=0.0,
    )
    size, count = options.image_size, options.batch_size
    make_state = functools.partial(create_state, jax.random.key(0), model, tx, size, ema=False)
    state: Any = jax.jit(make_state)()
    batch = {
        "image": jax.random.randint(jax.random.key(1), (count, size, size, 3), 0, 256, jnp.uint8),
        "label": jnp.zeros(count, jnp.int32),
    }
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory else 0

    def take_step() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    return take_step, seconds, temporary


def _whole_numbers(flag: str, text: str, largest: int) -> list[int]:
    numbers = [int(part) if part.isdecimal() else -1 for part in text.split(",")]
    if not all(0 <= number <= largest for number in numbers):
        raise UserError(f"{flag}={text} is no list of whole numbers from 0 to {largest}")
    return numbers
