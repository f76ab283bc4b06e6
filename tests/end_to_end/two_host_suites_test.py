"""Test of a transfer suite on two hosts, which are real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.messages import mentions
from tests.helpers.processes import finish, host_env
from tests.helpers.tiny_suite import save_weights

pytestmark = pytest.mark.slow

SUITE = """
from mixer_jax.suites.tasks import Suite
from tests.helpers.tiny_suite import LOW, PROBE

SUITE = Suite("small", "digits", (LOW, PROBE))
"""


def start(folder: Path, data_dir: str, workdir: Path, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "mixer_jax.transfer", "--no_throughput"]
    command += [f"--checkpoint={folder}/weights", f"--suite={folder}/small.py"]
    command += [f"--workdir={workdir}", f"--data_dir={data_dir}"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
    )


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    return json.loads((workdir / "results.json").read_text())["rows"]


def test_two_hosts_compute_the_table_of_one(tmp_path: Path, digits_dir: str) -> None:
    save_weights(tmp_path)
    (tmp_path / "small.py").write_text(SUITE)
    envs = host_env(2, num_devices=1)
    both = [start(tmp_path, digits_dir, tmp_path / "two", **env) for env in envs]
    alone = start(tmp_path, digits_dir, tmp_path / "one")
    first, second, _ = map(finish, [*both, alone])
    # Only the primary process prints.
    assert mentions(first, "probe", "5-shot")
    assert "probe" not in second
    for actual, expected in zip(
        read_rows(tmp_path / "two"), read_rows(tmp_path / "one"), strict=True
    ):
        assert actual["mean"] == pytest.approx(expected["mean"], abs=1e-4)
        for name in ("task", "runs", "num_examples", "failed"):
            assert actual[name] == expected[name]
