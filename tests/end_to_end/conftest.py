"""What tests of real processes share."""

from pathlib import Path

import pytest

from tests.processes import finish, start


@pytest.fixture(scope="session")
def uninterrupted(digits_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from start to end, for tests that only look at it."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finish(start(digits_dir, workdir, as_users=True))
    return workdir
