"""A log of what a program syncs and renames, in order."""

import os
from pathlib import Path

import pytest


class SyncLog:
    """Order of syncs and renames; see `log_syncs`."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def index(self, event: str, path: Path) -> int:
        """Returns the index of the first such event; fails if there is none."""
        return self.events.index((event, str(path)))

    def names_synced_before(self, index: int) -> set[str]:
        """Returns the names of what was synced before an event."""
        return {Path(path).name for event, path in self.events[:index] if event == "sync"}


def log_syncs(monkeypatch: pytest.MonkeyPatch) -> SyncLog:
    """Logs the calls of `os.fsync`, `os.replace` and `os.rename` of this process."""
    log = SyncLog()
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def logged_fsync(descriptor: int) -> None:
        log.events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def logged_replace(source: str, target: str) -> None:
        replace(source, target)
        log.events.append(("rename", str(target)))

    def logged_rename(source: str, target: str) -> None:
        rename(source, target)
        log.events.append(("rename", str(target)))

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    monkeypatch.setattr(os, "rename", logged_rename)
    return log
