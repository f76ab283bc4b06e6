"""Setup of all tests: eight simulated devices, checked shapes, no implicit rank promotion."""

import os
import signal
import threading
from pathlib import Path

import jax
import jaxtyping
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiled programs are cached between test runs, so that only the first one is slow.
CACHE = os.path.expanduser("~/.cache/mixer_jax/tests")
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# Compiled programs run only briefly, so XLA does not optimize them, here and in processes that
# tests start; compilation takes half as long. Set to 0 to test the programs that users run.
FAST_COMPILE = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
jax.config.update("jax_disable_most_optimizations", FAST_COMPILE == "1")
# A shell starts background processes with SIGINT ignored, which child processes inherit. Tests
# and the processes that they start need the default handler.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Checks all annotations of the package at every call; a float may be an int.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
jaxtyping.install_import_hook("mixer_jax", CHECKER)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """Root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Data directory with digits prepared."""
    from mixer_jax.data.registry import open_dataset

    folder = str(tmp_path_factory.mktemp("tfds"))
    for classes in ("all", "low", "high"):
        open_dataset(f"digits/{classes}", "train", folder)
    return folder


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Data directory with the multi-label task of `tests.helpers.shapes`."""
    from tests.helpers.shapes import write_shapes

    folder = str(tmp_path_factory.mktemp("shapes"))
    write_shapes(folder)
    return folder


@pytest.fixture(autouse=True)
def run_in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the checkout the current directory of every test."""
    monkeypatch.chdir(ROOT)
