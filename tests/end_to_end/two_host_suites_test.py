"""A test of a transfer suite on two hosts: two real processes that meet."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.messages import mentions
from tests.helpers.processes import finish, two_host_env
from tests.helpers.tiny_suite import save_weights

SUITE = """
from mixer_jax.suites.tasks import Suite
from tests.helpers.tiny_suite import LOW, PROBE

SUITE = Suite("small", "digits, quickly", (LOW, PROBE))
"""


def begin(place: Path, data_dir: str, workdir: Path, **changes: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "mixer_jax.transfer", "--no_throughput"]
    command += [f"--checkpoint={place}/weights", f"--suite={place}/small.py"]
    command += [f"--workdir={workdir}", f"--data_dir={data_dir}"]
    pipe = subprocess.PIPE
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **changes}
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)


def rows(workdir: Path) -> list[dict[str, Any]]:
    return json.loads((workdir / "results.json").read_text())["rows"]


def test_two_hosts_make_the_table_of_one(tmp_path: Path, digits_dir: str) -> None:
    save_weights(tmp_path)
    (tmp_path / "small.py").write_text(SUITE)
    both = [begin(tmp_path, digits_dir, tmp_path / "two", **env) for env in two_host_env(devices=1)]
    alone = begin(tmp_path, digits_dir, tmp_path / "one")
    first, second, _ = map(finish, [*both, alone])
    # What all share, one host says and writes.
    assert mentions(first, "probe", "5-shot")
    assert "probe" not in second
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert ours["mean"] == pytest.approx(theirs["mean"], abs=1e-4)
        for name in ("task", "runs", "num_examples", "failed"):
            assert ours[name] == theirs[name]
