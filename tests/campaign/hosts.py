"""Kinds of faults of runs on several hosts.

When a host is lost, the others end in time: with one line on standard error, or aborted by JAX. The
same command then resumes the run on the same hosts.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence

from mixer_jax.checkpoints.resolve import list_steps
from tests.campaign.damage import damage_checkpoint
from tests.campaign.network import ADDRESSES, Network
from tests.campaign.runs import HEARTBEAT_TIMEOUT_SECONDS, LostError, Run
from tests.campaign.trial import Kind, NotInjectedError, Trial
from tests.helpers.processes import last_step

# Time in which a host ends after it has noticed that another one is lost, on a busy machine.
_MAX_SECONDS_UNTIL_END = 60.0
_MAX_SECONDS_PAUSED = 2.0
# JAX aborts a host whose heartbeats fail.
_ABORTED = -signal.SIGABRT


def _start_until_random_time(
    trial: Trial, num_hosts: int, before: Callable[[int], object] = lambda host: None
) -> Run:
    trial.use_hosts(num_hosts)
    trial.draw_start()
    trial.faults.arm(trial.folders.disk)
    run = trial.start(before)
    trial.wait_for_random_time(run)
    return run


def _draw_host(trial: Trial) -> int:
    host = trial.rng.randrange(trial.num_hosts)
    trial.record(host=host)
    return host


def _check_ends(trial: Trial, run: Run, indices: Sequence[int], *codes: int) -> list[int]:
    """Waits for the end of hosts after another one was lost; returns their exit codes.

    Args:
        trial: Trial of the run.
        run: The run.
        indices: Hosts to wait for.
        *codes: Exit codes that are right, and signals as negative numbers, other than 0, and 1
            after one line on standard error.

    Raises:
        LostError: One hangs, prints a stack trace, or ends otherwise.
    """
    start = time.monotonic()
    deadline = start + HEARTBEAT_TIMEOUT_SECONDS + _MAX_SECONDS_UNTIL_END
    found = []
    for index in indices:
        process = run.processes[index]
        code = process.finish(deadline - time.monotonic())
        found.append(code)
        if code not in (0, 1, *codes):
            raise LostError(f"{process.name} ended with {code}")
        if code == 1:
            trial.record(message=process.error_line)
        elif "Traceback" in process.err or (process.err and code != _ABORTED):
            raise LostError(f"{process.name} ended with {code} and printed an error")
    seconds = [*trial.parameters.get("seconds_until_end", []), round(time.monotonic() - start, 1)]
    trial.record(codes=trial.parameters.get("codes", []) + found, seconds_until_end=seconds)
    return found


def _recover(trial: Trial, run: Run, codes: Sequence[int]) -> str:
    if not any(codes):
        trial.check_undisturbed(run)
    return trial.recover()


def kill(trial: Trial, num_hosts: int) -> str:
    """Kills one host at a random time."""
    run = _start_until_random_time(trial, num_hosts)
    host = _draw_host(trial)
    run.processes[host].send(signal.SIGKILL)
    codes = _check_ends(trial, run, range(num_hosts), -signal.SIGKILL, _ABORTED)
    return _recover(trial, run, codes)


def stop(trial: Trial, num_hosts: int) -> str:
    """Suspends one host at a random time until the others have ended; then it must end, too."""
    run = _start_until_random_time(trial, num_hosts)
    host = _draw_host(trial)
    run.processes[host].send(signal.SIGSTOP)
    others = [index for index in range(num_hosts) if index != host]
    codes = _check_ends(trial, run, others, _ABORTED)
    run.processes[host].send(signal.SIGCONT)
    codes += _check_ends(trial, run, [host], _ABORTED)
    return _recover(trial, run, codes)


def pause(trial: Trial, num_hosts: int) -> str:
    """Suspends one host for a moment; the run must finish as if nothing had happened."""
    run = _start_until_random_time(trial, num_hosts)
    process = run.processes[_draw_host(trial)]
    process.send(signal.SIGSTOP)
    seconds = trial.rng.uniform(0.1, _MAX_SECONDS_PAUSED)
    trial.record(seconds_suspended=round(seconds, 3))
    time.sleep(seconds)
    process.send(signal.SIGCONT)
    if run.finish() != 0:
        raise LostError(f"{process.name} was suspended for a moment, and the run failed")
    trial.check_result(run)
    return "recovered"


def terminate(trial: Trial, num_hosts: int) -> str:
    """Sends SIGTERM to one host; all must stop after the same step, and save it."""
    run = _start_until_random_time(trial, num_hosts)
    host = _draw_host(trial)
    run.processes[host].send(signal.SIGTERM)
    step = last_step(trial.workdir)
    # Before the run handles signals, it ends the host, and the others lose it.
    codes = _check_ends(trial, run, range(num_hosts), 143, -signal.SIGTERM, _ABORTED)
    for code in codes:
        trial.check_stopped(code, step)
    if 143 in codes:
        saved = list_steps(str(trial.workdir))[-1]
        if set(codes) != {143} or f"stopped after step {saved:,}" not in run.out:
            raise LostError(f"the hosts ended with {codes}, and have saved step {saved}")
    return _recover(trial, run, codes)


def partition(trial: Trial, num_hosts: int) -> str:
    """Cuts the network between one host and the others at a random time."""
    host = trial.rng.randrange(num_hosts)
    # The first side's packets are lost, and the second one cannot send any.
    side = trial.rng.randrange(2)
    trial.record(host=host, side=side)
    sides = [side if index == host else 1 - side for index in range(num_hosts)]
    with contextlib.ExitStack() as stack:
        try:
            network = stack.enter_context(Network())
        except OSError as error:
            raise NotInjectedError(f"no network can be created ({error})") from None

        def join(index: int) -> None:
            network.move_process(sides[index])
            port = os.environ["JAX_COORDINATOR_ADDRESS"].rpartition(":")[2]
            os.environ["JAX_COORDINATOR_ADDRESS"] = f"{ADDRESSES[sides[0]]}:{port}"

        run = _start_until_random_time(trial, num_hosts, join)
        network.cut()
        codes = _check_ends(trial, run, range(num_hosts), _ABORTED)
    return _recover(trial, run, codes)


def damage_checkpoint_of_two(trial: Trial) -> str:
    """Damages a checkpoint that two hosts have saved; a quarter of the runs resumes on one host."""
    trial.use_hosts(2)
    is_on_one_host = trial.rng.random() < 0.25
    trial.record(is_on_one_host=is_on_one_host)
    if is_on_one_host:
        trial.use_one_host()
    return damage_checkpoint(trial)


def _on_hosts(num_hosts: int, inject: Callable[[Trial, int], str]) -> Callable[[Trial], str]:
    return lambda trial: inject(trial, num_hosts)


# Description, function and relative number of the faults of one host.
_FAULTS: dict[str, tuple[str, Callable[[Trial, int], str], float]] = {
    "kill": ("SIGKILL", kill, 2.0),
    "stop": ("SIGSTOP until the others have ended", stop, 1.0),
    "pause": (f"SIGSTOP, SIGCONT within {_MAX_SECONDS_PAUSED:g} s", pause, 1.0),
    "sigterm": ("SIGTERM", terminate, 1.0),
    "partition": ("cut off from the network", partition, 1.0),
}

HOST_KINDS = {
    **{
        f"{name}_{num_hosts}_hosts": Kind(
            f"one of {num_hosts} hosts: {description}",
            _on_hosts(num_hosts, inject),
            factor / num_hosts,
        )
        for num_hosts in (2, 4)
        for name, (description, inject, factor) in _FAULTS.items()
    },
    "checkpoint_2_hosts": Kind(
        "a damaged file of the newest checkpoint of two hosts", damage_checkpoint_of_two, 6
    ),
}
