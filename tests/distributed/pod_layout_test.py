"""Tests of the work of 1,024 hosts: what each loads of an epoch, and writes of a checkpoint."""

import json
import os
import subprocess
import sys

import pytest

HOSTS = 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fsdp", "most_bytes"),
    [
        # The first host also writes what 1,024 does not divide: kernels of 196 × 512 numbers.
        (1, 20_300_676),
        (16, 2_237_316),
    ],
)
def test_1024_hosts_load_each_example_and_write_each_number_once(
    fsdp: int, most_bytes: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.pod_layout", str(fsdp)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(HOSTS)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    plan = json.loads(done.stdout)
    # Three batches of 4,096 images are one epoch.
    assert plan["rows"] == [4]
    assert plan["examples"] != sorted(plan["examples"])
    assert sorted(plan["examples"]) == list(range(12_288))
    # The parameters of L/16: 918 MB.
    assert plan["bytes"] == 918_240_972
    assert plan["wrong"] == []
    assert sum(plan["written"]) == plan["bytes"]
    # The mean is 896,720 bytes.
    assert (min(plan["written"]), max(plan["written"])) == (877_752, most_bytes)
    # Only matrices are sharded.
    assert max(plan["read"]) == min(plan["read"])
    assert plan["bytes"] / fsdp <= plan["read"][0] < 1.05 * plan["bytes"] / fsdp
