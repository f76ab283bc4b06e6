"""Settings of the whole test run: eight simulated devices, shapes checked, no silent broadcasts."""

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
# Compiled programs are kept between runs, so that only the first run of the tests is slow.
CACHE = os.path.expanduser("~/.cache/mixer_jax/tests")
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# What is compiled here runs for moments, so XLA does not optimize it, neither here nor in the
# processes that tests start; compiling takes half as long. With 0, tests run what users run.
QUICK = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
jax.config.update("jax_disable_most_optimizations", QUICK == "1")
# Ctrl-C interrupts, also where the tests were started in the background and inherit that it does
# not; so do the processes that they start.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Every annotation of the package is checked at every call; an int will do for a float.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
jaxtyping.install_import_hook("mixer_jax", CHECKER)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data_dir with digits prepared in it."""
    from mixer_jax.data.registry import open_dataset

    folder = str(tmp_path_factory.mktemp("tfds"))
    for classes in ("all", "low", "high"):
        open_dataset(f"digits/{classes}", "train", folder)
    return folder


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every test in the checkout, as a user would."""
    monkeypatch.chdir(ROOT)
