"""Kinds of faults.

Each kind is a function that disturbs the run of a `Trial`, checks how its process ends, resumes it,
and returns "recovered" or "refused". It raises LostError if the run does neither as it must, and
NotInjectedError if the run has finished before the fault.
"""

import errno
import signal
from collections.abc import Callable
from typing import NamedTuple

from tests.campaign.preload import CALLS, Action
from tests.campaign.runs import LostError
from tests.campaign.trial import Trial

RECOVERED, REFUSED = "recovered", "refused"
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


class Kind(NamedTuple):
    """Kind of faults.

    Attributes:
        description: Row of the table.
        inject: Function that disturbs a run and recovers it.
        weight: Relative number of faults.
    """

    description: str
    inject: Callable[[Trial], str]
    weight: float = 1.0


def kill_at_random_time(trial: Trial) -> str:
    """Kills the run at a random time."""
    process = trial.start()
    if process.wait(trial.draw_seconds()) is not None:
        trial.check_undisturbed(process)
    process.send(signal.SIGKILL)
    trial.check_end(process, [-signal.SIGKILL])
    return trial.recover()


def kill_in_random_call(trial: Trial) -> str:
    """Kills the run before or in the middle of a random system call that changes the workdir."""
    action = trial.rng.choice([Action.KILL, Action.KILL_INSIDE])
    trial.record(action=action.name)
    trial.faults.arm(trial.folders.disk, action, trial.draw_call(CALLS))
    process = trial.start()
    code = trial.check_end(process, [-signal.SIGKILL])
    if code == 0:
        trial.check_undisturbed(process)
    return trial.recover()


def lose_power(trial: Trial) -> str:
    """Kills the run in a random system call, and discards what had not been synced."""
    sizes = trial.inode_sizes()
    trial.faults.arm(
        trial.folders.disk, Action.KILL, trial.draw_call(CALLS), is_logging=True
    )
    process = trial.start()
    code = trial.check_end(process, [-signal.SIGKILL])
    if code == 0:
        trial.check_undisturbed(process)
    discarded = trial.faults.discard_unsynced(trial.folders.disk, sizes, trial.rng)
    trial.record(discarded=dict(discarded))
    return trial.recover()


def _stop(number: signal.Signals, code: int) -> Callable[[Trial], str]:
    def inject(trial: Trial) -> str:
        process = trial.start()
        if process.wait(trial.draw_seconds()) is not None:
            trial.check_undisturbed(process)
        process.send(number)
        # Before the run handles signals, they end the process.
        trial.check_end(process, [code, -number])
        return trial.recover()

    return inject


def terminate_then_kill(trial: Trial) -> str:
    """Sends SIGTERM at a random time, and kills the run while it saves."""
    process = trial.start()
    if process.wait(trial.draw_seconds()) is not None:
        trial.check_undisturbed(process)
    process.send(signal.SIGTERM)
    seconds = trial.rng.uniform(0, 0.5)
    trial.record(seconds_until_kill=round(seconds, 3))
    process.wait(seconds)
    process.send(signal.SIGKILL)
    trial.check_end(process, [143, -signal.SIGTERM, -signal.SIGKILL])
    return trial.recover()


def suspend(trial: Trial) -> str:
    """Suspends the run for a while; it must finish as if nothing had happened."""
    process = trial.start()
    if process.wait(trial.draw_seconds()) is not None:
        trial.check_undisturbed(process)
    process.send(signal.SIGSTOP)
    seconds = trial.rng.uniform(0.1, 2)
    trial.record(seconds_suspended=round(seconds, 3))
    process.wait(seconds)
    process.send(signal.SIGCONT)
    trial.check_end(process, [])
    trial.check_result(process)
    return RECOVERED


def _fail(error: str, action: Action) -> Callable[[Trial], str]:
    def inject(trial: Trial) -> str:
        calls = _ERRORS[error]
        call = trial.draw_call(calls)
        trial.faults.arm(trial.folders.disk, action, call, calls, error=getattr(errno, error))
        process = trial.start()
        trial.check_end(process, [1, 2])
        if not trial.faults.was_reached:
            trial.check_undisturbed(process)
        return trial.recover()

    return inject


def make_read_only(trial: Trial) -> str:
    """Starts the interrupted run again in a workdir that cannot be written."""
    trial.copy_interrupted_run()
    trial.faults.arm(
        trial.folders.disk, Action.FAIL_FROM_THEN_ON, 1, _ERRORS["EROFS"], error=errno.EROFS
    )
    process = trial.start()
    if trial.check_end(process, [1, 2]) == 0:
        raise LostError("finished although nothing could be written")
    if str(trial.workdir) not in process.error_line:
        raise LostError("the message does not name the workdir")
    return trial.recover()


def move_clock_back(trial: Trial) -> str:
    """Sets the clock back at a random call, by up to a week; the run must not notice."""
    seconds = -trial.rng.randint(1, 7 * 24 * 3600)
    trial.record(clock_seconds=seconds)
    trial.faults.arm(
        trial.folders.disk, Action.MOVE_CLOCK, trial.draw_call(CALLS), clock_seconds=seconds
    )
    process = trial.start()
    trial.check_end(process, [])
    if not trial.faults.was_reached:
        trial.check_undisturbed(process)
    trial.check_result(process)
    return RECOVERED


def start_twice(trial: Trial) -> str:
    """Starts the run twice; one of them must refuse, and the other one must not notice."""
    first = trial.start()
    seconds = trial.rng.choice([0.0, trial.draw_seconds()])
    trial.record(seconds=round(seconds, 3))
    if first.wait(seconds) is not None:
        trial.check_undisturbed(first)
    second = trial.start()
    codes = [trial.check_end(process, [1]) for process in (first, second)]
    if codes == [1, 1]:
        raise LostError("both refuse")
    for process, code in zip((first, second), codes, strict=True):
        if code == 1 and str(trial.workdir) not in process.error_line:
            raise LostError("the message does not name the workdir")
    trial.check_result(second if codes[0] else first)
    return RECOVERED


KINDS: dict[str, Kind] = {
    "kill_time": Kind("SIGKILL at a random time", kill_at_random_time, 6),
    "kill_call": Kind("SIGKILL in a random system call", kill_in_random_call, 8),
    "power_loss": Kind("power loss: SIGKILL, unsynced data discarded", lose_power, 6),
    "sigterm": Kind("SIGTERM", _stop(signal.SIGTERM, 143), 2),
    "sigint": Kind("SIGINT (Ctrl-C)", _stop(signal.SIGINT, 130)),
    "sighup": Kind("SIGHUP (lost connection)", _stop(signal.SIGHUP, 129)),
    "sigterm_kill": Kind("SIGTERM, then SIGKILL within 0.5 s", terminate_then_kill, 2),
    "suspend": Kind("SIGSTOP, SIGCONT within 2 s", suspend),
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
}
