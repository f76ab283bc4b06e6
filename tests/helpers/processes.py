"""Training runs as real processes, as a user starts them, to be watched and stopped."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
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
    # Large enough that saving it takes a moment in which to be killed.
    "model__channels_mlp_dim": 256,
    "model__dropout": 0.1,
    "recipe__ema_decay": 0.9,
    # Not a divisor of the checkpoints' interval: a mean over steps outlives a kill.
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
    as_users: bool = False,
    **changes: Any,
) -> subprocess.Popen[str]:
    """Starts a run of `RUN`.

    Args:
        data_dir: where digits are prepared.
        workdir: of the run.
        env: changes of the environment.
        new_group: as a shell does, for signals to all of its processes.
        as_users: with all optimizations of XLA.
        **changes: of `RUN`.
    """
    command = [sys.executable, "-W", "error", "-m", "mixer_jax.main", "--config=configs/digits.py"]
    arguments = to_flags(data_dir, **{**RUN, **changes})
    quick = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0" if as_users else quick}
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "JAX_PLATFORMS": "cpu", **(env or {})},
        start_new_session=new_group,
    )


def two_host_env(devices: int) -> list[dict[str, str]]:
    """Returns the environments of two hosts, of so many devices each, that meet at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    common = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": f"{devices}",
    }
    return [common | {"JAX_PROCESS_ID": f"{number}"} for number in range(2)]


def start_two_hosts(
    data_dir: str, workdir: Path, devices: int = 2, **changes: Any
) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Starts one run on two hosts: processes of so many devices each."""
    first, second = (start(data_dir, workdir, env, **changes) for env in two_host_env(devices))
    return first, second


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=180)
    assert process.returncode == code, f"{out}\n{err}"
    return out


def says_where_it_stopped(out: str, workdir: Path, step: int, num_steps: int) -> bool:
    """Returns whether a run's last line tells the step, of how many, and the checkpoint."""
    last = out.splitlines()[-1].replace(f"{workdir}/checkpoints/{step}", "CHECKPOINT")
    return mentions(last, "CHECKPOINT", str(step), str(num_steps))


def first_step_told(out: str) -> int:
    """Returns the first step that a run names: the one it was resumed at, if it was."""
    found = re.search(r"\bstep\W{1,2}(\d[\d,]*)", out)
    assert found is not None, out
    return int(found[1].replace(",", ""))


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.0005)


def last_step(workdir: Path) -> int:
    return max((line["step"] for line in read_metrics(str(workdir))), default=0)


def has_reached(workdir: Path, step: int) -> bool:
    return last_step(workdir) >= step


def untimed_metrics(workdir: Path) -> list[dict[str, Any]]:
    lines = read_metrics(str(workdir))
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def final_arrays(workdir: Path, step: int) -> dict[str, list[np.ndarray]]:
    """Returns all that the checkpoint of the last step holds, by item, wherever it was made."""
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
