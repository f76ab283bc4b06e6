"""The TPU compiler in the tests' own process."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mixer_jax.distributed.hardware import silence_libtpu
from mixer_jax.planning.topology import ENVIRONMENT, parse_topology, tpu_devices


@contextlib.contextmanager
def tpu_compiler() -> Iterator[None]:
    """Sets up compilation for absent TPUs; skips the test if libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed (requirements-tpu.txt)")
    silence_libtpu()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", ENVIRONMENT["ALLOW_MULTIPLE_LIBTPU_LOAD"])
    # Programs for absent devices cannot be loaded from the tests' compilation cache.
    folder = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def tpu_device(topology: str) -> Iterator[Any]:
    """Yields a device of a topology to compile for; skips the test without libtpu."""
    with tpu_compiler():
        yield tpu_devices(parse_topology(topology))[0]
