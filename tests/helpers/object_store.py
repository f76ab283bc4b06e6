"""An object store without a network: a folder that epath accesses by a URL."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from etils.epath.testing import mock_epath

BUCKET = "gs://some_bucket/"


class ObjectStore:
    """Store whose objects cannot be appended to.

    Attributes:
        num_uploads: Number of objects written so far.
        before_upload: Called before each upload; may block or raise.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.num_uploads = 0
        self.before_upload: Callable[[], object] = lambda: None

    def local(self, path: Any) -> str:
        return os.fspath(path).replace(BUCKET, f"{self._folder}/")

    def open(self, original: Any, path: Any, mode: str = "r", **kwargs: Any) -> Any:
        assert mode[0] in "rw", "objects cannot be appended to"
        if mode[0] == "w":
            self.before_upload()
            self.num_uploads += 1
            # Object stores have no folders.
            os.makedirs(os.path.dirname(self.local(path)), exist_ok=True)
        return original(self.local(path), mode, **kwargs)

    def glob(self, original: Any, path: Any) -> list[str]:
        return [name.replace(f"{self._folder}/", BUCKET) for name in original(self.local(path))]

    def call(self, original: Any, *paths: Any, **kwargs: Any) -> Any:
        return original(*map(self.local, paths), **kwargs)


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[ObjectStore]:
    """Makes a folder the contents of `BUCKET`, by replacing what epath calls."""
    store = ObjectStore(folder)
    names = ("exists", "isdir", "listdir", "stat", "replace", "remove")
    with pytest.MonkeyPatch.context() as patch:
        # Otherwise epath would use TensorFlow if it is installed.
        patch.setattr("etils.epath.gpath._is_tf_installed", lambda: False)
        with mock_epath(open=store.open, glob=store.glob, **dict.fromkeys(names, store.call)):
            yield store
