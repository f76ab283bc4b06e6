"""Tests of the versions and devices that --version prints."""

import os
import sys
from importlib import metadata

import pytest

from mixer_jax.cli import versions
from tests.helpers.messages import mentions


def describe() -> dict[str, str]:
    lines = (line.partition(" ") for line in versions.describe_environment())
    return {name: value for name, _, value in lines}


def test_includes_wandb() -> None:
    assert describe()["wandb"] == metadata.version("wandb")


def test_jax_that_cannot_be_imported_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    # Importing it raises ImportError.
    monkeypatch.setitem(sys.modules, "jax", None)
    environment = describe()
    assert "python" in environment
    assert mentions(environment["devices"], "JAX", "ModuleNotFoundError")


@pytest.mark.parametrize(("chosen", "expected"), [(None, "false"), ("true", "true")])
def test_memory_of_gpus_is_not_preallocated(
    chosen: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = "XLA_PYTHON_CLIENT_PREALLOCATE"
    # Restored after the test, also if it was not set.
    monkeypatch.setenv(variable, chosen or "")
    if chosen is None:
        monkeypatch.delenv(variable)
    describe()
    assert os.environ[variable] == expected


def test_devices_are_not_queried_if_there_may_be_other_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert mentions(describe()["devices"], "several", "hosts")
