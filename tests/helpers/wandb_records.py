"""Reads what Weights & Biases records in offline mode."""

import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import wandb

# Generated when it is imported.
Record: Any = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
_FILE_HEADER = b":W&B"
_BLOCK = 32768
_RECORD_HEADER = struct.Struct("<IHB")
# Types of fragments of a record.
_FULL, _MIDDLE, _LAST = 1, 3, 4


class OfflineRun(NamedTuple):
    """Records of one process of a run.

    Attributes:
        run: Its id, project and name; None if the process was killed before it was written.
        config: Values by key.
        history: Logged values, in their order, without those that W&B adds.
        exit_code: Exit code of the process, or None if it was killed.
        is_preempting: Whether the process said that it is preempted.
        folder: Folder of the records.
    """

    run: Any
    config: dict[str, Any]
    history: list[dict[str, Any]]
    exit_code: int | None
    is_preempting: bool
    folder: Path


def read_offline_runs(workdir: Path) -> list[OfflineRun]:
    """Reads the runs recorded in a workdir, the oldest first, once W&B has written them."""
    # Ends its process if this one started it, which `finish` does not wait for.
    wandb.teardown()
    files = workdir.glob("wandb/offline-run-*/*.wandb")
    return [_read_run(file) for file in sorted(files, key=lambda file: file.stat().st_mtime_ns)]


def _read_run(file: Path) -> OfflineRun:
    records = [Record.FromString(data) for data in _iter_records(file.read_bytes())]
    run = next((record.run for record in records if record.HasField("run")), None)
    history = [
        {
            name: json.loads(item.value_json)
            for item in record.history.item
            if not (name := item.key or ".".join(item.nested_key)).startswith("_")
        }
        for record in records
        if record.HasField("history")
    ]
    exits = [record.exit.exit_code for record in records if record.HasField("exit")]
    return OfflineRun(
        run,
        {item.key: json.loads(item.value_json) for item in run.config.update} if run else {},
        history,
        exits[0] if exits else None,
        any(record.HasField("preempting") for record in records),
        file.parent,
    )


def _iter_records(data: bytes) -> Iterator[bytes]:
    """Yields the records of a file in LevelDB's log format, except one that a crash cut off."""
    assert data.startswith(_FILE_HEADER)
    position, record = 7, b""
    while position + _RECORD_HEADER.size <= len(data):
        rest_of_block = _BLOCK - position % _BLOCK
        if rest_of_block < _RECORD_HEADER.size:
            position += rest_of_block
            continue
        _, length, kind = _RECORD_HEADER.unpack_from(data, position)
        position += _RECORD_HEADER.size
        fragment = data[position : position + length]
        record = record + fragment if kind in (_MIDDLE, _LAST) else fragment
        position += length
        if kind in (_FULL, _LAST) and position <= len(data):
            yield record
