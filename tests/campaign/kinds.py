"""Kinds of faults.

Each kind is a function that disturbs the run of a `Trial`, checks how its process ends, resumes it,
and returns "recovered" or "refused". It raises LostError if the run does neither as it must, and
NotInjectedError if the run has finished before the fault, or may have started after it.
"""

import contextlib
import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from mixer_jax.checkpoints.resolve import CONFIG_FILE
from mixer_jax.training import loop, setup
from mixer_jax.training import step as training_step
from mixer_jax.training.workdir import read_starts
from tests.campaign.damage import damage_checkpoint
from tests.campaign.hosts import HOST_KINDS
from tests.campaign.runs import LostError, Run
from tests.campaign.trial import CRASHES, Kind, NotInjectedError, Trial
from tests.helpers.faults import CALLS, Action
from tests.helpers.images import encode
from tests.helpers.processes import STEPS, last_step

RECOVERED, REFUSED = "recovered", "refused"
_MAX_SECONDS_UNTIL_KILL = 0.5
_MAX_SECONDS_SUSPENDED = 2.0
# Calls that fail on a full disk, and on one that was mounted read-only or lost its permissions.
_ALLOCATING = ("write", "sync", "create", "mkdir", "truncate")
_CHANGING_NAMES = ("create", "rename", "mkdir", "remove")
_ERRORS = {
    "ENOSPC": _ALLOCATING,
    "EDQUOT": _ALLOCATING,
    "EIO": CALLS,
    "EROFS": tuple(name for name in CALLS if name != "sync"),
    "EACCES": _CHANGING_NAMES,
}


def kill_at_random_time(trial: Trial) -> str:
    """Kills the run at a random time."""
    trial.draw_start()
    run = trial.start_until_random_time()
    run.send(signal.SIGKILL)
    if trial.check_end(run, [-signal.SIGKILL]) == 0:
        trial.check_undisturbed(run)
    return trial.recover()


def kill_in_random_call(trial: Trial) -> str:
    """Kills the run before or in the middle of a random system call that changes the workdir."""
    trial.draw_start()
    action = trial.rng.choice([Action.KILL, Action.KILL_INSIDE])
    trial.record(action=action.name)
    trial.faults.arm(trial.folders.disk, action, trial.draw_call(CALLS))
    run = trial.start()
    if trial.check_end(run, [-signal.SIGKILL]) == 0:
        trial.check_undisturbed(run)
    return trial.recover()


def lose_power(trial: Trial) -> str:
    """Kills the run in a random system call, and discards what had not been synced."""
    trial.draw_start()
    trial.faults.arm(trial.folders.disk, Action.KILL, trial.draw_call(CALLS), is_logging=True)
    run = trial.start()
    if trial.check_end(run, [-signal.SIGKILL]) == 0:
        trial.check_undisturbed(run)
    discarded = trial.faults.discard_unsynced(trial.folders.disk, trial.rng)
    trial.record(discarded=dict(discarded))
    return trial.recover()


def _stop(number: signal.Signals) -> Callable[[Trial], str]:
    """Stops the run by a signal at a random time."""

    def inject(trial: Trial) -> str:
        run = trial.start_until_random_time()
        run.send(number)
        step = last_step(trial.workdir)
        # Before the run handles signals, they end the process.
        code = trial.check_end(run, [128 + number, -number])
        trial.check_stopped(code, step)
        return trial.recover()

    return inject


def terminate_then_kill(trial: Trial) -> str:
    """Sends SIGTERM at a random time, and kills the run while it saves."""
    run = trial.start_until_random_time()
    run.send(signal.SIGTERM)
    step = last_step(trial.workdir)
    seconds = trial.rng.uniform(0, _MAX_SECONDS_UNTIL_KILL)
    trial.record(seconds_until_kill=round(seconds, 3))
    run.wait(seconds)
    run.send(signal.SIGKILL)
    code = trial.check_end(run, [143, -signal.SIGTERM, -signal.SIGKILL])
    trial.check_stopped(code, step)
    return trial.recover()


