"""What tests of real processes share."""

from pathlib import Path

import pytest

from mixer_jax.files import file_lock
from tests.helpers.processes import finish, start


@pytest.fixture(scope="session")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str, digits_dir: str
) -> Path:
    """The folder of a run from start to end, for tests that only look at it, of all workers."""
    place = tmp_path_factory.getbasetemp()
    place = place if worker_id == "master" else place.parent
    workdir, done = place / "uninterrupted", place / "uninterrupted.done"
    with file_lock(place / "uninterrupted.lock", wait=True):
        if not done.exists():
            finish(start(digits_dir, workdir, optimized=True))
            done.touch()
    return workdir
