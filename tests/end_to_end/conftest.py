"""Fixtures of the end-to-end tests."""

from pathlib import Path

import pytest

from mixer_jax.files import file_lock
from tests.helpers.processes import finish, start


@pytest.fixture(scope="session")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str, digits_dir: str
) -> Path:
    """Workdir of a finished run, which all workers share and must not change."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent
    workdir, done = folder / "uninterrupted", folder / "uninterrupted.done"
    with file_lock(folder / "uninterrupted.lock", wait=True):
        if not done.exists():
            finish(start(digits_dir, workdir, optimized=True))
            done.touch()
    return workdir