def suspend(trial: Trial) -> str:
    """Suspends the run for a while; it must finish as if nothing had happened."""
    run = trial.start_until_random_time()
    run.send(signal.SIGSTOP)
    seconds = trial.rng.uniform(0.1, _MAX_SECONDS_SUSPENDED)
    trial.record(seconds_suspended=round(seconds, 3))
    run.wait(seconds)
    run.send(signal.SIGCONT)
    trial.check_end(run, [])
    trial.check_result(run)
    return RECOVERED


def _fail(error: str, action: Action) -> Callable[[Trial], str]:
    """Lets a random system call fail, or all from then on."""

    def inject(trial: Trial) -> str:
        trial.draw_start()
        calls = _ERRORS[error]
        call = trial.draw_call(calls)
        trial.faults.arm(trial.folders.disk, action, call, calls, error=getattr(errno, error))
        run = trial.start()
        trial.check_end(run, [1, 2])
        if not trial.faults.was_reached:
            trial.check_undisturbed(run)
        return trial.recover()

    return inject


def make_read_only(trial: Trial) -> str:
    """Starts the interrupted run again in a workdir that cannot be written."""
    trial.copy_interrupted_run()
    trial.faults.arm(
        trial.folders.disk, Action.FAIL_FROM_THEN_ON, 1, _ERRORS["EROFS"], error=errno.EROFS
    )
    run = trial.start()
    if trial.check_end(run, [1, 2]) == 0:
        raise LostError("finished although nothing could be written")
    if str(trial.workdir) not in run.error_line:
        raise LostError("the message does not name the workdir")
    return trial.recover()


def move_clock_back(trial: Trial) -> str:
    """Sets the clock back at a random call, by up to a week; the run must not notice."""
    seconds = -trial.rng.randint(1, 7 * 24 * 3600)
    trial.record(clock_seconds=seconds)
    trial.faults.arm(
        trial.folders.disk, Action.MOVE_CLOCK, trial.draw_call(CALLS), clock_seconds=seconds
    )
    run = trial.start()
    trial.check_end(run, [])
    if not trial.faults.was_reached:
        trial.check_undisturbed(run)
    trial.check_result(run)
    return RECOVERED


def start_twice(trial: Trial) -> str:
    """Starts the run twice; one of them must refuse, and the other one must not notice."""
    is_simultaneous = trial.rng.random() < 0.5
    trial.record(is_simultaneous=is_simultaneous)
    first = trial.start() if is_simultaneous else trial.start_until_random_time()
    second = trial.start()
    codes = [trial.check_end(run, [1]) for run in (first, second)]
    if codes == [1, 1]:
        raise LostError("both refuse")
    if codes == [0, 0]:
        # The one that started last has found a finished run.
        if read_starts(str(trial.workdir))[-1]["step"] < STEPS:
            raise LostError("both have trained")
        trial.check_undisturbed(first)
    for run, code in zip((first, second), codes, strict=True):
        if code == 1 and str(trial.workdir) not in run.error_line:
            raise LostError("the message does not name the workdir")
    trial.check_result(second if codes[0] else first)
    return RECOVERED


