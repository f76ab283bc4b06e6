"""Training runs as real processes, started as users start them, to watch and to stop."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mixer_jax.checkpoints.resolve import list_steps
from mixer_jax.training.metrics import TIMINGS, read_metrics
from tests.helpers.messages import mentions
from tests.helpers.tiny_run import to_flags

STEPS = 60
RUN = {
    "num_steps": STEPS,
    # Large enough that a save takes long enough to be killed during it.
    "model__channels_mlp_dim": 256,
    "model__dropout": 0.1,
    "recipe__ema_decay": 0.9,
    # Does not divide the checkpoint interval: a mean of losses must survive a kill.
    "log_every_steps": 4,
    "checkpoint__every_steps": 10,
    "evals__test__every_steps": 30,
    "tensorboard": False,
}


def start(
    data_dir: str,
    workdir: Path,
    env: dict[str, str] | None = None,
    new_group: bool = False,
    optimized: bool = False,
    cwd: Path | None = None,
    arguments: Sequence[str] = (),
    **overrides: Any,
) -> subprocess.Popen[str]:
    """Starts a run with the settings of `RUN`.

    Args:
        data_dir: TFDS directory with the digits dataset.
        workdir: Workdir of the run.
        env: Additional environment variables.
        new_group: Whether to start a process group, as shells do, for signals to all processes.
        optimized: Whether XLA optimizes the program, as it does for users.
        cwd: Working directory; None: that of the tests.
        arguments: Further arguments of the command.
        **overrides: Changes of `RUN`.
    """
    command = [sys.executable, "-W", "error", "-m", "mixer_jax.main", "--config=configs/digits.py"]
    optimizations = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"} if optimized else {}
    return subprocess.Popen(
        [
            *command,
            f"--workdir={workdir}",
            *to_flags(data_dir, **{**RUN, **overrides}),
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **optimizations, "JAX_PLATFORMS": "cpu", **(env or {})},
        start_new_session=new_group,
        cwd=cwd,
    )


def host_env(num_hosts: int, num_devices: int) -> list[dict[str, str]]:
    """Returns the environment variables of processes with `num_devices` each, for one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(num_hosts),
        "JAX_NUM_CPU_DEVICES": str(num_devices),
    }
    return [shared | {"JAX_PROCESS_ID": str(process_id)} for process_id in range(num_hosts)]


def start_two_hosts(
    data_dir: str, workdir: Path, num_devices: int = 2, **overrides: Any
) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Starts one run on two hosts: processes with `num_devices` each."""
    first, second = (start(data_dir, workdir, env, **overrides) for env in host_env(2, num_devices))
    return first, second


@contextlib.contextmanager
def kill_at_end(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Yields a process and kills it if it still runs at the end of the block, e.g. on a failure."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str], code: int = 0, seconds: float = 180) -> str:
    """Waits for a process, checks its exit code and returns its standard output."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, f"{out}\n{err}"
    return out


def reports_stop(out: str, workdir: Path, step: int, num_steps: int) -> bool:
    """Returns whether the last line names the step, the number of steps and the checkpoint."""
    last = out.splitlines()[-1].replace(f"{workdir}/checkpoints/{step}", "CHECKPOINT")
    return mentions(last, "CHECKPOINT", str(step), str(num_steps))


def first_reported_step(out: str) -> int:
    """Returns the first step in the output of a run: a resumed run starts by naming it."""
    found = re.search(r"\bstep\W{1,2}(\d[\d,]*)", out)
    assert found is not None, out
    return int(found[1].replace(",", ""))


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.0005)


def last_step(workdir: Path) -> int:
    return max((line["step"] for line in read_metrics(str(workdir))), default=0)


def has_reached(workdir: Path, step: int) -> bool:
    return last_step(workdir) >= step


def untimed_metrics(workdir: Path) -> list[dict[str, Any]]:
    lines = read_metrics(str(workdir))
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def final_arrays(workdir: Path, step: int) -> dict[str, list[np.ndarray]]:
    """Restores all arrays of the last checkpoint by item, on any devices it was saved from."""
    assert list_steps(str(workdir))[-1] == step
    folder = workdir / "checkpoints" / f"{step}"
    arrays = {}
    for item in {"params", "ema_params", "optimizer"} & {path.name for path in folder.iterdir()}:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            saved = checkpointer.metadata(folder / item).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            restore = ocp.args.PyTreeRestore(restore_args=as_numpy)
            arrays[item] = jax.tree.leaves(checkpointer.restore(folder / item, restore))
    return arrays
