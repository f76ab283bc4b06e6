"""Tests of checksums of the files of a checkpoint."""

from pathlib import Path

import numpy as np
import pytest
from etils import epath

from mixer_jax.checkpoints import checksums
from mixer_jax.errors import RunError
from tests.helpers.messages import raises


def test_files_larger_than_a_part_have_a_checksum_per_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = epath.Path(tmp_path)
    monkeypatch.setattr(checksums, "_PART_SIZE", 1000)
    data = np.random.default_rng(0).bytes(2500)
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "data"
    path.write_bytes(data)
    (tmp_path / "a" / "empty").touch()
    checksums.write_checksums(tmp_path)
    checksums.verify_checksums(folder)
    for position in (0, 999, 1000, 2499):
        damaged = bytearray(data)
        damaged[position] ^= 128
        path.write_bytes(damaged)
        with raises(checksums.DamagedFileError, "a/data"):
            checksums.verify_checksums(folder, ["a"])
        checksums.verify_checksums(folder, ["b"])
    path.write_bytes(data + b"0")
    with raises(checksums.DamagedFileError, "a/data", "2501", "2500"):
        checksums.verify_checksums(folder)


class StoreError(Exception):
    """Error of a library that reads an object store, which is not an OSError."""


@pytest.mark.parametrize("error", [StoreError, ValueError, RuntimeError])
def test_failing_store_is_not_damage(error: type[Exception], tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"data")
    checksums.write_checksums(tmp_path)
    folder = epath.Path(tmp_path)

    def fail(*args: object, **kwargs: object) -> None:
        raise error("503 the service is unavailable")

    for method in ("exists", "read_bytes", "open", "stat"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(folder), method, fail)
            with raises(RunError, str(tmp_path), "503"):
                checksums.verify_checksums(folder)
    checksums.verify_checksums(folder)