def put_nan_into_gradient(trial: Trial) -> str:
    """Makes one entry of the gradient NaN at a random step.

    The run must end in one line without saving it, and resume once the cause is gone.
    """
    step, random_index = trial.rng.randint(1, STEPS), trial.rng.randrange(2**20)
    trial.record(step=step)

    def add_nan(gradient: Any) -> Any:
        leaves, tree = jax.tree.flatten(gradient)
        index = random_index % len(leaves)
        leaves[index] = leaves[index].at[(0,) * leaves[index].ndim].set(jnp.nan)
        return jax.tree.unflatten(tree, leaves)

    jit_train_step, differentiate = setup.jit_train_step, training_step.sharded_value_and_grad

    def differentiate_badly(*args: Any) -> Any:
        value_and_grad = differentiate(*args)

        def bad_value_and_grad(*args: Any) -> tuple[Any, Any]:
            value, gradient = value_and_grad(*args)
            return value, add_nan(gradient)

        return bad_value_and_grad

    def jit_both(take_step: Any, *args: Any) -> Any:
        def take_bad_step(*args: Any) -> Any:
            with mock.patch.object(training_step, "sharded_value_and_grad", differentiate_badly):
                return take_step(*args)

        # Two programs: a condition in the program could change the rounding of the other steps.
        good, bad = jit_train_step(take_step, *args), jit_train_step(take_bad_step, *args)
        return lambda state, *args: (bad if state.step == step - 1 else good)(state, *args)

    run = trial.start(lambda host: setattr(setup, "jit_train_step", jit_both))
    if trial.check_end(run, [1]) == 0:
        raise LostError("finished with a gradient that is not a number")
    if "must be finite" not in run.error_line:
        raise LostError("the message does not name the cause")
    trial.recover()
    return REFUSED


def limit_memory(trial: Trial) -> str:
    """Limits the address space to slightly more than the run uses while it loads or evaluates.

    Libraries that cannot allocate memory may abort. docs/reliability.md describes two that wait
    forever instead, which is why some memory is left, and the limit does not hold during saves.
    """
    mebibytes = trial.rng.choice([1, 10, 100])
    phase = trial.rng.choice(["loading", "evaluation"])
    trial.record(mebibytes=mebibytes, phase=phase)
    make_batches, run_evaluator = loop.make_train_batches, loop.TrainLoop.run_evaluator
    save = loop.TrainLoop.save

    def set_limit() -> None:
        limit = _measure_address_space() + mebibytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    def lift_limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)

    def load_with_little_memory(*args: Any) -> Any:
        set_limit()
        return make_batches(*args)

    def save_with_memory(self: Any, step: int) -> None:
        lift_limit()
        save(self, step)

    def evaluate_with_little_memory(self: Any, name: str) -> Any:
        self.checkpoints.wait()
        set_limit()
        try:
            return run_evaluator(self, name)
        finally:
            lift_limit()

    def replace_functions(host: int) -> None:
        if phase == "loading":
            loop.make_train_batches = load_with_little_memory  # type: ignore[assignment]
            loop.TrainLoop.save = save_with_memory  # type: ignore[method-assign]
        else:
            loop.TrainLoop.run_evaluator = evaluate_with_little_memory  # type: ignore[method-assign]

    run = trial.start(replace_functions)
    code = trial.check_end(run, [1, *CRASHES])
    if code == 1 and _has_failed_evaluation(run):
        # An evaluation during training that has failed is not repeated.
        trial.check_arrays(trial.resume())
        return REFUSED
    return trial.recover()


def _measure_address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _draw_image(trial: Trial) -> Path:
    image = trial.rng.choice(sorted(trial.folders.images.glob("*/*/*.png")))
    trial.record(image=str(image.relative_to(trial.folders.images)))
    return image


def _replace_image(replace: Callable[[Path], object]) -> Callable[[Trial], str]:
    """Disturbs a run on image files, of which one changes, and restores the file.

    With the settings of these runs, one unusable image ends the run in one line. A run does not
    repeat a step that has used a substitute, nor an evaluation during training that has failed.
    """

    def inject(trial: Trial) -> str:
        trial.use_images()
        image = _draw_image(trial)
        original = image.read_bytes()
        run = trial.start_until_random_time()
        has_opened_data = (trial.workdir / CONFIG_FILE).exists()
        # At once, as a program that copies data does.
        temporary = trial.folders.root / "replacement"
        replace(temporary)
        if temporary.exists():
            os.replace(temporary, image)
        else:
            image.unlink()
        code = trial.check_end(run, [1, 2])
        image.unlink(missing_ok=True)
        image.write_bytes(original)
        if code == 0:
            if not has_opened_data:
                raise NotInjectedError("the run may have listed its data with the other file")
            trial.check_result(run)
            return RECOVERED
        if str(image) not in run.error_line and "bad_images" not in run.error_line:
            raise LostError("the message names neither the image nor the log of bad images")
        bad_images = trial.workdir / "bad_images_0.jsonl"
        has_substitute = bad_images.exists() and image.name in bad_images.read_text()
        has_failed_evaluation = _has_failed_evaluation(run)
        trial.record(has_substitute=has_substitute, has_failed_evaluation=has_failed_evaluation)
        if not has_substitute and not has_failed_evaluation:
            return trial.recover()
        resumed = trial.resume()
        if not has_substitute:
            trial.check_arrays(resumed)
        return REFUSED

    return inject


