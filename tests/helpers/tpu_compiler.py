"""The TPU compiler in the test's own process, as `mixer_jax.plan` sets it up in its own."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mixer_jax.distributed.tpu_env import silence_libtpu
from mixer_jax.planning.topology import ENVIRONMENT, parse_topology, tpu_devices


@contextlib.contextmanager
def tpu_device(name: str) -> Iterator[Any]:
    """Gives a device of a topology to compile for; without libtpu the test is skipped."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed (requirements-tpu.txt)")
    silence_libtpu()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", ENVIRONMENT["ALLOW_MULTIPLE_LIBTPU_LOAD"])
    # Programs for devices that are not here cannot be read back from the tests' cache.
    folder = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    try:
        yield tpu_devices(parse_topology(name))[0]
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()