def _has_failed_evaluation(run: Run) -> bool:
    return run.error_line.startswith("error: evaluation")


def _write_other_image(path: Path) -> None:
    path.write_bytes(encode(np.zeros((20, 20, 3), np.uint8), "PNG"))


def kill_loader_process(trial: Trial) -> str:
    """Kills one of two processes that load the images."""
    trial.use_images(loader__num_workers=2)
    run = trial.start_until_random_time()
    # They start after the run has.
    while not (victims := _list_loader_processes(run)):
        if run.wait(0.01) is not None:
            trial.check_undisturbed(run)
    with contextlib.suppress(ProcessLookupError):
        os.kill(trial.rng.choice(victims), signal.SIGKILL)
    # 0: it was not needed any more.
    trial.check_end(run, [1])
    return trial.recover()


def _list_loader_processes(run: Run) -> list[int]:
    found = []
    for path in Path(f"/proc/{run.processes[0].pid}/task").glob("*/children"):
        for child in path.read_text().split():
            with contextlib.suppress(OSError):
                if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                    found.append(int(child))
    return sorted(found)


KINDS: dict[str, Kind] = {
    "kill_time": Kind("SIGKILL at a random time", kill_at_random_time, 6),
    "kill_call": Kind("SIGKILL in a random system call", kill_in_random_call, 8),
    "power_loss": Kind("power loss: SIGKILL, unsynced data discarded", lose_power, 6),
    "sigterm": Kind("SIGTERM", _stop(signal.SIGTERM), 2),
    "sigint": Kind("SIGINT (Ctrl-C)", _stop(signal.SIGINT)),
    "sighup": Kind("SIGHUP (lost connection)", _stop(signal.SIGHUP)),
    "sigterm_kill": Kind(
        f"SIGTERM, then SIGKILL within {_MAX_SECONDS_UNTIL_KILL:g} s", terminate_then_kill, 2
    ),
    "suspend": Kind(f"SIGSTOP, SIGCONT within {_MAX_SECONDS_SUSPENDED:g} s", suspend),
    **{
        f"{error.lower()}_once": Kind(f"one call fails: {error}", _fail(error, Action.FAIL_ONCE))
        for error in _ERRORS
    },
    **{
        f"{error.lower()}_lasting": Kind(
            f"all calls fail from one on: {error}", _fail(error, Action.FAIL_FROM_THEN_ON)
        )
        for error in _ERRORS
    },
    "read_only": Kind("read-only workdir", make_read_only, 0.5),
    "clock_back": Kind("clock set back", move_clock_back),
    "two_runs": Kind("two runs in one workdir", start_twice),
    "nan": Kind("NaN in one gradient", put_nan_into_gradient),
    "memory": Kind("limit on memory", limit_memory),
    "image_changed": Kind("an image file changes", _replace_image(_write_other_image)),
    "image_vanished": Kind("an image file vanishes", _replace_image(lambda path: None)),
    "image_hangs": Kind("an image file becomes a pipe that blocks", _replace_image(os.mkfifo)),
    "loader_killed": Kind("SIGKILL of a loader process", kill_loader_process),
    "checkpoint": Kind("a damaged file of the newest checkpoint", damage_checkpoint, 12),
    **HOST_KINDS,
}
